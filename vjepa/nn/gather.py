"""Token selection and flat packing, shared by encoder, predictor and losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vjepa.nn.attention import Segments
from vjepa.nn.rope import RopeTable


def take_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """tokens [B, N, D] at indices [B, K] -> [B, K, D]."""
    return tokens.gather(1, indices[:, :, None].expand(-1, -1, tokens.shape[-1]))


def pack(groups: Sequence[Tensor]) -> tuple[Tensor, list[Segments]]:
    """Groups [B_i, K_i, D] -> flat tokens [sum(B_i * K_i), D] and their layout."""
    layout = [Segments(group.shape[0], group.shape[1]) for group in groups]
    flat = torch.cat([group.flatten(0, 1) for group in groups]) if len(groups) > 1 else groups[0].flatten(0, 1)
    return flat, layout


def unpack(flat: Tensor, layout: Sequence[Segments]) -> list[Tensor]:
    """The inverse of `pack`: flat [N, D] -> [B_i, K_i, D] each."""
    parts = flat.split([segments.tokens for segments in layout])
    return [part.unflatten(0, (s.count, s.length)) for part, s in zip(parts, layout, strict=True)]


def gather_table(tables: Sequence[tuple[RopeTable, Tensor | None, int]]) -> RopeTable:
    """Rotary tables of several groups as one: each a grid's table [N, 1, d], token indices [B, K] (None: all) and B."""

    def rows(values: Tensor, indices: Tensor | None, count: int) -> Tensor:
        return values.repeat(count, 1, 1) if indices is None else values[indices.flatten()]

    cos = [rows(table.cos, indices, count) for table, indices, count in tables]
    sin = [rows(table.sin, indices, count) for table, indices, count in tables]
    return RopeTable(torch.cat(cos), torch.cat(sin)) if len(tables) > 1 else RopeTable(cos[0], sin[0])
