"""Multi-block 3D masks as pure functions (reference section 3; DESIGN 2.4).

The block size is a function of (seed, step, mask): one size per step and mask, as in I-JEPA and V-JEPA. The block
positions are a function of (seed, mask, ordinal). Context and masked tokens are disjoint; the context is what no block
covers. Inside a mask group every clip is cut to the group's smallest counts, so that shapes are rectangular.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vjepa.batch import Grid

Truncate = Literal["random", "prefix"]
MaskKind = Literal["blocks", "future"]
Indices = NDArray[np.int64]
MAX_ATTEMPTS = 100


@dataclass
class BlockMaskConfig:
    """One mask: the union of `num_blocks` blocks is predicted, the rest is the context."""

    num_blocks: int  # blocks drawn per clip; they may overlap
    spatial_scale: float  # share of the grid's height x width that one block covers
    temporal_scale: float = 1.0  # share of the time steps that one block covers; 1.0 makes it a tube
    aspect_min: float = 0.75  # smallest height / width of a block
    aspect_max: float = 1.5  # largest height / width of a block
    kind: MaskKind = "blocks"  # future (not in V-JEPA 2.1): the last temporal_scale of the time steps, whole frames

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise ValueError(f"mask num_blocks={self.num_blocks} must be at least 1")
        for name in ("spatial_scale", "temporal_scale"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"mask {name}={getattr(self, name)} must be above 0 and at most 1")
        if not 0 < self.aspect_min <= self.aspect_max:
            raise ValueError(f"mask aspect range [{self.aspect_min}, {self.aspect_max}] must be ascending and positive")
        if self.kind == "future" and (self.num_blocks, self.spatial_scale) != (1, 1):
            raise ValueError(
                f"mask kind=future covers whole frames: num_blocks={self.num_blocks} and "
                f"spatial_scale={self.spatial_scale} must be 1"
            )
        if self.kind == "future" and self.temporal_scale == 1:
            raise ValueError("mask kind=future with temporal_scale=1 leaves no context: choose a smaller share")


def rng(*parts: object) -> np.random.Generator:
    """A generator that is a pure function of `parts`, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))


def block_size(config: BlockMaskConfig, grid: Grid, seed: int, step: int, name: str) -> Grid:
    """Size (t, h, w) in tokens of every block of mask `name` in this step."""
    frames, height, width = grid
    if config.kind == "future":
        return max(1, int(frames * config.temporal_scale)), height, width
    aspect = rng(seed, "block size", step, name).uniform(config.aspect_min, config.aspect_max)
    area = int(height * width * config.spatial_scale)
    rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    return (
        min(frames, max(1, int(frames * config.temporal_scale))),
        min(height, max(1, rows)),
        min(width, max(1, columns)),
    )


def draw_mask(
    config: BlockMaskConfig, grid: Grid, size: Grid, seed: int, ordinal: int, name: str
) -> tuple[Indices, Indices]:
    """Context and masked token indices of one clip, ascending; redrawn while no context is left."""
    generator = rng(seed, "block positions", ordinal, name)
    for _ in range(MAX_ATTEMPTS):
        covered = np.zeros(grid, dtype=bool)
        for _ in range(config.num_blocks):
            t, h, w = (int(generator.integers(0, whole - part + 1)) for whole, part in zip(grid, size, strict=True))
            t = grid[0] - size[0] if config.kind == "future" else t
            covered[t : t + size[0], h : h + size[1], w : w + size[2]] = True
        flat = covered.ravel()
        if not flat.all():
            return np.flatnonzero(~flat), np.flatnonzero(flat)
    raise ValueError(
        f"mask {name!r}: {config.num_blocks} blocks of {size} tokens left no context on a grid of {grid} in "
        f"{MAX_ATTEMPTS} draws: lower num_blocks or spatial_scale, or use larger clips"
    )


def truncate(indices: Indices, count: int, how: Truncate, generator: np.random.Generator) -> Indices:
    """Cut ascending `indices` to `count`: a random subset (unbiased), or the first ones (the reference's cut).

    `prefix` drops the last time steps first: at the reference's batch of 24 the context keeps 99 tokens of the first
    tubelet and 5 of the last (reference section 3).
    """
    if how == "prefix" or len(indices) == count:
        return indices[:count]
    return np.sort(generator.choice(indices, size=count, replace=False))


def group_masks(
    config: BlockMaskConfig,
    grid: Grid,
    *,
    seed: int,
    step: int,
    name: str,
    group: Sequence[int],
    wanted: Sequence[int],
    how: Truncate,
) -> tuple[Indices, Indices]:
    """Masks of the clips `wanted` (ordinals in `group`), cut to the smallest counts in the group: [B, K] and [B, M]."""
    size = block_size(config, grid, seed, step, name)
    drawn = {ordinal: draw_mask(config, grid, size, seed, ordinal, name) for ordinal in group}
    num_context = min(len(context) for context, _ in drawn.values())
    num_masked = min(len(masked) for _, masked in drawn.values())
    contexts, maskeds = [], []
    for ordinal in wanted:
        generator = rng(seed, "truncate", ordinal, name)
        context, masked = drawn[ordinal]
        contexts.append(truncate(context, num_context, how, generator))
        maskeds.append(truncate(masked, num_masked, how, generator))
    return np.stack(contexts), np.stack(maskeds)
