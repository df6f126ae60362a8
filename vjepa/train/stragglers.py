"""Which rank keeps the others waiting: seconds per rank, and those that stand out.

A step lasts as long on every rank, because gradients are averaged; what tells ranks apart is what they do alone.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

FIGURES = ("waiting for data", "forward pass")
REMEDIES = (
    "look at that node's storage, CPU load and data.workers",
    "look at that device's clocks, temperature and other users (nvidia-smi -q -d PERFORMANCE), or leave the node out",
)
MOST_PENDING = 64


class StepClock:
    """Seconds of this rank per micro-batch: waiting for data, and in the forward pass.

    On CUDA the forward pass is timed by events that are read once the device has passed them: nothing waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds, self._counts = [0.0, 0.0], [0, 0]
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def waited(self, seconds: float) -> None:
        """Count one wait for a micro-batch."""
        self._add(0, seconds)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around one forward pass."""
        if self.device.type != "cuda":
            begin = time.perf_counter()
            yield
            self._add(1, time.perf_counter() - begin)
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record(torch.cuda.current_stream(self.device))
        yield
        last.record(torch.cuda.current_stream(self.device))
        self._pending.append((first, last))
        if len(self._pending) > MOST_PENDING:
            self._read()

    def drain(self) -> list[float]:
        """Mean seconds of FIGURES since the last call; 0 where nothing was measured."""
        self._read()
        means = [seconds / max(1, count) for seconds, count in zip(self._seconds, self._counts, strict=True)]
        self._seconds, self._counts = [0.0, 0.0], [0, 0]
        return means

    def _add(self, figure: int, seconds: float) -> None:
        self._seconds[figure] += seconds
        self._counts[figure] += 1

    def _read(self) -> None:
        """Take the events that the device has passed; later ones wait for a later call."""
        while self._pending and self._pending[0][1].query():
            first, last = self._pending.popleft()
            self._add(1, first.elapsed_time(last) / 1000)


def stragglers(
    per_rank: Sequence[Sequence[float]], hosts: Sequence[str], ratio: float, *, at_least_s: float = 0.05
) -> list[str]:
    """One line per rank and figure above `ratio` x the median of ranks and more than `at_least_s` above it.

    `per_rank`: one StepClock.drain() per rank. Of an even number of ranks the lower middle one is the median: of two
    ranks the slower is compared with the faster.
    """
    found = []
    for figure, name in enumerate(FIGURES):
        seconds = [figures[figure] for figures in per_rank]
        median = statistics.median_low(seconds)
        for rank, (value, host) in enumerate(zip(seconds, hosts, strict=True)):
            if value > ratio * median and value - median > at_least_s:
                found.append(
                    f"rank {rank} on {host} is slow: {name} takes it {value:.3f} s per micro-batch, the median rank "
                    f"{median:.3f} s: {REMEDIES[figure]}"
                )
    return found
