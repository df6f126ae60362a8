"""Augmentation of training clips for attentive probes (reference evaluation.md 1.1): uint8 clips, no torchvision.

Two differences from the reference, which works on frames of their own size: colours and shapes change after the crop,
on frames of the final size, and pixels stay uint8 in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from vjepa.batch import IMAGENET_MEAN, IMAGENET_STD

LEVELS = 10.0  # magnitudes run from 0 to this
Change = Callable[[Image.Image], Image.Image]


@dataclass
class AugmentConfig:
    """What training clips go through; every clip of a video draws its own, all its frames alike."""

    scale_min: float = 0.08  # of the crop: least share of the frame's area
    scale_max: float = 1.0
    aspect_min: float = 0.75  # of the crop, width over height
    aspect_max: float = 4 / 3
    flip: float = 0.0  # probability of a mirror image; the papers have none: left and right are classes
    erase: float = 0.25  # probability that a box of a clip becomes noise
    rand_augment: bool = True  # rand-m7-n4-mstd0.5-inc1
    num_changes: int = 4  # of RandAugment: drawn for each clip, each applied with probability 0.5
    magnitude: float = 7.0  # of RandAugment, out of 10
    magnitude_std: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.scale_min <= self.scale_max <= 1:
            raise ValueError(
                f"clips.augment: scale_min={self.scale_min} and scale_max={self.scale_max} must rise within (0, 1]"
            )
        if not 0 < self.aspect_min <= self.aspect_max:
            raise ValueError(
                f"clips.augment: aspect_min={self.aspect_min} must not exceed aspect_max={self.aspect_max}"
            )
        if not (0 <= self.flip <= 1 and 0 <= self.erase <= 1):
            raise ValueError(f"clips.augment: flip={self.flip} and erase={self.erase} must be probabilities")
        if self.num_changes < 0 or not 0 <= self.magnitude <= LEVELS or self.magnitude_std < 0:
            raise ValueError(
                f"clips.augment: num_changes={self.num_changes} and magnitude_std={self.magnitude_std} must not be "
                f"negative, magnitude={self.magnitude} must be within 0..10"
            )


def erase(clip: Tensor, config: AugmentConfig, generator: np.random.Generator) -> Tensor:
    """With probability `erase`, one box of all frames becomes noise: uint8 [C, T, H, W] -> the same.

    The box has .02 to 1/3 of the area and an aspect of .3 to 3.3; the noise is standard normal in normalised pixels,
    drawn for every pixel and frame.
    """
    if generator.random() >= config.erase:
        return clip
    channels, frames, height, width = clip.shape
    for _ in range(10):
        area = height * width * generator.uniform(0.02, 1 / 3)
        aspect = math.exp(generator.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < height and 0 < w < width:
            top, left = int(generator.integers(0, height - h + 1)), int(generator.integers(0, width - w + 1))
            noise = torch.from_numpy(generator.standard_normal((channels, frames, h, w), dtype=np.float32))
            mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
            clip = clip.clone()
            clip[:, :, top : top + h, left : left + w] = ((noise * std + mean) * 255).round().clamp(0, 255).byte()
            return clip
    return clip


def rand_augment(clip: Tensor, config: AugmentConfig, generator: np.random.Generator) -> Tensor:
    """RandAugment whose strength grows with its magnitude, the same changes on all frames: uint8 [3, T, H, W]."""
    if not config.rand_augment:
        return clip
    changes = [change for _ in range(config.num_changes) if (change := _draw_change(config, generator)) is not None]
    if not changes:
        return clip
    frames = []
    for pixels in clip.permute(1, 2, 3, 0).contiguous().numpy():  # each [H, W, 3]
        image = Image.fromarray(pixels)
        for change in changes:
            image = change(image)
        frames.append(torch.from_numpy(np.array(image)))
    return torch.stack(frames).permute(3, 0, 1, 2).contiguous()


def _draw_change(config: AugmentConfig, generator: np.random.Generator) -> Change | None:
    """One change of RandAugment with its magnitude drawn, or None where it is not applied."""
    name = CHANGES[int(generator.integers(len(CHANGES)))]
    level = float(np.clip(generator.normal(config.magnitude, config.magnitude_std), 0, LEVELS)) / LEVELS
    sign = 1.0 if generator.random() < 0.5 else -1.0
    return make_change(name, level, sign) if generator.random() < 0.5 else None


CHANGES = (
    "auto_contrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "solarize_add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
_ENHANCERS = {
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "brightness": ImageEnhance.Brightness,
    "sharpness": ImageEnhance.Sharpness,
}


def make_change(name: str, level: float, sign: float) -> Change:
    """The change of this name at a level in [0, 1]; `sign` says in which direction, where there are two."""
    if name in _ENHANCERS:
        factor = max(0.1, 1 + sign * 0.9 * level)
        return lambda image: _ENHANCERS[name](image).enhance(factor)
    simple: dict[str, Change] = {
        "auto_contrast": ImageOps.autocontrast,
        "equalize": ImageOps.equalize,
        "invert": ImageOps.invert,
        "rotate": lambda image: image.rotate(sign * 30 * level, Image.Resampling.BILINEAR, fillcolor=GREY),
        "posterize": lambda image: ImageOps.posterize(image, max(1, 4 - int(4 * level))),
        "solarize": lambda image: ImageOps.solarize(image, 256 - int(256 * level)),
        "solarize_add": lambda image: image.point([min(255, v + int(110 * level)) if v < 128 else v for v in _VALUES]),
        "shear_x": lambda image: _affine(image, (1, sign * 0.3 * level, 0, 0, 1, 0)),
        "shear_y": lambda image: _affine(image, (1, 0, 0, sign * 0.3 * level, 1, 0)),
        "translate_x": lambda image: _affine(image, (1, 0, sign * 0.45 * level * image.width, 0, 1, 0)),
        "translate_y": lambda image: _affine(image, (1, 0, 0, 0, 1, sign * 0.45 * level * image.height)),
    }
    return simple[name]


GREY = tuple(round(255 * value) for value in IMAGENET_MEAN)  # what moves into the frame from outside
_VALUES = [*range(256)] * 3


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GREY)
