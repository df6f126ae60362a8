"""J and F of video object segmentation, as the official DAVIS evaluation defines them (reference evaluation.md 1.5).

J is the overlap of two masks, F how well their outlines agree. Both are measured for each object in each frame and then
averaged: over the frames of an object, and over objects, not over sequences. numpy alone; no image is dilated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

BOUNDARY_TOLERANCE = 0.008  # of the image's diagonal, rounded up: 8 pixels at 480x854
NUM_PARTS = 4  # decay compares the first and the last quarter of the frames

Protocol = Literal["davis", "youtube_vos"]
"""Which frames count: all but a sequence's first and last, or those after the one that an object enters in."""


# ------------------------------------------------------------------------------------------ one object, one frame


def region_similarity(predicted: np.ndarray, truth: np.ndarray) -> float:
    """J: intersection over union of two masks, bool [H, W]; 1 where both are empty."""
    union = np.count_nonzero(predicted | truth)
    return np.count_nonzero(predicted & truth) / union if union else 1.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """The outline of a mask, bool [H, W]: pixels that differ from their neighbour to the right, below, or both.

    What lies outside the image is taken to continue its border, so an object that is cut off has no outline there.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])


def boundary_measure(predicted: np.ndarray, truth: np.ndarray) -> float:
    """F: harmonic mean of precision and recall of outlines of masks, bool [H, W], matched within the tolerance.

    A pixel of one outline is matched where the other one comes as near as ceil(0.008 x diagonal) pixels. Two masks
    without an outline agree (1); with one of them F is 0.
    """
    radius = math.ceil(BOUNDARY_TOLERANCE * math.hypot(*truth.shape))
    ours, theirs = _outline(predicted), _outline(truth)
    if not len(ours) and not len(theirs):
        return 1.0
    if not len(ours) or not len(theirs):
        return 0.0
    precision, recall = _share_near(ours, theirs, radius), _share_near(theirs, ours, radius)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _outline(mask: np.ndarray) -> np.ndarray:
    """Rows and columns of the outline's pixels, int [N, 2]; only the part of the image with the object is looked at."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return np.empty((0, 2), dtype=np.int64)
    top, left = max(rows[0] - 1, 0), max(columns[0] - 1, 0)  # a pixel above and left of the object belongs to it
    part = mask[top : rows[-1] + 2, left : columns[-1] + 2]
    return np.argwhere(boundary(part)) + np.array((top, left))


def _share_near(points: np.ndarray, others: np.ndarray, radius: int) -> float:
    """Share of points [N, 2] with one of the others [M, 2] within the radius: these stamp disks on an empty plane."""
    low = np.minimum(points.min(axis=0), others.min(axis=0)) - radius
    height, width = np.maximum(points.max(axis=0), others.max(axis=0)) + radius + 1 - low
    plane = np.zeros(height * width, dtype=bool)
    disk = _disk(radius) @ (width, 1)
    plane[((others - low) @ (width, 1))[:, None] + disk] = True
    return float(plane[(points - low) @ (width, 1)].mean())


@lru_cache
def _disk(radius: int) -> np.ndarray:
    """Offsets [K, 2] of the pixels within the radius."""
    axis = np.arange(-radius, radius + 1)
    rows, columns = np.meshgrid(axis, axis, indexing="ij")
    inside = rows**2 + columns**2 <= radius**2
    return np.stack([rows[inside], columns[inside]], axis=1)


# ------------------------------------------------------------------------------------------- over frames, objects


@dataclass(frozen=True)
class Statistics:
    """A measure over the frames of an object."""

    mean: float
    recall: float  # share of frames above 0.5
    decay: float  # mean of the first quarter minus mean of the last

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistics:
        """Of the values of at least one frame; neighbouring quarters share a frame, as in the official code."""
        frames = np.asarray(values, dtype=np.float64)
        ends = np.round(np.linspace(1, len(frames), NUM_PARTS + 1) + 1e-10).astype(int) - 1
        first, last = frames[ends[0] : ends[1] + 1], frames[ends[-2] : ends[-1] + 1]
        return cls(frames.mean().item(), (frames > 0.5).mean().item(), (first.mean() - last.mean()).item())


@dataclass(frozen=True)
class ObjectScore:
    """How well one object of a sequence was followed."""

    sequence: str
    object_id: int
    region: Statistics  # J
    boundary: Statistics  # F
    num_frames: int

    @property
    def j_and_f(self) -> float:
        return (self.region.mean + self.boundary.mean) / 2


