"""From an ordinal to a Sample: the plan says which record, the record is read, decoded and cropped.

A sample is a pure function of (configuration, seed, modality, ordinal): the same on any rank, in any worker, after any
restart. A bad record is replaced by another one that depends on the same things only, and never silently.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from data_pipeline.cache import RecordCache
from data_pipeline.clips import random_view_times
from data_pipeline.config import Backend, ClipConfig, DataConfig
from data_pipeline.counters import Counters
from data_pipeline.decode import DecodeError, choose_backend, frames_at, open_decoder
from data_pipeline.nvdec import choose_device
from data_pipeline.plan import Place, Plan, Source, hash64
from data_pipeline.sample import BadSample, Sample
from data_pipeline.shards import RecordError
from data_pipeline.sources import Records, open_source
from data_pipeline.transforms import make_view

_PRIVATE = {"ext", "offset", "size", "sha256", "shard", "key", "modality"}  # of an index row, not of a sample


class BadDataError(ValueError):
    """Too many records in a row could not be decoded; the message names them."""


@dataclass
class _Modality:
    """One modality, opened: its shards in the order of the plan's sources."""

    clip: ClipConfig
    crops: tuple[ClipConfig, ...]
    names: list[str] = field(default_factory=list)
    shards: list[Records] = field(default_factory=list)

    @classmethod
    def open(cls, modality: str, config: DataConfig, cache: RecordCache | None) -> "_Modality":
        part = config.modalities()[modality]
        opened = cls(part.clip, part.clip.crops())
        for name, source in part.sources.items():
            counters = Counters(config.workers)
            opened.names.append(name)
            opened.shards.append(
                open_source(source.path, modality, remote=config.remote, cache=cache, counters=counters)
            )
        return opened


class ClipDataset(Dataset[dict[str, list[Sample]]]):
    """All modalities of a configuration; indexed by a request `{modality: ordinals}`.

    Raises ValueError where a modality has no sources, a source no samples, or a decoder does not load.
    """

    def __init__(self, config: DataConfig, *, seed: int):
        self.config = config
        self.seed = seed
        self.backend: Backend = _backend(config)
        self.device = choose_device(config.decode_device) if config.video.sources else "cpu"
        self._opened: dict[str, _Modality] = {}
        self.plans: dict[str, Plan] = {}
        cache = RecordCache(config.cache.dir, int(config.cache.max_gb * 1e9)) if config.cache.dir else None
        for modality, part in config.modalities().items():
            opened = _Modality.open(modality, config, cache)
            sizes = [len(shards) for shards in opened.shards]
            weights = [source.weight for source in part.sources.values()]
            for name, size in zip(opened.names, sizes, strict=True):
                if size == 0:
                    path = part.sources[name].path
                    raise ValueError(
                        f"{modality}.sources.{name}: {path} holds no {modality} samples; remove the source"
                    )
            self._opened[modality] = opened
            self.plans[modality] = Plan(seed, list(map(Source, opened.names, sizes, weights)))
        if cache:
            shards = [each for opened in self._opened.values() for each in opened.shards]
            cache.expect(sum(each.total_bytes for each in shards if each.is_remote))

    def __getitem__(self, request: dict[str, range]) -> dict[str, list[Sample]]:
        """The samples of a micro-batch, every modality's in the order of its ordinals."""
        for modality, ordinals in request.items():
            self._read_ahead(modality, ordinals)
        return {
            modality: [self.sample(modality, ordinal) for ordinal in ordinals] for modality, ordinals in request.items()
        }

    def info(self) -> dict[str, dict[str, dict[str, Any]]]:
        """`{modality: {source: {samples, bytes, share, fingerprint}}}`, for the log."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for modality, opened in self._opened.items():
            total = sum(source.weight for source in self.plans[modality].sources)
            found[modality] = {
                source.name: {
                    "samples": len(shards),
                    "bytes": shards.total_bytes,
                    "share": source.weight / total,
                    "fingerprint": shards.fingerprint,
                }
                for source, shards in zip(self.plans[modality].sources, opened.shards, strict=True)
            }
        return found

    def counters(self) -> dict[str, dict[str, dict[str, float]]]:
        """`{modality: {source: {records, wait_seconds, requests, ...}}}`: what reading has cost (see `counters.py`).

        Sums since the dataset was made, over this process and all workers; cheap enough for every step.
        """
        return {
            modality: {name: shards.counters.total() for name, shards in zip(opened.names, opened.shards, strict=True)}
            for modality, opened in self._opened.items()
        }

    def sample(self, modality: str, ordinal: int) -> Sample:
        """The sample at this place of the modality's global order.

        Raises BadDataError when the record and `bad_attempts` substitutes all fail.
        """
        plan, rejected = self.plans[modality], []
        for attempt in range(self.config.bad_attempts + 1):
            place = plan.substitute(ordinal, attempt) if attempt else plan.locate(ordinal)
            try:
                return self._load(modality, ordinal, attempt, place, tuple(rejected))
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

    def _load(self, modality: str, ordinal: int, attempt: int, place: Place, rejected: tuple[BadSample, ...]) -> Sample:
        opened, config = self._opened[modality], self.config
        data, row = opened.shards[place.source].read(place.index, verify=config.verify_bytes)
        generator = np.random.default_rng([self.seed, hash64(modality), ordinal, attempt])
        decoder = open_decoder(
            data,
            modality,
            backend=self.backend,
            max_pixels=config.max_pixels,
            device=self.device,
            isolated=config.decode_isolated,
            timeout=config.decode_timeout,
        )
        times, spans = random_view_times(decoder.info, opened.crops, opened.clip.view_times, generator)
        frames = frames_at(decoder, times)  # [sum of T, C, H0, W0]
        views = tuple(
            make_view(frames[span], crop, generator).cpu() for span, crop in zip(spans, opened.crops, strict=True)
        )
        extra = {name: value for name, value in row.items() if name not in _PRIVATE} | _timestamps(times, spans)
        source = opened.names[place.source]
        return Sample(ordinal, row["key"], source, modality, views, extra, rejected, opened.clip.views)

    def _bad(self, modality: str, ordinal: int, place: Place, reason: str) -> BadSample:
        opened = self._opened[modality]
        key = opened.shards[place.source].row(place.index)["key"]
        return BadSample(ordinal, modality, key, opened.names[place.source], reason)


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
