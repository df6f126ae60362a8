"""The tokens that heads of attentive probes are trained and scored on: clips decoded ahead, encoded, or out of a cache.

A step's videos are decoded by loader processes where `workers` says so. Clips that are the same every time (held out
and validation; training too with `augmented=false`) have their tokens cached where `cache.folder` is set. A file that
cannot be decoded is an error that names it, or, with `data.skip_damaged`, the next one stands in in training, whatever
the ranks, and it is left out in scoring; either is said in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from data_pipeline.decode import DecodeError
from evals.cache import Features, Request, open_features
from evals.grid import Draws
from evals.media import content_digest
from evals.probe_config import ProbeConfig
from evals.probe_task import ActionClips, Batch, ClassificationTask, FileClips, Part, ProbeTask
from vjepa.train.distributed import ALONE, World

STAND_INS = 10  # files in a row that may be damaged, where they are skipped
T = TypeVar("T")
log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------ damaged files


def readable(read: Callable[[int], T], samples: Sequence[int], *, skip: bool) -> tuple[int, T] | None:
    """The first of these samples that can be read, and what it gave; None where none can.

    Raises DecodeError for a damaged one unless `skip`: then the log says so.
    """
    for sample in samples:
        try:
            return sample, read(sample)
        except DecodeError as error:
            if not skip:
                raise DecodeError(f"{error}. data.skip_damaged=true goes on without such files") from error
            log.warning("%s: skipped", error)
    return None


def stand_ins(sample: int, count: int) -> list[int]:
    """A sample and those that stand in for it: a function of the sample alone."""
    return [(sample + place) % count for place in range(min(STAND_INS, count))]


def collated(items: Sequence[Batch | DecodeError | None]) -> Batch | DecodeError | None:
    """Items that are there as one; an error is passed on: raised in a loader process, it would come as a traceback."""
    if errors := [item for item in items if isinstance(item, DecodeError)]:
        return errors[0]
    there = [item for item in items if item is not None]
    return default_collate(there) if there else None


def raised(batch: Batch | DecodeError | None) -> Batch | None:
    if isinstance(batch, DecodeError):
        raise batch
    return batch


# --------------------------------------------------------------------------------------------------- clips to tokens


@dataclass(frozen=True)
class TrainingClips(Dataset[Batch | DecodeError]):
    """The training set without end: place in the fit's global order -> clip of its sample, of that turn's epoch."""

    data: FileClips | ActionClips
    draws: Draws
    is_augmented: bool
    skip_damaged: bool = False

    def __len__(self) -> int:
        return 2**62  # torch asks; places are given to it

    def __getitem__(self, ordinal: int) -> Batch | DecodeError:
        dataset = replace(self.data, epoch=ordinal // self.draws.count, is_train=self.is_augmented)
        samples = stand_ins(self.draws.sample(ordinal), self.draws.count)
        try:
            found = readable(dataset.__getitem__, samples, skip=self.skip_damaged)
        except DecodeError as error:
            return error
        if found is None:
            return DecodeError(f"{len(samples)} files in a row cannot be decoded, see the lines above")
        middle = len(found[1]["clips"]) // 2  # training sees one view
        return {**found[1], "clips": found[1]["clips"][middle : middle + 1]}


@dataclass(frozen=True)
class ScoredClips(Dataset[Batch | DecodeError | None]):
    """Some samples of a part; None for those that are left out."""

    data: FileClips | ActionClips
    samples: Sequence[int]
    skip_damaged: bool

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: int) -> Batch | DecodeError | None:
        try:
            found = readable(self.data.__getitem__, self.samples[place : place + 1], skip=self.skip_damaged)
        except DecodeError as error:
            return error
        return None if found is None else found[1]


@dataclass(frozen=True)
class Order:
    """This rank's places in each of these steps, made when they are wanted: for IN1K all at once are a GiB."""

    draws: Draws
    steps: range
    world: World

    def __iter__(self) -> Iterator[list[int]]:
        return (list(self.draws.ordinals(step, self.world)) for step in self.steps)


class TrainingTokens:
    """Step -> tokens and labels of this rank's part of its batch, the next ones being decoded in the meantime.

    Steps come in order.
    """

    def __init__(self, task: ProbeTask, clips: TrainingClips, steps: int, workers: int, world: World) -> None:
        self.task, self.clips, self.steps, self.workers, self.world = task, clips, steps, workers, world
        self._next, self._batches = -1, iter(())

    def __call__(self, step: int) -> tuple[Tensor, Any]:
        if step != self._next:  # the first, or the one at which a stopped fit goes on
            order = Order(self.clips.draws, range(step, self.steps), self.world)
            loader = DataLoader(self.clips, batch_sampler=order, num_workers=self.workers, collate_fn=collated)
            self._batches = iter(loader)
        self._next = step + 1
        batch = raised(next(self._batches))
        assert batch is not None  # something stands in for what is skipped
        return self.task.tokens(batch), batch["labels"]


