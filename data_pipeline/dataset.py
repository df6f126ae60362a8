"""From an ordinal to a Sample: the plan says which record, the record is read, decoded and cropped.

A sample is a pure function of (configuration, seed, modality, ordinal): the same on any rank, in any worker, after any
restart. A bad record is replaced by another one that depends on the same things only, and never silently.
"""

import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from torch import Tensor

from data_pipeline.cache import RecordCache
from data_pipeline.clips import random_view_times
from data_pipeline.config import Backend, ClipConfig, DataConfig
from data_pipeline.counters import Counters
from data_pipeline.crop_later import cut_view
from data_pipeline.decode import DecodeError, choose_backend, frames_at, open_decoder
from data_pipeline.in_flight import Attempt, InFlight
from data_pipeline.nvdec import choose_device
from data_pipeline.plan import Place, Plan, Source, hash64
from data_pipeline.sample import BadSample, Sample
from data_pipeline.shards import RecordError
from data_pipeline.sources import Records, open_source
from data_pipeline.stream import Stream
from data_pipeline.transforms import make_view

log = logging.getLogger(__name__)
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_PRIVATE = {"ext", "offset", "size", "sha256", "shard", "key", "modality"}  # of an index row, not of a sample


class BadDataError(ValueError):
    """Too many records in a row could not be decoded; the message names them."""


@dataclass
class _Modality:
    """One modality, opened: its shards in the order of the plan's sources."""

    clip: ClipConfig
    crops: list[tuple[ClipConfig, ...]] = field(default_factory=list)  # of each source
    names: list[str] = field(default_factory=list)
    shards: list[Records] = field(default_factory=list)

    @classmethod
    def open(cls, modality: str, config: DataConfig, cache: RecordCache | None, seed: int) -> "_Modality":
        part = config.modalities()[modality]
        opened = cls(part.clip)
        for name, source in part.sources.items():
            counters = Counters(config.workers)
            opened.names.append(name)
            opened.crops.append(part.clip_of(name).crops())
            key = hash64(seed, modality, name)
            opened.shards.append(
                open_source(
                    source.path,
                    modality,
                    remote=config.remote,
                    cache=cache,
                    counters=counters,
                    stream=source.stream,
                    stream_key=key,
                )
            )
            if isinstance(opened.shards[-1], Stream):
                log.warning(
                    "source %s is a webdataset stream: resume is statistical, not exact: records may repeat or be "
                    "missed",
                    name,
                )
        return opened


