"""Suites by name: which questions are put to which labelled set, and how its labels are read.

Tasks are written down here, readout and metric included, before any result is looked at, and all of them are printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from data_pipeline.shards import unpack_masks
from evals.datasets import LabelReader, token_classes
from evals.protocol import Focus, Task

STATIC, MOVING = 1, 2  # values of a digits mask; 0 is the background


class GridLabelReader(Protocol):
    """A label reader that has yet to be told how the model cuts clips into tokens."""

    def __call__(self, labels: Mapping[str, Any], *, patch_size: int, tubelet_size: int) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class Suite:
    """Tasks on one labelled set, which is a folder with a shard folder for each split."""

    name: str
    tasks: tuple[Task, ...]
    read_labels: GridLabelReader
    train_split: str = "probe_train"
    test_split: str = "test"

    def label_reader(self, *, patch_size: int, tubelet_size: int) -> LabelReader:
        return partial(self.read_labels, patch_size=patch_size, tubelet_size=tubelet_size)


def digits_labels(labels: Mapping[str, Any], *, patch_size: int, tubelet_size: int) -> dict[str, Tensor]:
    """Truths of a clip with one moving and one static digit (`data_pipeline/README.md` describes the labels)."""
    masks = torch.from_numpy(unpack_masks(labels["masks"]))
    direction = torch.tensor(int(labels["direction"]))
    layout = token_classes(masks, 3, patch_size=patch_size, tubelet_size=tubelet_size)  # [t, h, w]
    return {
        "direction": direction,
        "digit": torch.tensor(int(labels["moving_digit"])),
        "layout": layout,
        "object": (layout > 0).long(),
        "token_direction": torch.where(layout == MOVING, 1 + direction, 0),
    }


DIRECTIONS = ("right", "down", "left", "up")
DIGITS = tuple("0123456789")


def _clip_tasks(name: str, label: str, classes: tuple[str, ...]) -> tuple[Task, ...]:
    """The same question by the three probes of clips."""
    return (
        Task(name, "classification", label, classes, "mean"),
        Task(f"{name}_msm", "classification", label, classes, "msm"),
        Task(f"{name}_knn", "knn", label, classes, "mean"),
    )


def _digits_tasks(prefix: str = "") -> tuple[Task, ...]:
    """All questions about a set of labelled digits; names begin with `prefix`."""
    return (
        *_clip_tasks(f"{prefix}motion", "direction", DIRECTIONS),
        Task(
            f"{prefix}segmentation",
            "segmentation",
            "layout",
            ("background", "static", "moving"),
            "tokens",
            per_class=True,
        ),
        Task(
            f"{prefix}direction_segmentation",
            "segmentation",
            "token_direction",
            ("rest", *DIRECTIONS),
            "tokens",
            focus=Focus("moving", DIRECTIONS),
        ),
        Task(
            f"{prefix}object_segmentation",
            "segmentation",
            "object",
            ("background", "object"),
            "tokens",
            per_class=True,
        ),
        *_clip_tasks(f"{prefix}class", "digit", DIGITS),
    )


MOTION = Suite("motion", tasks=_digits_tasks(), read_labels=digits_labels)
FINE_MOTION = Suite("fine_motion", tasks=_digits_tasks("fine_"), read_labels=digits_labels)
"""The same of clips of more pixels and frames, such as a cooldown trains on."""

SUITES = {suite.name: suite for suite in (MOTION, FINE_MOTION)}
