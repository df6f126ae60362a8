"""A rank's counters as figures for the log: shares of a mixture, bad samples, times a sample, cache hits.

The trainer sums `read()` over ranks and hands the sums back to `figures` and `alarms`; it knows none of the names.
"""

import time
from collections.abc import Mapping

from data_pipeline.config import DataConfig
from data_pipeline.dataset import ClipDataset
from data_pipeline.workers import Events

JUDGED_FROM = 200  # samples of a source before its share of bad records is judged
Sums = Mapping[str, float]


class DataFigures:
    """Reads the counters of the dataset that is `watch`ed; names are `MODALITY/SOURCE/FIGURE`."""

    def __init__(self, config: DataConfig):
        self._workers, self._limit = max(1, config.workers), config.max_bad_fraction
        self._dataset: ClipDataset | None = None
        self._sources: list[tuple[str, str]] = []  # modality and name
        self._events = Events()
        self._started = time.perf_counter()

    def watch(self, dataset: ClipDataset, events: Events | None = None) -> None:
        """Read this dataset, and what happens to its loader's workers, from now on; all begin at zero."""
        self._dataset, self._events, self._started = dataset, events or Events(), time.perf_counter()
        self._sources = [(modality, name) for modality, sources in dataset.counters().items() for name in sources]

    def read(self) -> dict[str, float]:
        """Sums of this rank: every source's counters, and the seconds that its workers have had."""
        if self._dataset is None:
            return {}
        counts = self._dataset.counters()
        sums = {
            f"{modality}/{source}/{name}": value
            for modality, sources in counts.items()
            for source, fields in sources.items()
            for name, value in fields.items()
        }
        events = {"workers_lost": self._events.died + self._events.timed_out, "workers_recycled": self._events.recycled}
        return sums | events | {"worker_seconds": (time.perf_counter() - self._started) * self._workers}

    def figures(self, since: Sums, whole: Sums) -> dict[str, float]:
        """Figures of every source, from sums over ranks since the last row and since the dataset was made."""
        if not whole:
            return {}
        found, busy = {}, 0.0
        mixtures: dict[str, list[float]] = {}
        for modality, source in self._sources:
            mixtures.setdefault(modality, []).append(whole[f"{modality}/{source}/samples"])
        for modality, source in self._sources:
            recent, all_of_it = (_Source(sums, f"{modality}/{source}") for sums in (since, whole))
            figures = all_of_it.shares(mixtures[modality]) | recent.costs() | recent.network()
            found |= {f"{modality}/{source}/{name}": value for name, value in figures.items()}
            busy += recent.seconds
        events = {name: whole[name] for name in ("workers_lost", "workers_recycled")}
        return found | events | {"workers_busy": busy / max(since["worker_seconds"], 1e-9)}

    def alarms(self, whole: Sums) -> dict[str, str]:
        """A line for every source with more bad records than `max_bad_fraction`, which bounds the sum over sources."""
        found = {}
        for modality, source in self._sources if whole else ():
            part = _Source(whole, f"{modality}/{source}")
            if part["samples"] >= JUDGED_FROM and part["bad"] > self._limit * part["samples"]:
                found[part.name] = (
                    f"{modality} source {source}: {part['bad']:.0f} bad records for {part['samples']:.0f} samples "
                    f"({part['bad'] / part['samples']:.1%}), above data.max_bad_fraction={self._limit:.1%}, which only "
                    "the run as a whole is stopped for: see bad_samples.jsonl; ingest this source again or take it out"
                )
        return found


class _Source:
    """One source's part of some sums."""

    def __init__(self, sums: Sums, name: str):
        self.name, self._sums = name, sums

    def __getitem__(self, field: str) -> float:
        return self._sums[f"{self.name}/{field}"]

    @property
    def seconds(self) -> float:
        """Workers' time that went into this source."""
        return self["wait_seconds"] + self["decode_seconds"] + self["crop_seconds"]

    def shares(self, mixture: list[float]) -> dict[str, float]:
        """Bad records for each of its samples and, where `mixture` has several sources' samples, its share of them."""
        samples = self["samples"]
        found = {"bad_share": self["bad"] / samples} if samples else {}
        return found | ({"share": samples / max(1.0, sum(mixture))} if len(mixture) > 1 else {})

    def costs(self) -> dict[str, float]:
        """Milliseconds a sample; none where it gave no sample."""
        samples, records = self["samples"], self["records"]
        if not samples or not records:
            return {}
        return {
            "read_ms": 1000 * self["wait_seconds"] / records,
            "decode_ms": 1000 * self["decode_seconds"] / samples,
            "crop_ms": 1000 * self["crop_seconds"] / samples,
        }

    def network(self) -> dict[str, float]:
        """What only sources behind a network or with a cache have."""
        found = {"retries": self["retries"]} if self["requests"] or self["retries"] else {}
        looked_up = self["cache_hits"] + self["cache_misses"]
        return found | ({"cache_hit_share": self["cache_hits"] / looked_up} if looked_up else {})
