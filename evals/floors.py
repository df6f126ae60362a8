"""What a set gives away without any features: rows beside those of models, which a model must leave below it.

Reference evaluation.md 5.1 has their figures: the commonest class of every pixel, the median depth, the mean depth of
every pixel, the first mask held still.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from evals.dense_config import DepthConfig, SegmentationConfig
from evals.dense_fit import is_better_high
from evals.dense_images import Plan
from evals.dense_sets import DenseItem, DenseSet, DenseSetError
from evals.dense_views import cut, resize_truth
from evals.depth_metrics import DepthMeter
from evals.metrics import ConfusionMatrix
from evals.protocol import IGNORE, Score
from evals.tasks import linear_depth, linear_segmentation
from evals.tasks.tracking import HELD_MASK
from vjepa.train.distributed import ALONE, World

LOCATION_PRIOR, CONSTANT, LOCATION_MEAN = "location_prior", "constant", "location_mean"
TRACKING_FLOORS = (HELD_MASK,)
MILLIMETRE = 1e-3


@dataclass(frozen=True)
class Floor:
    """A prediction that looks at no image, in the place of a model."""

    name: str
    patch_size: int = 16
    """Of the models beside it: where views leave out what is no whole patch, it is scored on what they are."""
    training_seed: int | None = None

    @property
    def identity(self) -> str:
        return f"floor {self.name} {self.patch_size}"


class DenseFloor(Protocol):
    """Scores of a floor, of which every rank reads its own share of the images."""

    def __call__(
        self, train: DenseSet, test: DenseSet, config: Any, *, patch_size: int = 16, world: World = ALONE
    ) -> list[Score]: ...


# ------------------------------------------------------------------------------------------------------ segmentation


def location_prior(
    train: DenseSet, test: DenseSet, config: SegmentationConfig, *, patch_size: int = 16, world: World = ALONE
) -> list[Score]:
    """The class that is commonest in training at each pixel of the view; images of other sizes go by the first's."""
    train, test = train.first(config.data.limit), test.first(config.data.limit)
    size = _kept(train.items[0].truth(), config, patch_size).shape
    counts = torch.zeros(*size, len(train.classes), dtype=torch.int32)
    for item in _mine(train, world):
        truth = resize_truth(_kept(item.truth(), config, patch_size), (size[0], size[1]))
        rows, columns = (truth != IGNORE).nonzero(as_tuple=True)
        counts[rows, columns, truth[rows, columns]] += 1
    prior, meter = world.sum(counts).argmax(dim=-1), ConfusionMatrix(len(test.classes))
    for item in _mine(test, world):
        truth = _kept(item.truth(), config, patch_size)
        meter.update(resize_truth(prior, (truth.shape[0], truth.shape[1])), truth)
    meter.reduce(world)
    name = config.task(linear_segmentation.TASK)
    return [
        Score(name, LOCATION_PRIOR, "mIoU", 0, meter.miou()),
        Score(f"{name}_accuracy", LOCATION_PRIOR, "accuracy", 0, meter.accuracy()),
    ]


def _kept(truth: Tensor, config: SegmentationConfig, patch_size: int) -> Tensor:
    return cut(truth, Plan.of(truth.shape, config.view, patch_size).kept)


def _mine(data: DenseSet, world: World) -> tuple[DenseItem, ...]:
    return data.items[world.rank :: world.size]


# ------------------------------------------------------------------------------------------------------------- depth


def constant_depth(
    train: DenseSet, test: DenseSet, config: DepthConfig, *, patch_size: int = 16, world: World = ALONE
) -> list[Score]:
    """The median of all known training depths, to a millimetre, everywhere."""
    train, test = train.first(config.data.limit), test.first(config.data.limit)
    return _depth_scores(CONSTANT, _median(train, config, world).expand(1, 1), test, config, patch_size, world)


def location_mean(
    train: DenseSet, test: DenseSet, config: DepthConfig, *, patch_size: int = 16, world: World = ALONE
) -> list[Score]:
    """The mean of the known training depths at each pixel, the median where none is known; images of one size."""
    train, test = train.first(config.data.limit), test.first(config.data.limit)
    size = train.items[0].truth().shape
    sums, known = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.int64)
    for item in _mine(train, world):
        truth = resize_truth(_known(item.truth(), config), (size[0], size[1]))
        sums += truth
        known += truth > 0
    sums, known = world.sum(sums), world.sum(known)
    mean = (sums / known.clamp_min(1)).float()
    if not known.all():
        mean[known == 0] = _median(train, config, world)
    return _depth_scores(LOCATION_MEAN, mean, test, config, patch_size, world)


def _known(truth: Tensor, config: DepthConfig) -> Tensor:
    return torch.where((truth > config.min_depth) & (truth < config.max_depth), truth, 0)


def _median(train: DenseSet, config: DepthConfig, world: World) -> Tensor:
    """Of all known depths, the lower of two; counted by the millimetre, for a set has thousands of millions."""
    counts = torch.zeros(round(config.max_depth / MILLIMETRE) + 1, dtype=torch.int64)
    for item in _mine(train, world):
        truth = _known(item.truth(), config)
        counts += torch.bincount((truth[truth > 0] / MILLIMETRE).round().long(), minlength=len(counts))
    below = world.sum(counts).cumsum(dim=0)
    if not below[-1]:
        raise DenseSetError(f"{train.name}: no training image has a depth between {config.min_depth} and the maximum")
    return torch.tensor(int((below < (below[-1] + 1) // 2).sum()) * MILLIMETRE)


def _depth_scores(
    probe: str, depth: Tensor, test: DenseSet, config: DepthConfig, patch_size: int, world: World
) -> list[Score]:
    meter = DepthMeter(config.min_depth, config.max_depth)
    for item in _mine(test, world):
        truth = item.truth()
        kept = Plan.of(truth.shape, config.view, patch_size).kept
        size = (truth.shape[0], truth.shape[1])
        meter.update(
            cut(depth.expand(size) if depth.numel() == 1 else resize_truth(depth, size), kept), cut(truth, kept)
        )
    name = config.task(linear_depth.TASK)
    return [
        Score(name if place == 0 else f"{name}_{metric}", probe, metric, 0, value, is_better_high(metric))
        for place, (metric, value) in enumerate(meter.reduce(world).scores().items())
    ]


SEGMENTATION_FLOORS: Mapping[str, DenseFloor] = {LOCATION_PRIOR: location_prior}
DEPTH_FLOORS: Mapping[str, DenseFloor] = {CONSTANT: constant_depth, LOCATION_MEAN: location_mean}
