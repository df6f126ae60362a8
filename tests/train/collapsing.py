"""A level that is made to collapse while the ones behind it stay as they are, in chosen steps of the data."""

import contextlib
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.train.ranks import train_debug
from vjepa.batch import MicroBatch
from vjepa.nn.encoder import Encoder, View
from vjepa.objectives.jepa import JEPA, Result
from vjepa.train.diagnostics import CollapseAlarms


@contextlib.contextmanager
def collapsed(index: int, data_steps: Container[int]) -> Iterator[None]:
    """One constant vector in place of all features of the encoder's level `index`, from 0, target's and encoder's."""
    levels, forward = Encoder.forward_levels, JEPA.forward
    is_on = False

    def noted(self: JEPA, micro_batch: MicroBatch, step: int) -> Result:
        nonlocal is_on
        is_on = next(iter(micro_batch.values())).step in data_steps
        return forward(self, micro_batch, step)

    def constant(self: Encoder, views: Sequence[View]) -> list[list[Tensor]]:
        found = levels(self, views)
        return [[_constant(tokens, index, self.embed_dim) for tokens in view] for view in found] if is_on else found

    JEPA.forward, Encoder.forward_levels = noted, constant
    try:
        yield
    finally:
        JEPA.forward, Encoder.forward_levels = forward, levels


def _constant(tokens: Tensor, index: int, dim: int) -> Tensor:
    vector = torch.randn(dim, generator=torch.Generator().manual_seed(index))
    parts = list(tokens.split(dim, dim=-1))
    parts[index] = 0 * parts[index] + vector  # every parameter keeps its gradient, be it zero
    return torch.cat(parts, dim=-1)


@contextlib.contextmanager
def noted_alarms() -> Iterator[list[tuple[int, dict[str, str]]]]:
    """What this process's alarms say of each row, with its step."""
    observe, found = CollapseAlarms.observe_named, []

    def noted(self: CollapseAlarms, step: int, row: Mapping[str, Any]) -> dict[str, str]:
        alarms = observe(self, step, row)
        found.append((step, alarms))
        return alarms

    CollapseAlarms.observe_named = noted
    try:
        yield found
    finally:
        CollapseAlarms.observe_named = observe


def alarms_of_a_rank(
    run_dir: Path, shards: Path, index: int, data_steps: Container[int], *arguments: str
) -> list[tuple[int, dict[str, str]]]:
    """Train the debug recipe on this rank; the alarms it saw."""
    with collapsed(index, data_steps), noted_alarms() as found:
        train_debug(run_dir, shards, *arguments)
    return found
