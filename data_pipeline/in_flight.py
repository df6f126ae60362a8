"""What every worker process is doing at this moment, for the one that must say what was lost when it dies or hangs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from data_pipeline.worker import worker_number

_MODALITIES = ("video", "image")


class Attempt(NamedTuple):
    """One try to make a sample: of this ordinal, from the record planned (0) or its n-th substitute."""

    modality: str
    ordinal: int
    number: int


class InFlight:
    """A row of shared memory per worker: the sample being decoded, and the time of the last sign of life.

    A row is written by its worker and read by the training process, without a lock: one that is read while it is
    written names a sample that is a moment old or new, which costs that sample one more try at most.
    """

    def __init__(self, workers: int):
        self._shared = torch.zeros(max(1, workers), 4, dtype=torch.int64).share_memory_()
        self._rows = self._shared.numpy()  # of each worker: modality + 1 or 0, ordinal, attempt, nanoseconds

    def __reduce__(self) -> tuple[object, ...]:
        return InFlight._of, (self._shared,)

    @staticmethod
    def _of(shared: torch.Tensor) -> "InFlight":
        """The same table, in another process."""
        made = InFlight(0)
        made._shared, made._rows = shared, shared.numpy()
        return made

    @contextmanager
    def decoding(self, attempt: Attempt) -> Iterator[None]:
        """Around what a sample's bytes can do harm in; outside it, a death is not the sample's fault."""
        self._say(_MODALITIES.index(attempt.modality) + 1, attempt.ordinal, attempt.number)
        try:
            yield
        finally:
            self.sign_of_life()

    def sign_of_life(self) -> None:
        """The worker is at work, and decodes nothing."""
        self._say(0, 0, 0)

    def of(self, slot: int) -> tuple[Attempt | None, float]:
        """The sample a worker is decoding, if any, and when it began or last said something (`time.monotonic()`)."""
        kind, ordinal, number, since = self._rows[slot].tolist()
        return Attempt(_MODALITIES[kind - 1], ordinal, number) if kind else None, since / 1e9

    def forget(self, slot: int) -> None:
        """Called where a worker was lost: its replacement, which may die before it begins, decodes nothing yet."""
        self._rows[slot] = 0

    def _say(self, kind: int, ordinal: int, number: int) -> None:
        slot = worker_number()
        if slot is not None:
            self._rows[slot] = kind, ordinal, number, time.monotonic_ns()
