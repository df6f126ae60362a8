"""What features of single frames are measured against: sources without a network, and one that was never trained."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa.batch import normalise

RGB_PATCHES, RANDOM_PATCHES = "rgb_patches", "random_patches"


@dataclass(frozen=True)
class RgbPatches:
    """The colours of each patch of a single frame on a coarse grid, 4 x 4 x 3 numbers; no position."""

    patch_size: int = 16
    cells: int = 4
    """Along each side of a patch."""

    @property
    def name(self) -> str:
        return RGB_PATCHES

    def tokens(self, clips: Tensor) -> Tensor:
        """uint8 [B, 3, 1, H, W] -> float32 [B, 1, h, w, 3 * cells * cells]; see FeatureSource."""
        frames = normalise(clips)[:, :, 0]
        height, width = (side // self.patch_size for side in frames.shape[-2:])
        small = F.interpolate(frames, size=(height * self.cells, width * self.cells), mode="area")
        return _patches(small, self.cells)


@dataclass(frozen=True)
class RandomPatches:
    """A random linear projection of each patch of a single frame: what a patch embedding gives before training."""

    patch_size: int = 16
    dim: int = 96
    seed: int = 0

    @property
    def name(self) -> str:
        return RANDOM_PATCHES

    @cached_property
    def projection(self) -> Tensor:
        """Gaussian weights [3 * patch * patch, dim]; cosines do not depend on their scale."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(3 * self.patch_size**2, self.dim, generator=generator) / self.dim**0.5

    def tokens(self, clips: Tensor) -> Tensor:
        """uint8 [B, 3, 1, H, W] -> float32 [B, 1, h, w, dim]; see FeatureSource."""
        return _patches(normalise(clips)[:, :, 0], self.patch_size) @ self.projection


def _patches(frames: Tensor, side: int) -> Tensor:
    """Frames [B, C, H, W] cut into patches: [B, 1, h, w, C * side * side]."""
    cut = frames.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [B, C, h, side, w, side]
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3)[:, None]
