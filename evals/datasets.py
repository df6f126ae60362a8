"""A labelled set out of our shards: every record once, in order, as it is, with the labels of its metadata.

No crop is random and no clip position either: the same shards always give the same tensors.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.clips import clip_times
from data_pipeline.decode import frames_at, open_decoder
from data_pipeline.shards import Shards
from data_pipeline.transforms import make_eval_view

LabelReader = Callable[[Mapping[str, Any]], Mapping[str, Tensor]]
"""A record's `labels`, as JSON holds them -> its truths by name: int64, [] for the clip or [t, h, w] for its tokens."""


class LabelError(ValueError):
    """A record's labels are missing or do not fit; the message names the record."""


@dataclass(frozen=True)
class LabelledClips:
    """Clips with their truths, in memory."""

    clips: Tensor  # uint8 [N, C, T, H, W]
    labels: Mapping[str, Tensor]  # int64 [N] or [N, t, h, w] each
    keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, values in self.labels.items():
            if len(values) != len(self.clips):
                raise ValueError(f"labels of {name!r}: {len(values)} for {len(self.clips)} clips")

    def __len__(self) -> int:
        return len(self.clips)


def read_labelled(
    path: Path | str,
    read_labels: LabelReader,
    *,
    frames: int | None = None,
    fps: float | None = None,
    size: int | None = None,
    limit: int | None = None,
) -> LabelledClips:
    """All records of a shard folder (the first `limit` of them), in the order of the shards.

    A clip is `frames` frames at `fps` from the middle of its record, its centred square resized to `size`; each of the
    three defaults to what the first record has, so that labels given for every pixel of every frame stay true.

    Raises LabelError for a record without the labels that `read_labels` wants, DecodeError for a damaged one,
    ShardError for a damaged folder, ValueError for one without videos.
    """
    shards = Shards(path, "video")
    count = len(shards) if limit is None else min(limit, len(shards))
    if not count:
        raise ValueError(f"{path} holds no videos to evaluate on")
    clips, labels, keys = [], [], []
    for index in range(count):
        data, row = shards.read(index)
        decoder = open_decoder(data, "video")
        info = decoder.info
        frames, fps, size = frames or info.frames, fps or info.fps, size or min(info.height, info.width)
        times = clip_times(info, frames, fps, position=0.5)
        half_a_frame = 0.5 / info.fps  # the middle of a frame's time, where rounding cannot pick its neighbour
        clips.append(make_eval_view(frames_at(decoder, np.minimum(times + half_a_frame, info.end)), size))
        labels.append(_labels_of(row, read_labels, path))
        keys.append(row["key"])
    shards.close()
    return LabelledClips(torch.stack(clips), _stack(labels, keys), tuple(keys))


def _labels_of(row: Mapping[str, Any], read_labels: LabelReader, path: Path | str) -> Mapping[str, Tensor]:
    """A record's truths; what its labels lack is named together with the record."""
    if not isinstance(row.get("labels"), dict):
        raise LabelError(f"{path}: record {row['key']} has no labels; this is not a labelled set")
    try:
        return read_labels(row["labels"])
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise LabelError(f"{path}: labels of record {row['key']} do not fit this suite: {error!r}") from error


def _stack(labels: list[Mapping[str, Tensor]], keys: list[str]) -> dict[str, Tensor]:
    for key, found in zip(keys, labels, strict=True):
        if found.keys() != labels[0].keys():
            raise LabelError(f"record {key} has labels {sorted(found)}, the first one {sorted(labels[0])}")
    return {name: torch.stack([found[name] for found in labels]) for name in labels[0]}


def token_classes(masks: Tensor, num_classes: int, *, patch_size: int, tubelet_size: int, share: float = 0.2) -> Tensor:
    """The class of each token: masks uint8 [T, H, W] -> int64 [t, h, w].

    The class other than 0 with most of the tubelet's pixels, the higher one of equals, where it has more than `share`
    of them; 0 (background) elsewhere.
    """
    frames, height, width = masks.shape
    if frames % tubelet_size or height % patch_size or width % patch_size:
        raise ValueError(
            f"masks [{frames}, {height}, {width}] do not divide into tubelets of {tubelet_size} frames and patches of "
            f"{patch_size} pixels"
        )
    t, h, w = frames // tubelet_size, height // patch_size, width // patch_size
    tubelets = masks.view(t, tubelet_size, h, patch_size, w, patch_size)
    shares = torch.stack([(tubelets == label).float().mean(dim=(1, 3, 5)) for label in range(num_classes - 1, 0, -1)])
    largest, place = shares.max(dim=0)  # the first of equals: classes run from high to low
    return torch.where(largest > share, num_classes - 1 - place, 0)
