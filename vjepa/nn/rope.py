"""Rotary position embedding over the three axes of a token grid (V-JEPA 2.1, reference section 1.3).

The head dimension is split into three equal even parts (time, height, width); what is left over is not rotated.
Time positions are tubelet numbers and never scaled; rows and columns are scaled to the 16-wide grid on which the
released models were trained, so that a larger crop is seen at a finer step instead of farther away.

Two layouts exist and are not interchangeable. `interleaved` (2.1) gives both dimensions of a rotated pair the same
frequency: a rotation. `tiled` (V-JEPA 2 and its Hugging Face weights) repeats the list of frequencies while pairs stay
adjacent: not a rotation, kept because weights were trained with it.

Tables are fp32 whatever the model's dtype: bf16 holds integers exactly only up to 256.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vjepa.batch import Grid

RopeLayout = Literal["interleaved", "tiled"]
REFERENCE_GRID = 16  # 256 px / 16 px patches
BASE = 10000.0


@dataclass(frozen=True)
class RopeTable:
    """Cosines and sines for a list of tokens, [N, 1, head_dim] fp32: broadcast over heads."""

    cos: Tensor
    sin: Tensor


def axis_dim(head_dim: int) -> int:
    """Dimensions of a head that each of the three axes rotates: 20 of 64, 10 of 32."""
    return 2 * (head_dim // 3 // 2)


def grid_positions(grid: Grid, *, interpolate: bool, device: torch.device | None = None) -> Tensor:
    """Positions (time, row, column) of all tokens of a grid, [N, 3] fp32, rows and columns scaled to 0..15."""
    axes = [torch.arange(size, device=device, dtype=torch.float32) for size in grid]
    if interpolate:
        for axis in (1, 2):
            if grid[axis] > 1:  # a grid one patch wide has the single position 0
                axes[axis] = axes[axis] * ((REFERENCE_GRID - 1) / (grid[axis] - 1))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


def rope_table(positions: Tensor, head_dim: int, layout: RopeLayout, base: float = BASE) -> RopeTable:
    """Table for tokens at `positions` [N, 3] (time, row, column)."""
    dim = axis_dim(head_dim)
    if dim == 0:
        raise ValueError(f"head_dim={head_dim} is too small for three rotated axes: use at least 6")
    exponent = torch.arange(dim // 2, device=positions.device, dtype=torch.float32) / (dim / 2)
    omega = base**-exponent  # [dim/2]
    omega = omega.repeat_interleave(2) if layout == "interleaved" else omega.repeat(2)  # [dim]
    angles = (positions.float()[:, :, None] * omega).flatten(1)  # [N, 3 * dim]
    angles = torch.nn.functional.pad(angles, (0, head_dim - 3 * dim))  # angle 0 leaves the rest as it is
    return RopeTable(angles.cos()[:, None], angles.sin()[:, None])


def rotate(x: Tensor, table: RopeTable) -> Tensor:
    """Rotate adjacent pairs of `x` [N, A, head_dim] by the table's angles; the result is fp32."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    quarter_turn = torch.stack((-odd, even), dim=-1).flatten(-2)
    return x * table.cos + quarter_turn * table.sin


@functools.lru_cache(maxsize=32)
def grid_table(
    grid: Grid, head_dim: int, layout: RopeLayout, base: float, interpolate: bool, device: torch.device
) -> RopeTable:
    """Table for all tokens of a grid, kept for the next call with the same arguments."""
    with torch.inference_mode(False), torch.no_grad():
        return rope_table(grid_positions(grid, interpolate=interpolate, device=device), head_dim, layout, base)


@functools.lru_cache(maxsize=32)
def sincos_table(grid: Grid, dim: int, base: float, interpolate: bool, device: torch.device) -> Tensor:
    """Fixed absolute positions of all tokens of a grid, [N, dim] fp32: sines and cosines of time, row and column.

    Each axis has a third of the channels, rounded down to an even number; the rest stays 0. `base` is that
    of the frequencies, `interpolate` scales positions; both as in RoPE.
    """
    with torch.inference_mode(False), torch.no_grad():
        positions = grid_positions(grid, interpolate=interpolate, device=device)  # [N, 3]
        frequencies = dim // 3 // 2
        omega = base ** -(torch.arange(frequencies, device=device, dtype=torch.float32) / max(1, frequencies))
        angles = positions[:, :, None] * omega  # [N, 3, frequencies]
        table = torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(1)
        return torch.nn.functional.pad(table, (0, dim - table.shape[1]))
