"""Heads on frozen dense features: images in, a grid of heads trained, one chosen, every image scored whole.

Segmentation and depth differ in their head, loss, metric and what a prediction is; those are a `DenseTask`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from evals.cache import CachedFeatures, Features, kept_features, open_features, source_identity
from evals.dense_config import DenseConfig
from evals.dense_images import Images, predict_whole
from evals.dense_sets import DenseSet
from evals.features import FeatureSource
from evals.grid import Choice, HeadGrid, Loss, StateFile, choose, derived_seed, fit_grid, generator, score_heads
from evals.protocol import Score
from vjepa.train.distributed import ALONE, World

log = logging.getLogger(__name__)


class DenseMeter(Protocol):
    """A metric over a set of whole images."""

    def update(self, outputs: Any, labels: Any, /) -> object: ...
    def reduce(self, world: World) -> object: ...
    def headline(self) -> float:
        """What a head is chosen by."""
        ...

    def scores(self) -> dict[str, float]:
        """Metric -> value, the headline first."""
        ...


M = TypeVar("M", bound=DenseMeter)


@dataclass(frozen=True)
class DenseTask(Generic[M]):
    """What tells one dense task from another."""

    name: str
    make_head: Callable[[int], nn.Module]
    """Width of the tokens -> tokens [B, h, w, D] to outputs [B, K, h, w]."""
    loss: Loss
    make_meter: Callable[[], M]
    fill: float
    """Of a truth where nothing is known."""
    higher_is_better: bool
    probe: str = "linear"
    flip_average: bool = False


@dataclass(frozen=True)
class DenseResult(Generic[M]):
    """A grid of heads, what they scored, and the one that was chosen."""

    grid: HeadGrid
    choice: Choice
    meter: M
    """Of the chosen head on the test set."""
    maximum: M
    """Of the head that is best there."""
    images: Images
    config: DenseConfig

    @property
    def head(self) -> nn.Module:
        return self.grid.heads[self.choice.index]

    @torch.no_grad()
    def predict(self, index: int) -> tuple[Tensor, Tensor]:
        """Outputs [K, H, W] of the chosen head for a test image, and its truth [H, W]: for pictures."""
        mirrored = getattr(self.config, "flip_average", False)
        (tokens, plan), truth = self.images.one(index, self.config.view, mirrored=mirrored)
        device = self.grid.world.device
        return predict_whole(self.head.eval(), tokens.to(device), plan).cpu(), truth


def run_dense(
    task: DenseTask[M],
    source: FeatureSource,
    train: DenseSet,
    test: DenseSet,
    config: DenseConfig,
    *,
    patch_size: int,
    world: World = ALONE,
) -> DenseResult[M]:
    """Fit the grid on `train`, choose on what is held out of it, score on `test`."""
    features = open_features(
        source, config.cache.folder, max_gib=config.cache.max_gib, dtype=config.cache.dtype, world=world
    )
    train, test = (data.first(config.data.limit) for data in (train, test))
    if config.fit.warmup_steps >= config.fit.steps and world.is_main:
        log.warning(
            "%s: fit.steps=%d end within fit.warmup_steps=%d: no head reaches its learning rate; shorten it too",
            task.name, config.fit.steps, config.fit.warmup_steps,
        )  # fmt: skip
    fitted, held_out = split_held_out(train, config)
    images = {
        "fit": Images(fitted, _training_features(features, source, config), patch_size, task.fill),
        "test": Images(test, features, patch_size, task.fill),
    }
    batches = images["fit"].batches(config, world)
    width = images["fit"].tokens([images["fit"].train_view(0, config.view, config.augment, 0)[0]]).shape[-1]
    state = config.fit.state
    found = fit_grid(
        lambda: task.make_head(width),
        config.fit.settings,
        batches,
        task.loss,
        steps=config.fit.steps,
        schedule=config.fit.schedule,
        optim=config.fit.optim,
        seed=config.fit.seed,
        world=world,
        state=None
        if state is None
        else StateFile(Path(state) / f"{task.name}_{source.name}.pt", config.fit.save_every),
        about=_about(features, source, fitted, config) if state else "",
    )

    def score(images: Images) -> list[M]:
        return score_heads(
            found.heads,
            images.whole(config.view, world, mirrored=task.flip_average),
            task.make_meter,
            predict=lambda head, seen: predict_whole(head, *seen),
            world=world,
        )

    meters = score(images["test"])
    values = [meter.headline() for meter in meters]
    chosen_on = values
    if held_out is not None:
        chosen_on = [meter.headline() for meter in score(Images(held_out, features, patch_size, task.fill))]
    choice = choose(chosen_on, values, higher_is_better=task.higher_is_better)
    return DenseResult(found, choice, meters[choice.index], meters[choice.max_index], images["test"], config)


def _training_features(features: Features, source: FeatureSource, config: DenseConfig) -> Features:
    """Held in memory where images are wanted again, look the same each time, and are in no folder."""
    if config.cache.folder is not None or config.augment.is_random or config.cache.memory_gib == 0:
        return features
    return kept_features(source, max_gib=config.cache.memory_gib, dtype=config.cache.dtype)


def split_held_out(train: DenseSet, config: DenseConfig) -> tuple[DenseSet, DenseSet | None]:
    """Training images to fit on, and those to choose a head on; all are fitted where there is one head."""
    if len(config.fit.settings) == 1:
        return train, None
    if len(train) < 2:
        raise ValueError("several heads need at least two training images: one is held out to choose between them")
    order = torch.randperm(len(train), generator=generator(config.fit.seed, "held out")).tolist()
    count = min(len(train) - 1, max(1, round(config.fit.held_out * len(train))))
    return train.part(sorted(order[count:])), train.part(sorted(order[:count]))


def _about(features: Features, source: FeatureSource, data: DenseSet, config: DenseConfig) -> str:
    identity = features.identity if isinstance(features, CachedFeatures) else source_identity(source)
    keys = " ".join(item.key for item in data.items)
    return f"{config.numbers()} {derived_seed(identity, data.name, data.split, keys):x}"


def scores_of(result: DenseResult[Any], task: DenseTask[Any]) -> list[Score]:
    """The chosen head's numbers, the headline under the task's own name; then the papers' maximum over heads."""
    found = []
    for place, (metric, value) in enumerate(result.meter.scores().items()):
        name = task.name if place == 0 else f"{task.name}_{metric}"
        found.append(Score(name, task.probe, metric, result.grid.seed, value, is_better_high(metric)))
    if len(result.grid.heads) > 1:
        metric = next(iter(result.maximum.scores()))
        name = f"{task.name}_max_over_heads"
        value = result.choice.max_over_heads
        found.append(Score(name, task.probe, metric, result.grid.seed, value, task.higher_is_better))
    return found


def is_better_high(metric: str) -> bool:
    """Shares are better high, errors low."""
    return metric in ("mIoU", "accuracy") or metric.startswith(("delta", "IoU"))
