"""What heads score on a set, and which of them is best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from evals.grid.fit import on_device
from evals.pace import Pace
from vjepa.train.distributed import ALONE, World

MAX_OVER_HEADS = "max_over_heads"  # ends the name of the papers' number, whose head is chosen on what it is scored on


class Meter(Protocol):
    """A metric that is accumulated over a set."""

    def update(self, outputs: Any, labels: Any, /) -> object: ...
    def reduce(self, world: World) -> object:
        """Add up what the ranks have seen."""
        ...


M = TypeVar("M", bound=Meter)


@torch.no_grad()
def score_heads(
    heads: Sequence[nn.Module],
    batches: Iterable[tuple[Any, Any]],
    make_meter: Callable[[], M],
    *,
    predict: Callable[[nn.Module, Any], Any] | None = None,
    world: World = ALONE,
) -> list[M]:
    """A meter for each head over this rank's batches of a set, added up over the ranks; features are read once.

    `predict` makes what the meter sees of a head and a batch's features; by default the head's own outputs.
    """
    meters = [make_meter() for _ in heads]
    for head in heads:
        head.eval()
    pace = Pace("scored batch")
    for number, (features, labels) in enumerate(batches, start=1):
        pace.at(number)
        features, labels = (on_device(value, world.device) for value in (features, labels))
        for head, meter in zip(heads, meters, strict=True):
            outputs = head(features) if predict is None else predict(head, features)
            meter.update(outputs, labels)
    for meter in meters:
        meter.reduce(world)
    return meters


@dataclass(frozen=True)
class Choice:
    """The head of a grid that is reported, and beside it the papers' number."""

    index: int
    """Of the head that is best on held-out training data."""
    value: float
    """Its value on the validation set."""
    max_index: int
    """Of the head that is best on the validation set itself."""
    max_over_heads: float
    """The value there: what the papers report, optimistic by the choice (evaluation.md 1.1)."""


def choose(held_out: Sequence[float], validation: Sequence[float], *, higher_is_better: bool = True) -> Choice:
    """The head that held-out training data prefer, and the maximum over heads on the validation set.

    Of equals the first; what is not finite is worse than everything.
    """
    if len(held_out) != len(validation) or not held_out:
        raise ValueError(f"{len(held_out)} held-out and {len(validation)} validation values: one of each per head")
    index, best = _best(held_out, higher_is_better), _best(validation, higher_is_better)
    return Choice(index, validation[index], best, validation[best])


def _best(values: Sequence[float], higher_is_better: bool) -> int:
    def worth(value: float) -> float:
        return -math.inf if not math.isfinite(value) else value if higher_is_better else -value

    return max(range(len(values)), key=lambda index: worth(values[index]))
