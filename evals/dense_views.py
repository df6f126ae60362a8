"""What is done to an image and its truth before features: sizes, windows, crops, flips, changes of colour.

Images are uint8 [C, H, W], truths [H, W]: int64 classes with IGNORE, or float32 metres with 0 where nothing is known.
All randomness comes from the generator passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data_pipeline.transforms import Box, resize
from evals.protocol import IGNORE

Pair = tuple[Tensor, Tensor]


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [C, H0, W0] -> [C, H, W], bilinear with antialias."""
    return resize(image[None], size)[0]


def resize_truth(truth: Tensor, size: tuple[int, int]) -> Tensor:
    """The nearest true value of every place: [H0, W0] -> [H, W]."""
    if tuple(truth.shape) == size:
        return truth
    return F.interpolate(truth[None, None].double(), size=size, mode="nearest-exact")[0, 0].to(truth.dtype)


def cut(x: Tensor, box: Box) -> Tensor:
    """A box of [..., H, W]."""
    return x[..., box.top : box.top + box.height, box.left : box.left + box.width]


def short_side_size(height: int, width: int, side: int) -> tuple[int, int]:
    """The size at which the shorter side is `side`, the shape kept."""
    scale = side / min(height, width)
    return round(height * scale), round(width * scale)


def multiple_of(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """The nearest size of whole patches, at least one."""
    height, width = (max(patch, round(side / patch) * patch) for side in size)
    return height, width


def centred_patches(height: int, width: int, patch: int) -> Box:
    """The largest centred box of whole patches."""
    inner = height // patch * patch, width // patch * patch
    if not all(inner):
        raise ValueError(f"an image of {height} x {width} is smaller than a patch of {patch}: set view.short_side")
    return Box((height - inner[0]) // 2, (width - inner[1]) // 2, *inner)


def sliding_windows(height: int, width: int, crop: tuple[int, int], stride: int) -> list[Box]:
    """Windows of `crop` (height, width) every `stride` pixels; the last of a row or column ends with the image."""

    def starts(length: int, side: int) -> list[int]:
        count = max(0, math.ceil((length - side) / stride)) + 1
        return [max(0, min(place * stride, length - side)) for place in range(count)]

    return [Box(top, left, *crop) for top in starts(height, crop[0]) for left in starts(width, crop[1])]


def pad_to(x: Tensor, size: tuple[int, int], value: float) -> Tensor:
    """[..., H, W] filled up at the right and the bottom to at least this size."""
    below, right = (max(0, wanted - there) for wanted, there in zip(size, x.shape[-2:], strict=True))
    return F.pad(x, (0, right, 0, below), value=value) if below or right else x


def assemble(windows: Sequence[Box], scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Mean score of every pixel over the windows that see it: scores [W, K, H, W] at `windows` -> [K, *size]."""
    total = scores.new_zeros(scores.shape[1], *size)
    seen = scores.new_zeros(size)
    for box, part in zip(windows, scores, strict=True):
        inside = min(box.height, size[0] - box.top), min(box.width, size[1] - box.left)  # the rest was filled up
        rows, columns = slice(box.top, box.top + inside[0]), slice(box.left, box.left + inside[1])
        total[:, rows, columns] += part[:, : inside[0], : inside[1]]
        seen[rows, columns] += 1
    return total / seen


# -------------------------------------------------------------------------------------------------------- randomness


def random_crop(
    pair: Pair, size: tuple[int, int], generator: np.random.Generator, *, fill: float, max_ratio: float = 1.0
) -> Pair:
    """A crop anywhere, filled up where the image is smaller.

    Up to ten tries for one in which no class has more than `max_ratio` of the known pixels (mmsegmentation's
    cat_max_ratio, as DINOv3 trains: evaluation.md 1.3); the last one is taken as it is.
    """
    image, truth = pad_to(pair[0], size, 0), pad_to(pair[1], size, fill)
    height, width = truth.shape
    box = Box(0, 0, *size)
    for _ in range(10):
        top, left = (int(generator.integers(0, n - m + 1)) for n, m in zip((height, width), size, strict=True))
        box = Box(top, left, *size)
        if max_ratio >= 1 or _largest_share(cut(truth, box)) < max_ratio:
            break
    return cut(image, box), cut(truth, box)


def _largest_share(truth: Tensor) -> float:
    known = truth[truth != IGNORE]
    if not len(known):
        return 1.0
    counts = known.unique(return_counts=True)[1]
    return counts.max().item() / len(known) if len(counts) > 1 else 1.0


def rotate(pair: Pair, degrees: float, *, fill: float) -> Pair:
    """Image and truth turned about the centre; what comes from outside is black, and `fill` in the truth."""
    image, truth = Image.fromarray(pair[0].permute(1, 2, 0).numpy()), Image.fromarray(pair[1].numpy())
    image = image.rotate(degrees, Image.Resampling.BILINEAR)
    truth = truth.rotate(degrees, Image.Resampling.NEAREST, fillcolor=fill)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.from_numpy(np.array(truth))


def distort_colours(image: Tensor, generator: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue, each every other time: mmsegmentation's photometric distortion.

    Its 18 of hue are of OpenCV's 180 in the circle: 36 degrees either way.
    """

    def perhaps(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        return change(x) if generator.random() < 0.5 else x

    def contrast(x: Tensor) -> Tensor:
        return _scaled(x, generator.uniform(0.5, 1.5), 0)

    image = perhaps(image, lambda x: _scaled(x, 1, generator.uniform(-32, 32)))
    is_first = generator.random() < 0.5
    image = perhaps(image, contrast) if is_first else image
    saturation = generator.uniform(0.5, 1.5) if generator.random() < 0.5 else 1.0
    hue = generator.uniform(-18, 18) / 180 * 256 if generator.random() < 0.5 else 0.0
    image = _hsv(image, saturation, hue)
    return image if is_first else perhaps(image, contrast)


def brighten(image: Tensor, factor: float) -> Tensor:
    return _scaled(image, factor, 0)


def _scaled(image: Tensor, factor: float, offset: float) -> Tensor:
    return (image.float() * factor + offset).round_().clamp_(0, 255).to(torch.uint8)


def _hsv(image: Tensor, saturation: float, hue: float) -> Tensor:
    if saturation == 1 and hue == 0:
        return image
    planes = np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("HSV")).astype(np.float32)
    planes[..., 0] = (planes[..., 0] + hue) % 256
    planes[..., 1] *= saturation
    changed = Image.fromarray(planes.round().clip(0, 255).astype(np.uint8), "HSV").convert("RGB")
    return torch.from_numpy(np.array(changed)).permute(2, 0, 1)
