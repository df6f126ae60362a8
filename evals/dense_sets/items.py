"""Images with a truth for every pixel, read when they are wanted, and which pixels of a depth are scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from data_pipeline.decode import DecodeError, frames_at, open_decoder
from data_pipeline.transforms import Box
from evals.cache import file_digest
from evals.dense_views import cut
from evals.media import stamp
from evals.protocol import NotThere

MaskName = Literal["none", "eigen", "garg"]


class DenseSetError(NotThere):
    """A set is not whole; the message says what is missing and how it should lie."""


class DenseItem(Protocol):
    """An image and its truth, read when they are wanted."""

    @property
    def key(self) -> str: ...
    def content(self) -> str:
        """Digest of the image's bytes and of what is cut off it."""
        ...

    def stamp(self) -> str:
        """Sizes and times of its files, by which a change is noticed without reading them."""
        ...

    def image(self) -> Tensor:
        """uint8 [3, H, W]."""
        ...

    def truth(self) -> Tensor:
        """int64 or float32 [H, W]."""
        ...


@dataclass(frozen=True)
class DenseSet:
    """A split of a set."""

    name: str
    split: str
    items: tuple[DenseItem, ...]
    classes: tuple[str, ...] = ()
    """None of depth."""

    def __len__(self) -> int:
        return len(self.items)

    def part(self, indices: Sequence[int]) -> DenseSet:
        return DenseSet(self.name, self.split, tuple(self.items[index] for index in indices), self.classes)

    def first(self, limit: int | None) -> DenseSet:
        """So many items at most, all for None."""
        return self if limit is None else self.part(range(min(limit, len(self))))


@dataclass(frozen=True)
class FileItem:
    """Two files, perhaps with a border cut off both."""

    key: str
    picture: Path
    truth_file: Path
    read_truth: Callable[[Path], Tensor]
    box: Callable[[int, int], Box] | None = None
    """Of height and width."""
    mask: MaskName = "none"

    def content(self) -> str:
        return file_digest(self.picture) + ("" if self.box is None else f" {self.box(1000, 3000)}")

    def stamp(self) -> str:
        return f"{stamp(self.picture)} {stamp(self.truth_file)}"

    def image(self) -> Tensor:
        try:
            image = frames_at(open_decoder(self.picture.read_bytes(), "image"), np.zeros(1))[0]
        except DecodeError as error:
            raise DenseSetError(f"{self.picture} is no readable image: {error}") from error
        return image if self.box is None else cut(image, self.box(*image.shape[-2:]))

    def truth(self) -> Tensor:
        truth = self.read_truth(self.truth_file)
        if self.mask != "none":  # of the whole image, as the metric's authors state it
            truth = evaluated(truth, self.mask)
        return truth if self.box is None else cut(truth, self.box(*truth.shape))


def evaluated(depth: Tensor, mask: MaskName) -> Tensor:
    """Depth [H, W] with 0 outside the mask of an evaluation."""
    if mask == "none":
        return depth
    height, width = depth.shape
    if mask == "garg":
        bounds = _shares(height, width, (0.40810811, 0.99189189, 0.03594771, 0.96405229))
    elif (height, width) == (480, 640):
        bounds = (45, 471, 41, 601)
    elif width > 2 * height:
        bounds = _shares(height, width, (0.3324324, 0.91351351, 0.0359477, 0.96405229))
    else:
        raise ValueError(f"mask=eigen is for frames of 480 x 640 (NYUv2) or of KITTI, not {height} x {width}: use none")
    kept = torch.zeros_like(depth)
    rows, columns = slice(*bounds[:2]), slice(*bounds[2:])
    kept[rows, columns] = depth[rows, columns]
    return kept


def _shares(height: int, width: int, shares: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
    top, bottom, left, right = shares
    return int(top * height), int(bottom * height), int(left * width), int(right * width)
