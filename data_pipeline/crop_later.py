"""Crops that are resized and flipped on the training device: a worker sends the pixels of each box as decoded.

What is random was drawn in the worker, so a clip is the same crop wherever it is resized. On a CPU the result is bit
for bit that of `transforms.make_view`; other devices resize in floats, which differs by at most one grey level (torch's
uint8 resampling rounds between its two passes).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from data_pipeline.config import ClipConfig
from data_pipeline.transforms import crop_resize, cut, draw_crop, resize, resize_in_floats

MOST_PIXELS = 2  # of a box that is sent, over those of the view: a larger one is resized where it was decoded


@dataclass(frozen=True)
class CropLater:
    """One view that is not made yet; `stack` makes several into what a batch holds."""

    pixels: Tensor
    """The box of every frame, uint8 `[T, H0, W0, C]`, contiguous."""
    size: int
    """Height and width of the view."""
    is_flipped: bool
    """Whether the view is mirrored."""

    @property
    def shape(self) -> torch.Size:
        """That of the view, `[C, T, size, size]`."""
        return torch.Size((self.pixels.shape[3], self.pixels.shape[0], self.size, self.size))

    @staticmethod
    def stack(views: Sequence["CropLater"]) -> "CropsLater":
        """Views of one shape as those of a batch."""
        first, shapes = views[0], {view.shape for view in views}
        if len(shapes) > 1:
            raise ValueError(
                f"views of shapes {sorted(map(tuple, shapes))} cannot be stacked: they must be of one shape"
            )
        boxes = tuple((view.pixels.shape[1], view.pixels.shape[2]) for view in views)
        pixels = torch.cat([view.pixels.flatten() for view in views])
        return CropsLater(pixels, boxes, tuple(view.is_flipped for view in views), first.shape[1], first.size)


@dataclass(frozen=True)
class CropsLater:
    """The same view of every clip of a batch; `to` makes the tensor."""

    pixels: Tensor
    """One box after the other, uint8 `[bytes]`: one tensor to send, to pin and to copy."""
    boxes: tuple[tuple[int, int], ...]
    """Height and width of each."""
    is_flipped: tuple[bool, ...]
    """Of each, whether it is mirrored."""
    frames: int
    """Frames of each, T."""
    size: int
    """Height and width of the views."""

    @property
    def shape(self) -> torch.Size:
        """That of the tensor, `[B, C, T, size, size]`."""
        return torch.Size((len(self.boxes), 3, self.frames, self.size, self.size))

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, clips: slice) -> "CropsLater":
        """Some of the clips."""
        first, end, step = clips.indices(len(self))
        if step != 1:
            raise ValueError(f"clips are taken one after the other, not in steps of {step}")
        starts, end = self._starts(), max(first, end)
        return replace(
            self,
            pixels=self.pixels[starts[first] : starts[end]],
            boxes=self.boxes[first:end],
            is_flipped=self.is_flipped[first:end],
        )

    def pin_memory(self) -> "CropsLater":
        """The same in page-locked memory."""
        return replace(self, pixels=self.pixels.pin_memory())

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Tensor:
        """The views, made on `device`: uint8 `[B, C, T, size, size]`, contiguous."""
        return self.make(self.pixels.to(device, non_blocking=non_blocking), is_exact=device.type == "cpu")

    def make(self, pixels: Tensor, *, is_exact: bool) -> Tensor:
        """The views out of these pixels, on their device; `is_exact` resizes in uint8, which only a CPU can."""
        views, starts = torch.empty(self.shape, dtype=torch.uint8, device=pixels.device), self._starts()
        for i, (height, width) in enumerate(self.boxes):
            box = pixels[starts[i] : starts[i + 1]].view(self.frames, height, width, 3).permute(0, 3, 1, 2)
            made = (resize if is_exact else resize_in_floats)(box, (self.size, self.size))  # [T, C, size, size]
            views[i] = (made.flip(-1) if self.is_flipped[i] else made).permute(1, 0, 2, 3)
        return views

    def _starts(self) -> list[int]:
        """Where each clip's bytes begin, and where the last one's end."""
        return [0, *accumulate(3 * self.frames * height * width for height, width in self.boxes)]


def cut_view(frames: Tensor, config: ClipConfig, generator: np.random.Generator) -> CropLater:
    """The view that `make_view` would make, to be made later: uint8 `[T, C, H0, W0]` -> at most 2 x its pixels."""
    box, is_flipped = draw_crop(frames, config, generator)
    if box.height * box.width > MOST_PIXELS * config.size**2:
        view = crop_resize(frames, box, (config.size, config.size))  # [C, T, size, size]
        return CropLater(view.permute(1, 2, 3, 0).contiguous(), config.size, is_flipped)
    return CropLater(cut(frames, box).permute(0, 2, 3, 1).contiguous(), config.size, is_flipped)
