"""What the data cost, over the steps since the last logged one and over all ranks.

This package imports no loader. One that keeps sums hands the trainer a `DataCounters`, which says what they mean; of
one that does not, only the waiting is known.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from vjepa.train.distributed import World

OWN = ("clips", "wait_seconds", "seconds")


class DataCounters(Protocol):
    """A loader's own account of its work."""

    def read(self) -> Mapping[str, float]:
        """This rank's sums since its loader was made, which never fall; names as on all ranks."""
        ...

    def figures(self, since: Mapping[str, float], whole: Mapping[str, float]) -> Mapping[str, float]:
        """What belongs into a row, out of sums over ranks: `since` the last row, `whole` since the loader was made."""
        ...

    def alarms(self, whole: Mapping[str, float]) -> Mapping[str, str]:
        """What people must be told, by names of which each is told once."""
        ...


class DataCounts:
    """Sums of this rank, read by `snapshot` at logged steps; those of all ranks become figures in `row`."""

    def __init__(self, counters: DataCounters | None, world: World) -> None:
        self._counters, self._world = counters, world
        self._told: set[str] = set()
        self.restart()

    def restart(self) -> None:
        """Begin at zero, as a new loader does."""
        self._clips, self._waited, self._started = 0, 0.0, time.perf_counter()
        self._names: Sequence[str] | None = None
        self._last: dict[str, float] = {}

    def add(self, *, clips: int, waited: float) -> None:
        """Count one step of this rank: its clips and the seconds that it waited for them."""
        self._clips += clips
        self._waited += waited

    def snapshot(self) -> dict[str, float]:
        """All sums of this rank, in an order that is the same on all; the first call is collective.

        Raises ValueError, on all ranks, where their loaders count under different names.
        """
        theirs = {} if self._counters is None else self._counters.read()
        if self._names is None:
            self._names = self._agree(sorted(theirs))
        own = dict(zip(OWN, (self._clips, self._waited, time.perf_counter() - self._started), strict=True))
        return own | {f"loader/{name}": float(theirs.get(name, 0.0)) for name in self._names}

    def row(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Figures of the time since the last call, from snapshots summed over ranks."""
        since = {name: value - self._last.get(name, 0.0) for name, value in sums.items()}
        self._last = dict(sums)
        rank_seconds = max(since["seconds"], 1e-9)
        figures = {
            "clips_per_second": since["clips"] * self._world.size / rank_seconds,
            "wait_share": since["wait_seconds"] / rank_seconds,
        }
        if self._counters is not None:
            figures |= self._counters.figures(_of_loader(since), _of_loader(sums))
        return {f"data/{name}": value for name, value in figures.items()}

    def alarms(self) -> list[str]:
        """What the last row gives reason to say, and was not said before."""
        found = {} if self._counters is None else self._counters.alarms(_of_loader(self._last))
        new = [text for name, text in found.items() if name not in self._told]
        self._told |= set(found)
        return new

    def _agree(self, names: list[str]) -> list[str]:
        for rank, theirs in enumerate(self._world.gather_objects(names)):
            if theirs != names:
                differing = sorted(set(names) ^ set(theirs))
                raise ValueError(
                    f"rank {self._world.rank} and rank {rank} count their data under different names "
                    f"({', '.join(differing[:6])}): every rank must read the same sources"
                )
        return names


def _of_loader(sums: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix("loader/"): value for name, value in sums.items() if name.startswith("loader/")}
