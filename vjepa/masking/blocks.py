"""Multi-block 3D masks as pure functions (reference section 3; DESIGN 2.4).

The block size is a function of (seed, step, mask): one size per step and mask, as in I-JEPA and V-JEPA. The block
positions are a function of (seed, mask, ordinal). Context and masked tokens are disjoint; the context is what no block
covers, with kind=multiblock (I-JEPA) only inside a block of its own. Inside a mask group every clip is cut to the
group's smallest counts, so that shapes are rectangular.
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
MaskKind = Literal["blocks", "future", "multiblock"]
Indices = NDArray[np.int64]
MAX_ATTEMPTS = 100


@dataclass
class BlockMaskConfig:
    """One mask: the union of `num_blocks` blocks is predicted, the rest is the context.

    kind=future (not in V-JEPA 2.1): the last temporal_scale of the time steps, whole frames. kind=multiblock (I-JEPA,
    arXiv 2301.08243, section 3): each block is predicted on its own, from one context that all share: a block of unit
    aspect ratio less what they cover.
    """

    num_blocks: int  # blocks drawn per clip; they may overlap
    spatial_scale: float  # share of the grid's height x width that one block covers; I-JEPA: 0.15 to 0.2
    temporal_scale: float = 1.0  # share of the time steps that one block covers; 1.0 makes it a tube
    aspect_min: float = 0.75  # smallest height / width of a block
    aspect_max: float = 1.5  # largest height / width of a block
    kind: MaskKind = "blocks"  # blocks, future or multiblock
    spatial_scale_max: float | None = None  # draw a step's share between spatial_scale and this; null: no range
    context_scale_min: float = 0.85  # multiblock: smallest share of height x width of the context's block
    context_scale_max: float = 1.0  # multiblock: largest share

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise ValueError(f"mask num_blocks={self.num_blocks} must be at least 1")
        for name in ("spatial_scale", "temporal_scale"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"mask {name}={getattr(self, name)} must be above 0 and at most 1")
        if not self.spatial_scale <= (self.spatial_scale_max or self.spatial_scale) <= 1:
            raise ValueError(
                f"mask spatial_scale_max={self.spatial_scale_max} must be between spatial_scale={self.spatial_scale} "
                "and 1; null draws no share"
            )
        if not 0 < self.aspect_min <= self.aspect_max:
            raise ValueError(f"mask aspect range [{self.aspect_min}, {self.aspect_max}] must be ascending and positive")
        if self.kind == "future" and (self.num_blocks, self.spatial_scale) != (1, 1):
            raise ValueError(
                f"mask kind=future covers whole frames: num_blocks={self.num_blocks} and "
                f"spatial_scale={self.spatial_scale} must be 1"
            )
        if self.kind == "future" and self.temporal_scale == 1:
            raise ValueError("mask kind=future with temporal_scale=1 leaves no context: choose a smaller share")
        self._check_context_block()

    def _check_context_block(self) -> None:
        scales = (self.context_scale_min, self.context_scale_max)
        if not 0 < self.context_scale_min <= self.context_scale_max <= 1:
            raise ValueError(f"mask context_scale range {list(scales)} must be ascending, above 0 and at most 1")
        if self.kind != "multiblock" and scales != (0.85, 1.0):
            raise ValueError(f"mask context_scale range {list(scales)} is for kind=multiblock, not kind={self.kind}")
        if self.kind == "multiblock" and self.temporal_scale != 1:
            raise ValueError(
                f"mask kind=multiblock has blocks over all time steps: temporal_scale={self.temporal_scale} must be 1"
            )


def rng(*parts: object) -> np.random.Generator:
    """A generator that is a pure function of `parts`, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))


def block_size(config: BlockMaskConfig, grid: Grid, seed: int, step: int, name: str) -> Grid:
    """Size (t, h, w) in tokens of every block of mask `name` in this step."""
    frames, height, width = grid
    if config.kind == "future":
        return max(1, int(frames * config.temporal_scale)), height, width
    generator = rng(seed, "block size", step, name)
    aspect, scale = generator.uniform(config.aspect_min, config.aspect_max), config.spatial_scale
    if config.spatial_scale_max is not None:
        scale = generator.uniform(scale, config.spatial_scale_max)
    return (min(frames, max(1, int(frames * config.temporal_scale))), *_rectangle(height, width, scale, aspect))


