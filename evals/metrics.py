"""Metrics that are accumulated over a whole set, by one confusion matrix."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from evals.protocol import IGNORE
from vjepa.train.distributed import World


class ConfusionMatrix:
    """Counts of (true class, predicted class) over any number of updates.

    The convention of mmsegmentation and DINOv3 (reference evaluation.md 1.3): intersections and unions are summed over
    the set before they are divided, ignored places count nowhere, and a class that neither occurs nor is predicted is
    left out of the mean. A class that is predicted but never occurs counts as 0.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)  # [true, predicted]

    def update(self, predicted: Tensor, labels: Tensor) -> ConfusionMatrix:
        """Count predictions and labels of one shape, int64; labels equal to IGNORE are left out. Returns itself."""
        if predicted.shape != labels.shape:
            raise ValueError(f"predictions {list(predicted.shape)} and labels {list(labels.shape)} differ in shape")
        keep = labels != IGNORE
        true, guess = labels[keep].long().cpu(), predicted[keep].long().cpu()
        for name, values in (("labels", true), ("predictions", guess)):
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) < self.num_classes:
                raise ValueError(
                    f"{name} lie in {int(values.min())}..{int(values.max())}, classes in 0..{self.num_classes - 1}"
                )
        pairs = torch.bincount(true * self.num_classes + guess, minlength=self.num_classes**2)
        self.counts += pairs.view(self.num_classes, self.num_classes)
        return self

    def reduce(self, world: World) -> ConfusionMatrix:
        """Add up what the ranks have counted, on all of them. Returns itself."""
        self.counts = world.sum(self.counts.to(world.device)).cpu()
        return self

    def accuracy(self, classes: Iterable[int] | None = None) -> float:
        """Share of right predictions, over the places whose true class is one of `classes` (default: all)."""
        rows = list(range(self.num_classes) if classes is None else classes)
        return _share(self.counts.diagonal()[rows].sum(), self.counts[rows].sum())

    def iou(self) -> Tensor:
        """Intersection over union of every class: float64 [num_classes], NaN where the union is empty."""
        intersection = self.counts.diagonal().double()
        return intersection / (self.counts.sum(0) + self.counts.sum(1) - intersection)

    def miou(self) -> float:
        """Mean IoU over the classes that occur or are predicted."""
        if not self.counts.any():
            raise ValueError("nothing was counted: every label is ignored, or the set is empty")
        return self.iou().nanmean().item()


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of equal entries, those with the label IGNORE left out."""
    keep = labels != IGNORE
    return _share((predicted == labels)[keep].sum(), keep.sum())


def _share(part: Tensor, whole: Tensor) -> float:
    if not whole:
        raise ValueError("nothing was counted: every label is ignored, or the set is empty")
    return part.item() / whole.item()
