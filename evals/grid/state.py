"""The state of a fit on the disk: whole or not there, and refused by another fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from evals.whole_files import whole_file

FORMAT_VERSION = 1


class GridStateError(ValueError):
    """A stored state does not belong to this fit, or cannot be read; the message says what to do."""


@dataclass(frozen=True)
class StateFile:
    """Where a fit keeps its state, to go on from it."""

    path: Path
    every: int = 500
    """Steps between two savings; it is saved at the end, too."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every}: must be at least 1")


class Stateful(Protocol):
    """Whatever has a state to keep, and refuses another's with GridStateError."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def write_state(found: Stateful, path: Path) -> None:
    """Write the state beside its place and rename it: a reader finds the old or the new one, whole."""
    try:
        with whole_file(path) as file:
            torch.save(found.state_dict(), file)
    except (OSError, RuntimeError) as error:  # torch's own where the disk is full
        raise OSError(
            f"{path}: the state of the fit cannot be written ({error}): make room there, or name another folder; the "
            "fit goes on from the state before"
        ) from error


def read_state(found: Stateful, path: Path) -> None:
    """Set a grid to a stored state. Raises GridStateError where it is damaged or of another fit.

    It is read to the CPU: a second copy of heads and moments may not fit a GPU, and AdamW's counts of steps belong on
    the CPU, or every update waits for the GPU to tell them.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise GridStateError(f"{path} is no readable state ({error}): delete it to fit anew") from error
    try:
        found.load_state_dict(state)
    except GridStateError as error:
        raise GridStateError(f"{path}: {error}. Delete it, or name another, to fit anew") from error
