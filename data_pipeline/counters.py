"""What a source costs, counted by all worker processes of a rank and read by the training process."""

import os
import threading

import numpy as np

from data_pipeline.worker import worker_number

FIELDS = (
    "records",  # read, whatever from
    "wait_seconds",  # a sample waited for its bytes
    "requests",  # sent, repeated ones included
    "retries",  # requests that repeat one that failed for the moment
    "bytes",  # received over the network
    "rereads",  # records and indices asked for again because their sha256 differed
    "cache_hits",  # records found in the local cache
    "cache_misses",  # records looked for and not found there
    "cache_failures",  # times the cache's disk refused
    "samples",  # delivered
    "bad",  # records that were rejected, each time that they were
    "decode_seconds",  # bytes became frames
    "crop_seconds",  # frames became views
)


class Counters:
    """Sums that several processes add to without locks: each has a row of its own.

    With `workers`, the rows lie in shared memory, so that the counts of a loader's workers (forked or spawned) are
    seen here; without, they are this process's own.
    """

    def __init__(self, workers: int | None = None):
        self._shared = None
        if workers is not None:
            import torch

            self._shared = torch.zeros(workers + 1, len(FIELDS), dtype=torch.float64).share_memory_()
        self._attach()

    def _attach(self) -> None:
        self._rows = np.zeros((1, len(FIELDS))) if self._shared is None else self._shared.numpy()
        self._locks: dict[int, threading.Lock] = {}  # by process: a lock does not survive a fork

    def __getstate__(self) -> dict[str, object]:
        return {"_shared": self._shared}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._attach()

    def add(self, **amounts: float) -> None:
        """Add to fields by name; safe in threads."""
        row = self._rows[self._row()]
        with self._locks.setdefault(os.getpid(), threading.Lock()):
            for name, amount in amounts.items():
                row[FIELDS.index(name)] += amount

    def total(self) -> dict[str, float]:
        """Every field, summed over the processes."""
        return dict(zip(FIELDS, self._rows.sum(0).tolist(), strict=True))

    def _row(self) -> int:
        """0 in the training process, 1 + its number in a worker."""
        number = None if self._shared is None else worker_number()
        return 0 if number is None else min(number + 1, len(self._rows) - 1)
