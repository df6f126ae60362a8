"""From files to a few numbers each: clips that are the same every time, encoded, boiled down, kept by content.

Files are shared out over the ranks and what they gave is gathered on all of them; memory holds a batch of clips and the
numbers that are kept.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from data_pipeline.decode import DecodeError
from evals.cache import CachedFeatures, Features, Request, open_features, source_identity
from evals.clip_protocol import ClipReader
from evals.features import FeatureSource
from evals.grid import generator
from evals.media import content_digest
from evals.pace import Pace
from evals.pooled_config import ClipReadout, PooledConfig
from vjepa.train.distributed import ALONE, World

log = logging.getLogger(__name__)
T = TypeVar("T")
S = TypeVar("S")


# ----------------------------------------------------------------------------------------------- what is done to clips


@dataclass(frozen=True)
class Change:
    """What is done to a clip [C, T, H, W] before it is encoded; its name says all of it to a cache."""

    name: str
    apply: Callable[[Tensor], Tensor]


def held_still(clip: Tensor) -> Tensor:
    """The middle frame, as often as there are frames: what a clip shows without its motion."""
    middle = clip.shape[1] // 2
    return clip[:, middle : middle + 1].expand_as(clip)


def shuffled(seed: int) -> Change:
    """Frames in an order drawn by the seed, the same for all clips of one length and never their own."""

    def apply(clip: Tensor) -> Tensor:
        frames, drawn = clip.shape[1], generator(seed, "frames")
        if frames < 2:
            raise ValueError(f"clips of {frames} frame cannot be shuffled: set clips.frames")
        order = torch.arange(frames)
        while torch.equal(order, torch.arange(frames)):
            order = torch.randperm(frames, generator=drawn)
        return clip[:, order]

    return Change(f"shuffled by {seed}", apply)


AS_IT_IS = Change("as it is", lambda clip: clip)
STILL = Change("middle frame held", held_still)
BACKWARD = Change("backward", lambda clip: clip.flip(1))
UNCHANGED = (AS_IT_IS,)


# ------------------------------------------------------------------------------------------------- clips boiled down


def pool(tokens: Tensor, readout: ClipReadout) -> Tensor:
    """Tokens [B, t, h, w, D] -> `mean` [B, D]; `mean_std` [B, 2 * D]: and their spread over time, mean over places."""
    mean = tokens.mean(dim=(1, 2, 3))
    if readout == "mean":
        return mean
    return torch.cat([mean, tokens.std(dim=1, correction=0).mean(dim=(1, 2))], dim=1)


@dataclass(frozen=True)
class PooledSource:
    """A source whose clip is one vector [B, 1, 1, 1, D]: a cache then keeps a few kilobytes for each."""

    source: FeatureSource
    readout: ClipReadout

    @property
    def name(self) -> str:
        return self.source.name

    @cached_property
    def identity(self) -> str:
        """See `evals.cache.source_identity`."""
        return f"{self.readout} of {source_identity(self.source)}"

    def tokens(self, clips: Tensor) -> Tensor:
        return pool(self.source.tokens(clips), self.readout)[:, None, None, None]


@dataclass(frozen=True)
class Media:
    """A file whose clips are decoded when one is wanted."""

    path: Path
    content: str
    reader: ClipReader

    @cached_property
    def clips(self) -> Tensor:
        """uint8 [V, S, C, T, H, W]."""
        return self.reader.validate(self.path, ordinal=0)

    def requests(self, changes: Sequence[Change]) -> list[Request]:
        """Of every change, segment and view, in this order."""
        protocol = self.reader.protocol
        return [
            Request(self.content, f"{protocol} {change.name} {segment} {view}", self._read(view, segment, change))
            for change in changes
            for segment in range(protocol.segments)
            for view in range(protocol.views)
        ]

    def _read(self, view: int, segment: int, change: Change) -> Callable[[], Tensor]:
        return lambda: change.apply(self.clips[view, segment])


# ------------------------------------------------------------------------------------------------------- many files


@dataclass(frozen=True)
class FileTable:
    """What was kept of files, in their order; the same on every rank."""

    values: Tensor  # [n, ...]; zeros where a file is damaged
    is_there: Tensor  # bool [n]
    contents: tuple[str, ...]  # digest of each file; "" where it is damaged

    def labelled(self, labels: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Values and labels of the files that are there."""
        return self.values[self.is_there], torch.tensor(labels)[self.is_there]


Keep = Callable[[int, Media, Tensor], Tensor]
"""Number of a file, itself, its tokens [changes, S, V, t, h, w, D] -> what is kept, of one shape for all files."""