class ClipDataset:
    """All modalities of a configuration: `micro_batch` of a request `{modality: ordinals}`, or one `sample`.

    Raises ValueError where a modality has no sources, a source no samples, or a decoder does not load.
    """

    def __init__(self, config: DataConfig, *, seed: int):
        self.config = config
        self.seed = seed
        self.backend: Backend = _backend(config)
        self.device = choose_device(config.decode_device) if config.video.sources else "cpu"
        self.in_flight = InFlight(config.workers)
        self._opened: dict[str, _Modality] = {}
        self.plans: dict[str, Plan] = {}
        cache = RecordCache(config.cache.dir, int(config.cache.max_gb * 1e9)) if config.cache.dir else None
        for modality, part in config.modalities().items():
            opened = _Modality.open(modality, config, cache, seed)
            sizes = [len(shards) for shards in opened.shards]
            weights = [source.weight for source in part.sources.values()]
            for name, size in zip(opened.names, sizes, strict=True):
                if size == 0:
                    path = part.sources[name].path
                    raise ValueError(
                        f"{modality}.sources.{name}: {path} holds no {modality} samples; remove the source"
                    )
            self._opened[modality] = opened
            self.plans[modality] = Plan(seed, list(map(Source, opened.names, sizes, weights)), part.order)
        if cache:
            shards = [each for opened in self._opened.values() for each in opened.shards]
            cache.expect(sum(each.total_bytes for each in shards if each.is_remote))

    def micro_batch(
        self, request: dict[str, range], lost: Mapping[Attempt, str] | None = None
    ) -> dict[str, list[Sample]]:
        """The samples of a request, every modality's in the order of its ordinals.

        `lost` are attempts that are known to cost a process: they are not made, and count as bad for the reason given.
        """
        for modality, ordinals in request.items():
            self._read_ahead(modality, ordinals)
        return {
            modality: [self.sample(modality, ordinal, lost) for ordinal in ordinals]
            for modality, ordinals in request.items()
        }

    def info(self) -> dict[str, dict[str, dict[str, Any]]]:
        """`{modality: {source: {samples, bytes, share, fingerprint, exact}}}`, for the log.

        A source that is not `exact` is a stream: its `samples` are nominal, and a resume does not go on where it was.
        """
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for modality, opened in self._opened.items():
            total = sum(source.weight for source in self.plans[modality].sources)
            found[modality] = {
                source.name: {
                    "samples": len(shards),
                    "bytes": shards.total_bytes,
                    "share": source.weight / total,
                    "fingerprint": shards.fingerprint,
                    "exact": not isinstance(shards, Stream),
                }
                for source, shards in zip(self.plans[modality].sources, opened.shards, strict=True)
            }
        return found

    def identity(self) -> dict[str, dict[str, str]]:
        """`{modality: {what: how}}`: all that decides the pixels of an ordinal, in words that can be compared.

        Where shards lie, workers and caches are not in it. A time-out may replace a record all the same: compare the
        sample's key, and how many were rejected for it.
        """
        config, found = self.config, {}
        shared = {
            "seed": str(self.seed),
            "resized on": config.augment_on,
            "bad samples": f"above {config.max_pixels} pixels, bytes verified: {config.verify_bytes}, "
            f"{config.bad_attempts} attempts",
        }
        for modality, sources in self.info().items():
            part = config.modalities()[modality]
            found[modality] = shared | {"order": f"{part.order} of {', '.join(sources)}"}
            if modality == "video":
                found[modality]["decoder"] = f"{self.backend} on {config.decode_device}"
            for name, told in sources.items():
                weight = part.sources[name].weight
                records = f"weight {weight:g}, {told['samples']} samples, {told['bytes']} bytes, {told['fingerprint']}"
                found[modality] |= {f"records of {name}": records, f"clips of {name}": str(part.clip_of(name))}
        return found

    def counters(self) -> dict[str, dict[str, dict[str, float]]]:
        """`{modality: {source: {records, wait_seconds, samples, ...}}}`: what the data have cost (see `counters.py`).

        Sums since the dataset was made, over this process and all workers; cheap enough for every step.
        """
        return {
            modality: {name: shards.counters.total() for name, shards in zip(opened.names, opened.shards, strict=True)}
            for modality, opened in self._opened.items()
        }

    def sample(self, modality: str, ordinal: int, lost: Mapping[Attempt, str] | None = None) -> Sample:
        """The sample at this place of the modality's global order.

        Raises BadDataError when the record and `bad_attempts` substitutes all fail.
        """
        rejected: list[BadSample] = []
        for number in range(self.config.bad_attempts + 1):
            attempt = Attempt(modality, ordinal, number)
            place = self._place(attempt)
            try:
                if lost and attempt in lost:
                    raise DecodeError(lost[attempt])
                return self._load(attempt, place, tuple(rejected))
            except (DecodeError, RecordError) as error:
                rejected.append(self._bad(modality, ordinal, place, str(error)))
        tried = "; ".join(f"{bad.source}/{bad.key}: {bad.reason}" for bad in rejected)
        raise BadDataError(
            f"{modality} ordinal {ordinal}: {len(rejected)} records in a row are bad ({tried}). "
            "Check the shards' disk and ingest again; bad_attempts sets how many are tried"
        )

    def _read_ahead(self, modality: str, ordinals: range) -> None:
        """Let sources behind a network fetch a micro-batch's records at once, while the first are decoded."""
        shards = self._opened[modality].shards
        if any(each.is_remote for each in shards):
            places = [self.plans[modality].locate(ordinal) for ordinal in ordinals]
            for source, each in enumerate(shards):
                each.read_ahead([place.index for place in places if place.source == source])

    def name(self, attempt: Attempt) -> str:
        """`source/key` of the record that an attempt reads."""
        place, opened = self._place(attempt), self._opened[attempt.modality]
        return f"{opened.names[place.source]}/{opened.shards[place.source].row(place.index)['key']}"

    def _place(self, attempt: Attempt) -> Place:
        plan = self.plans[attempt.modality]
        return plan.substitute(attempt.ordinal, attempt.number) if attempt.number else plan.locate(attempt.ordinal)

    def _load(self, attempt: Attempt, place: Place, rejected: tuple[BadSample, ...]) -> Sample:
        opened = self._opened[attempt.modality]
        data, row = opened.shards[place.source].read(place.index, verify=self.config.verify_bytes)
        with self.in_flight.decoding(attempt):
            views, timestamps = self._views(attempt, place, data)
        extra = {name: value for name, value in row.items() if name not in _PRIVATE} | timestamps
        source, modality = opened.names[place.source], attempt.modality
        return Sample(attempt.ordinal, row["key"], source, modality, views, extra, rejected, opened.clip.views)

    def _views(self, attempt: Attempt, place: Place, data: bytes) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """A record's views and their times, drawn for this attempt."""
        modality, ordinal, number = attempt
        opened, config = self._opened[modality], self.config
        crops = opened.crops[place.source]
        generator = np.random.default_rng([self.seed, hash64(modality), ordinal, number])
        started = time.perf_counter()
        decoder = open_decoder(
            data,
            modality,
            backend=self.backend,
            max_pixels=config.max_pixels,
            device=self.device,
            isolated=config.decode_isolated,
            timeout=config.isolated_timeout,
        )
        times, spans = random_view_times(decoder.info, crops, opened.clip.view_times, generator)
        frames = frames_at(decoder, times)  # [sum of T, C, H0, W0]
        decoded = time.perf_counter()
        make = _made_view if config.augment_on == "worker" else cut_view
        views = tuple(make(frames[span], crop, generator) for span, crop in zip(spans, crops, strict=True))
        spent = {"decode_seconds": decoded - started, "crop_seconds": time.perf_counter() - decoded}
        opened.shards[place.source].counters.add(samples=1, **spent)
        return cast(tuple[Tensor, ...], views), _timestamps(times, spans)  # or what becomes a tensor on the device

    def _bad(self, modality: str, ordinal: int, place: Place, reason: str) -> BadSample:
        opened = self._opened[modality]
        opened.shards[place.source].counters.add(bad=1)
        key = opened.shards[place.source].row(place.index)["key"]
        reason = _ADDRESS.sub("", reason)  # pillow names an object in memory: the same failure must read the same
        return BadSample(ordinal, modality, key, opened.names[place.source], reason)


def _made_view(frames: Tensor, config: ClipConfig, generator: np.random.Generator) -> Tensor:
    """A view in the host's memory, wherever the frames were decoded."""
    return make_view(frames, config, generator).cpu()


def _backend(config: DataConfig) -> Backend:
    """The decoder of this run; a GPU is torchcodec's alone."""
    if not config.video.sources:
        return config.decoder
    return choose_backend("torchcodec" if config.decode_device == "cuda" else config.decoder)


def _timestamps(times: np.ndarray, spans: list[slice]) -> dict[str, Any]:
    """The first view's times, and those of all where they are not the same."""
    differ = any(span != spans[0] for span in spans)
    each = {"view_timestamps": tuple(times[span] for span in spans)} if differ else {}
    return {"timestamps": times[spans[0]], **each}
