"""From decoded frames to a view: one crop for the whole clip, resized on uint8, flipped.

All randomness comes from the generator passed in. The frames are stored as channels last, where torch's uint8
resampling is about three times as fast; they must not be made contiguous before the crop.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.config import ClipConfig


class Box(NamedTuple):
    """A crop in pixels."""

    top: int
    left: int
    height: int
    width: int


def random_resized_box(
    height: int,
    width: int,
    generator: np.random.Generator,
    *,
    scale: tuple[float, float],
    aspect: tuple[float, float],
) -> Box:
    """A random box with its area (share of the frame) and aspect (width over height) within the bounds.

    Ten tries; where none fits (a very wide or very tall frame), the largest centred box of an allowed aspect.
    """
    for _ in range(10):
        area = height * width * generator.uniform(*scale)
        ratio = math.exp(generator.uniform(math.log(aspect[0]), math.log(aspect[1])))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(generator.integers(0, height - box_height + 1))
            left = int(generator.integers(0, width - box_width + 1))
            return Box(top, left, box_height, box_width)
    ratio = min(max(width / height, aspect[0]), aspect[1])
    return centre_box(height, width, aspect=ratio)


def centre_box(height: int, width: int, *, aspect: float = 1.0) -> Box:
    """The largest centred box of this aspect (width over height)."""
    box_height = min(height, max(1, round(width / aspect)))
    box_width = min(width, max(1, round(height * aspect)))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def crop_resize(frames: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    """The same box of every frame at `size` (height, width): uint8 `[T, C, H0, W0]` -> `[C, T, H, W]`, contiguous."""
    return resize(cut(frames, box), size).permute(1, 0, 2, 3).contiguous()


def cut(frames: Tensor, box: Box) -> Tensor:
    """A view of the same box of every frame: `[T, C, H0, W0]` -> `[T, C, H, W]`."""
    top, left, height, width = box
    return frames[:, :, top : top + height, left : left + width]


def resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """All frames at `size` (height, width): uint8 `[T, C, H0, W0]` -> `[T, C, H, W]`; in floats but on a CPU."""
    if tuple(frames.shape[-2:]) == size:
        return frames
    if frames.device.type != "cpu":
        return resize_in_floats(frames, size)
    return F.interpolate(frames, size=size, mode="bilinear", antialias=True, align_corners=False)


def resize_in_floats(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """`resize` for devices without uint8 resampling, which rounds twice: at most one grey level from it."""
    resized = F.interpolate(frames.float(), size=size, mode="bilinear", antialias=True, align_corners=False)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def draw_crop(frames: Tensor, config: ClipConfig, generator: np.random.Generator) -> tuple[Box, bool]:
    """A random box of these frames `[T, C, H0, W0]`, and whether it is to be mirrored."""
    height, width = frames.shape[-2:]
    scale, aspect = (config.scale_min, config.scale_max), (config.aspect_min, config.aspect_max)
    box = random_resized_box(height, width, generator, scale=scale, aspect=aspect)
    return box, bool(generator.random() < config.flip)


def make_view(frames: Tensor, config: ClipConfig, generator: np.random.Generator) -> Tensor:
    """A random resized crop with a random flip: uint8 `[T, C, H0, W0]` -> `[C, T, size, size]`, contiguous."""
    box, is_flipped = draw_crop(frames, config, generator)
    view = crop_resize(frames, box, (config.size, config.size))
    return view.flip(-1) if is_flipped else view


def make_eval_view(frames: Tensor, size: int) -> Tensor:
    """The centred square, resized: uint8 `[T, C, H0, W0]` -> `[C, T, size, size]`, contiguous; no randomness."""
    height, width = frames.shape[-2:]
    return crop_resize(frames, centre_box(height, width), (size, size))


def make_full_view(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """The whole frame at `size` (height, width), aspect not kept: uint8 `[T, C, H0, W0]` -> `[C, T, H, W]`."""
    height, width = frames.shape[-2:]
    return crop_resize(frames, Box(0, 0, height, width), size)