def read_files(
    features: Features,
    paths: Sequence[Path],
    keep: Keep,
    config: PooledConfig,
    *,
    skip_damaged: bool = False,
    changes: Sequence[Change] = UNCHANGED,
    world: World = ALONE,
) -> FileTable:
    """What `keep` makes of every file, each rank reading its share.

    Raises DecodeError for a damaged file, or leaves it out with a line in the log; ValueError where none is left.
    """
    mine = range(world.rank, len(paths), world.size)
    kept: dict[int, tuple[str, Tensor]] = {}

    def read_mine() -> None:
        pace = Pace("file", len(mine))
        for number, media, tokens in _encoded(features, paths, mine, config, skip_damaged, changes):
            pace.at(len(kept))
            kept[number] = media.content, keep(number, media, tokens)

    world.on_all(read_mine)
    shapes = [shape for shape in world.gather_objects([list(v.shape) for _, v in kept.values()][:1]) if shape]
    if not shapes:
        raise ValueError(f"none of {len(paths)} files could be decoded, {paths[0]} the first")
    share = -(-len(paths) // world.size)  # of each rank, the last of some being filled up
    values, contents = torch.zeros(share, *shapes[0][0]), [""] * share
    for number, (content, value) in kept.items():
        values[number // world.size], contents[number // world.size] = value, content
    gathered = world.gather_rows(values).unflatten(0, (world.size, share)).transpose(0, 1).flatten(0, 1)
    found = [content for row in zip(*world.gather_objects(contents), strict=True) for content in row][: len(paths)]
    is_there = torch.tensor([bool(content) for content in found])
    if not is_there.all():
        log.warning("%d of %d files are left out; figures are those of the rest", (~is_there).sum(), len(paths))
    return FileTable(gathered[: len(paths)], is_there, tuple(found))


def pooled_table(
    source: FeatureSource,
    paths: Sequence[Path],
    config: PooledConfig,
    readout: ClipReadout,
    *,
    skip_damaged: bool = False,
    changes: Sequence[Change] = UNCHANGED,
    world: World = ALONE,
) -> FileTable:
    """A vector for every file, change and segment, mean over views: values [n, changes, S, D]."""
    features = features_of(PooledSource(source, readout), config, world)
    return read_files(
        features,
        paths,
        lambda _, __, vectors: vectors[:, :, :, 0, 0, 0].float().mean(dim=2),
        config,
        skip_damaged=skip_damaged,
        changes=changes,
        world=world,
    )


def features_of(source: FeatureSource, config: PooledConfig, world: World = ALONE) -> Features:
    """The source's features as the recipe keeps them."""
    cache = config.cache
    return open_features(source, cache.folder, max_gib=cache.max_gib, dtype=cache.dtype, world=world)


def _encoded(
    features: Features,
    paths: Sequence[Path],
    numbers: Sequence[int],
    config: PooledConfig,
    skip_damaged: bool,
    changes: Sequence[Change],
) -> Iterator[tuple[int, Media, Tensor]]:
    """Files one after another with their tokens [changes, S, V, ...]; as many as fit share a pass of the encoder."""
    shape = (len(changes), config.clips.segments, config.clips.views)
    together = max(1, config.batch_clips // (shape[0] * shape[1] * shape[2]))
    reader = ClipReader(config.clips)

    def opened(number: int) -> tuple[int, Media] | None:
        media = Media(paths[number], content_digest(paths[number]), reader)
        try:
            if not _holds(features, media.requests(changes)):
                _ = media.clips  # decoded here, in a thread that reads ahead
        except DecodeError as error:
            if not skip_damaged:
                raise DecodeError(f"{error}. data.skip_damaged=true goes on without such files") from error
            log.warning("%s: left out", error)
            return None
        return number, media

    for group in _groups(_ahead(opened, numbers, config.workers), together):
        requests = [request for _, media in group for request in media.requests(changes)]
        parts = [features(requests[i : i + config.batch_clips]) for i in range(0, len(requests), config.batch_clips)]
        for (number, media), tokens in zip(group, torch.cat(parts).unflatten(0, (-1, *shape)), strict=True):
            yield number, media, tokens


def _holds(features: Features, requests: Iterable[Request]) -> bool:
    return isinstance(features, CachedFeatures) and all(features.cache.holds(features.key(each)) for each in requests)


def _groups(items: Iterable[T | None], size: int) -> Iterator[list[T]]:
    """Items that are there, `size` at a time."""
    group: list[T] = []
    for item in items:
        if item is not None:
            group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _ahead(action: Callable[[T], S], items: Iterable[T], workers: int) -> Iterator[S]:
    """Results in order; with threads a few of them are made ahead, and no more held."""
    if not workers:
        yield from map(action, items)
        return
    with ThreadPoolExecutor(workers) as threads:
        waiting: deque[Future[S]] = deque()
        for item in items:
            waiting.append(threads.submit(action, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