@dataclass(frozen=True)
class CachedClips:
    """Tokens of clips that are the same every time, kept on the disk: decoded and encoded once for all epochs."""

    data: FileClips
    features: Features
    contents: dict[Path, str] = field(default_factory=dict, repr=False)
    """Digests of files: each is read for its own once, not in every epoch."""

    def tokens(self, sample: int, *, middle: bool = False) -> Tensor:
        """[V, S * N, D], or of the middle view alone [1, S * N, D]."""
        protocol = self.data.reader.protocol
        path, item = self.data.index.paths[sample], _Decoded(self.data, sample)
        if path not in self.contents:
            self.contents[path] = content_digest(path)
        views = [protocol.views // 2] if middle else range(protocol.views)
        about = f"{replace(protocol, augment=type(protocol.augment)())}"  # nothing is augmented
        requests = [
            Request(self.contents[path], f"{about} view {view} segment {segment}", item.reader(view, segment))
            for view in views
            for segment in range(protocol.segments)
        ]
        tokens = self.features(requests).flatten(1, 3)  # [V * S, N, D]
        return tokens.unflatten(0, (len(views), -1)).flatten(1, 2).float()

    def labels(self, sample: int) -> int:
        return self.data.index.labels[sample]


@dataclass
class _Decoded:
    """One video, decoded when the first of its clips is wanted."""

    data: FileClips
    sample: int

    @cached_property
    def clips(self) -> Tensor:
        return self.data[self.sample]["clips"]

    def reader(self, view: int, segment: int) -> Any:
        return lambda: self.clips[view, segment]


@dataclass(frozen=True)
class Tokens:
    """Where the tokens of each part come from."""

    task: ProbeTask
    config: ProbeConfig
    features: Features | None = None
    """A cache; None: everything is computed when it is wanted."""
    world: World = ALONE
    _contents: dict[Path, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, task: ProbeTask, config: ProbeConfig, world: World = ALONE) -> Tokens:
        if config.cache.folder is None:
            return cls(task, config, None, world)
        assert isinstance(task, ClassificationTask)  # ProbeConfig refuses a cache for anticipation
        cache = config.cache
        features = open_features(task.source, cache.folder, max_gib=cache.max_gib, dtype=cache.dtype, world=world)
        return cls(task, config, features, world)

    def training(self, steps: int) -> Any:
        """Step -> tokens [B, S * N, D] and labels."""
        data = cast(FileClips | ActionClips, self.task.dataset("train"))
        draws = Draws(len(data), self.config.schedule.batch_size, self.config.seed)
        if self.features is not None and not self.config.augmented:
            return self._cached_training(draws)
        clips = TrainingClips(data, draws, self.config.augmented, self.config.data.skip_damaged)
        return TrainingTokens(self.task, clips, steps, self.config.workers, self.world)

    def _cached_training(self, draws: Draws) -> Any:
        assert self.features is not None
        data = replace(cast(FileClips, self.task.dataset("train")), is_train=False)
        clips = CachedClips(data, self.features, self._contents)

        def read(sample: int) -> Tensor:
            return clips.tokens(sample, middle=True)

        def at(step: int) -> tuple[Tensor, Tensor]:
            samples = [stand_ins(draws.sample(ordinal), draws.count) for ordinal in draws.ordinals(step, self.world)]
            found = [readable(read, each, skip=self.config.data.skip_damaged) for each in samples]
            there = [each for each in found if each is not None]
            if len(there) < len(found):
                raise DecodeError(f"{len(samples[0])} files in a row cannot be decoded, see the lines above")
            return torch.cat([tokens for _, tokens in there]), torch.tensor([clips.labels(s) for s, _ in there])

        return at

    def scored(self, part: Part) -> Iterator[tuple[Tensor, Any]]:
        """Tokens [B * V, S * N, D] and labels of this rank's share of a part, in order."""
        data, size = cast(FileClips | ActionClips, self.task.dataset(part)), self.config.score_batch
        mine, skip = range(self.world.rank, self.task.size(part), self.world.size), self.config.data.skip_damaged
        if self.features is None:
            clips = ScoredClips(data, mine, skip)
            for batch in DataLoader(clips, batch_size=size, num_workers=self.config.workers, collate_fn=collated):
                if (there := raised(batch)) is not None:
                    yield self.task.tokens(there), there["labels"]
            return
        cached = CachedClips(cast(FileClips, data), self.features, self._contents)
        for first in range(0, len(mine), size):
            found = [readable(cached.tokens, [sample], skip=skip) for sample in mine[first : first + size]]
            if there := [each for each in found if each is not None]:
                labels = torch.tensor([cached.labels(sample) for sample, _ in there])
                yield torch.cat([tokens for _, tokens in there]), labels
