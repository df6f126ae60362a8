"""Dropout that two ranks draw as one process does, and all heads of a grid alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evals.grid.draws import generator


@dataclass(frozen=True)
class Place:
    """Which rows of which step's batch a head sees: what noise is a function of."""

    seed: int
    step: int
    first: int
    total: int


class ChannelDropout(nn.Module):
    """Dropout2d of x [B, ..., D]: whole channels of a sample, drawn by (seed, step, row) where a grid says these.

    Two ranks drop what one process drops, and all heads of a grid the same.
    """

    place: Place | None = None

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout={p} must lie in 0 <= p < 1")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        shape = (x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])
        if self.place is None:
            kept = torch.rand(shape, device=x.device) >= self.p
        else:
            drawn = torch.rand(self.place.total, x.shape[-1], generator=generator("dropout", *_when(self.place)))
            rows = drawn[self.place.first : self.place.first + x.shape[0]]
            kept = (rows >= self.p).view(shape).to(x.device)
        return x * (kept / (1 - self.p)).to(x.dtype)


def _when(place: Place) -> tuple[int, int]:
    return place.seed, place.step