class SequenceScorer:
    """J and F of the objects of one sequence, frame after frame, so that no more than a frame is in memory.

    Objects are those of `object_ids`; one that enters late is absent from earlier true masks. With a single object
    every predicted id is taken for it (DAVIS-2016 merges the objects of its sequences), with several the ids must agree
    and one that is nobody's is refused, as in the official code.
    `protocol` says which of the frames count; `davis` must be told of the last one by `num_frames`.
    """

    def __init__(
        self,
        sequence: str,
        object_ids: Sequence[int],
        num_frames: int,
        *,
        protocol: Protocol = "davis",
        void: int | None = None,
    ) -> None:
        if not object_ids:
            raise ValueError(f"sequence {sequence}: the true masks hold no object, there is nothing to score")
        if protocol == "davis" and num_frames < 3:
            raise ValueError(
                f"sequence {sequence}: {num_frames} frames; the first and the last are not scored, so 3 are needed"
            )
        self.sequence, self.object_ids, self.num_frames = sequence, tuple(object_ids), num_frames
        self.protocol, self.void = protocol, void
        self._values: dict[int, list[tuple[float, float]]] = {each: [] for each in object_ids}
        self._entered: set[int] = set()

    def is_scored(self, index: int) -> bool:
        """Whether the 0-based frame can count, so that a prediction of it is needed."""
        return 0 < index < self.num_frames - (self.protocol == "davis")

    def add(self, index: int, truth: np.ndarray, predicted: np.ndarray | None) -> None:
        """The masks of the next frame, ids as integers [H, W]; the prediction may be None where none is needed."""
        if self.is_scored(index):
            assert predicted is not None, "is_scored() tells the caller which frames need a prediction"
            self._check(index, truth, predicted)
            known = truth != self.void if self.void is not None else np.True_
            for each in self.object_ids:
                if self.protocol == "davis" or each in self._entered:
                    guess = (predicted != 0 if len(self.object_ids) == 1 else predicted == each) & known
                    true = truth == each
                    self._values[each].append((region_similarity(guess, true), boundary_measure(guess, true)))
        self._entered |= set(np.unique(truth).tolist())

    def _check(self, index: int, truth: np.ndarray, predicted: np.ndarray) -> None:
        if predicted.shape != truth.shape:
            raise ValueError(
                f"sequence {self.sequence}, frame {index}: the prediction is {_size(predicted)}, the true mask "
                f"{_size(truth)}; resize predictions to the original size (nearest) before they are saved"
            )
        strange = set(np.unique(predicted).tolist()) - {0, self.void, *self.object_ids}
        if strange and len(self.object_ids) > 1:
            raise ValueError(
                f"sequence {self.sequence}, frame {index}: the prediction holds ids {sorted(strange)}, the true masks "
                f"{list(self.object_ids)}; predictions must use the ids of the first true mask"
            )

    def scores(self) -> list[ObjectScore]:
        """One for every object that a frame counts for."""
        found = []
        for each, values in self._values.items():
            if values:
                region, outline = (Statistics.of(column) for column in zip(*values, strict=True))
                found.append(ObjectScore(self.sequence, each, region, outline, len(values)))
        return found


def _size(mask: np.ndarray) -> str:
    return "x".join(map(str, mask.shape))


def mean_scores(objects: Iterable[ObjectScore]) -> dict[str, float]:
    """The mean over objects: J, F, J&F, recalls JR and FR, decays JD and FD."""
    objects = list(objects)
    if not objects:
        raise ValueError("there is no object to take the mean over")
    columns = {
        "J": [each.region.mean for each in objects],
        "F": [each.boundary.mean for each in objects],
        "J&F": [each.j_and_f for each in objects],
        "JR": [each.region.recall for each in objects],
        "JD": [each.region.decay for each in objects],
        "FR": [each.boundary.recall for each in objects],
        "FD": [each.boundary.decay for each in objects],
    }
    return {name: math.fsum(values) / len(values) for name, values in columns.items()}


def youtube_vos_means(objects: Iterable[ObjectScore], is_seen: Mapping[tuple[str, int], bool]) -> dict[str, float]:
    """YouTube-VOS: J and F of objects of categories seen in training and of unseen ones, and G, their mean.

    `is_seen` has (sequence, object id) of every object. A split without unseen categories, such as one held out of the
    training set, gives G over the two that are there.
    """
    objects = list(objects)
    found: dict[str, float] = {}
    for name, wanted in (("seen", True), ("unseen", False)):
        group = [each for each in objects if is_seen[each.sequence, each.object_id] is wanted]
        if group:
            means = mean_scores(group)
            found |= {f"J_{name}": means["J"], f"F_{name}": means["F"]}
    if not found:
        raise ValueError("there is no object to take the mean over")
    return {"G": math.fsum(found.values()) / len(found), **found}