def context_size(config: BlockMaskConfig, grid: Grid, seed: int, step: int, name: str) -> Grid | None:
    """Size (t, h, w) of the block in which the context of mask `name` lies in this step; None: anywhere."""
    if config.kind != "multiblock":
        return None
    scale = rng(seed, "context size", step, name).uniform(config.context_scale_min, config.context_scale_max)
    return grid[0], *_rectangle(grid[1], grid[2], scale, aspect=1.0)


def _rectangle(height: int, width: int, scale: float, aspect: float) -> tuple[int, int]:
    """Rows and columns with about this share of the area and this height over width, inside the grid."""
    area = int(height * width * scale)
    rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    return min(height, max(1, rows)), min(width, max(1, columns))


def draw_mask(
    config: BlockMaskConfig,
    grid: Grid,
    size: Grid,
    seed: int,
    ordinal: int,
    name: str,
    *,
    inside: Grid | None = None,
) -> tuple[Indices, ...]:
    """Token indices of one clip, ascending: context, then what is predicted; redrawn while no context is left.

    That is the union of all blocks, or with kind=multiblock each block. `inside` is the size of the context's block.
    """
    generator = rng(seed, "block positions", ordinal, name)
    for _ in range(MAX_ATTEMPTS):
        blocks = [_block(grid, size, generator, config.kind) for _ in range(config.num_blocks)]
        covered = np.logical_or.reduce(blocks)
        visible = ~covered if inside is None else ~covered & _block(grid, inside, generator, config.kind)
        if visible.any():
            predicted = blocks if config.kind == "multiblock" else [covered]
            return np.flatnonzero(visible), *map(np.flatnonzero, predicted)
    raise ValueError(
        f"mask {name!r}: {config.num_blocks} blocks of {size} tokens left no context on a grid of {grid} in "
        f"{MAX_ATTEMPTS} draws: lower num_blocks or spatial_scale, or use larger clips"
    )


def _block(grid: Grid, size: Grid, generator: np.random.Generator, kind: MaskKind) -> NDArray[np.bool_]:
    """A block of this size at a random place; of kind=future at the end."""
    covered = np.zeros(grid, dtype=bool)
    t, h, w = (int(generator.integers(0, whole - part + 1)) for whole, part in zip(grid, size, strict=True))
    t = grid[0] - size[0] if kind == "future" else t
    covered[t : t + size[0], h : h + size[1], w : w + size[2]] = True
    return covered


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
) -> tuple[Indices, ...]:
    """Masks of the clips `wanted` (ordinals in `group`), cut to the smallest counts in the group.

    Context [B, K], then what is predicted: [B, M], or with kind=multiblock [B, M] for each block.
    """
    size = block_size(config, grid, seed, step, name)
    inside = context_size(config, grid, seed, step, name)
    drawn = {ordinal: draw_mask(config, grid, size, seed, ordinal, name, inside=inside) for ordinal in group}
    counts = [min(map(len, parts)) for parts in zip(*drawn.values(), strict=True)]
    rows = []
    for ordinal in wanted:
        generator = rng(seed, "truncate", ordinal, name)
        rows.append([truncate(part, count, how, generator) for part, count in zip(drawn[ordinal], counts, strict=True)])
    return tuple(np.stack(parts) for parts in zip(*rows, strict=True))


def num_kept(num_tokens: int, keep: float) -> int:
    """How many tokens of a view are this share of them, at least one."""
    return max(1, round(keep * num_tokens))


def kept_tokens(
    num_tokens: int, keep: float, *, seed: int, step: int, name: str, view: int, wanted: Sequence[int]
) -> Indices:
    """Token indices [B, K] that are left of a view where the others are dropped at random, for each clip (ordinal)."""
    every, count = np.arange(num_tokens), num_kept(num_tokens, keep)
    return np.stack(
        [truncate(every, count, "random", rng(seed, "view tokens", step, ordinal, name, view)) for ordinal in wanted]
    )
