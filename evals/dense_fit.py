"""Heads on frozen dense features: images in, a grid of heads trained, one chosen, every image scored whole.

Segmentation and depth differ in their head, loss, metric and what a prediction is; those are a `DenseTask`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.transforms import Box
from evals.cache import CachedFeatures, Features, Request, open_features, source_identity
from evals.dense_config import AugmentConfig, DenseConfig, ViewConfig
from evals.dense_sets import DenseItem, DenseSet, DenseSetError
from evals.dense_views import (
    assemble,
    brighten,
    centred_patches,
    cut,
    distort_colours,
    multiple_of,
    pad_to,
    random_crop,
    resize_image,
    resize_truth,
    rotate,
    short_side_size,
    sliding_windows,
)
from evals.features import FeatureSource
from evals.grid import Choice, Draws, HeadGrid, Loss, StateFile, choose, derived_seed, fit_grid, generator, score_heads
from evals.protocol import Score
from vjepa.train.distributed import ALONE, World

MIRRORED, STRAIGHT = "mirrored", "straight"


# ----------------------------------------------------------------------------------------------- one image as views


@dataclass(frozen=True)
class Plan:
    """How an image is shown: what is kept of it, at which size, in which windows."""

    full: tuple[int, int]
    kept: Box
    size: tuple[int, int]
    windows: tuple[Box, ...]

    @classmethod
    def of(cls, full: Sequence[int], view: ViewConfig, patch: int) -> Plan:
        """The plan for an image of `full` (height, width)."""
        height, width = full
        size = (height, width) if view.short_side is None else short_side_size(height, width, view.short_side)
        whole = Box(0, 0, height, width)
        if view.crop is not None:
            crop = (view.crop[0], view.crop[1])
            if crop[0] % patch or crop[1] % patch:
                raise ValueError(f"view.crop={list(crop)} must be multiples of the patch size {patch}")
            return cls((height, width), whole, size, tuple(sliding_windows(*size, crop, view.stride)))
        if view.edges == "resize":
            size = multiple_of(size, patch)
            return cls((height, width), whole, size, (Box(0, 0, *size),))
        if size != (height, width):
            raise ValueError("view.edges=crop keeps pixels as they are: it needs view.short_side=null")
        kept = centred_patches(height, width, patch)
        return cls((height, width), kept, kept[2:], (Box(0, 0, kept.height, kept.width),))

    def request(self, item: DenseItem, content: str, window: Box, *, is_mirrored: bool = False) -> Request:
        """A window of the image: mirrored inside the window, so that its prediction is mirrored back."""

        def read() -> Tensor:
            image = resize_image(cut(_image(item, self.full), self.kept), self.size)
            view = cut(pad_to(image, (window.top + window.height, window.left + window.width), 0), window)
            return (view.flip(-1) if is_mirrored else view)[:, None].contiguous()  # [C, 1, H, W]

        side = MIRRORED if is_mirrored else STRAIGHT
        return Request(content, f"{tuple(self.kept)} {self.size} {tuple(window)} {side}", read)


def _image(item: DenseItem, size: Sequence[int]) -> Tensor:
    """The image of an item, which must have the size of its truth."""
    image = item.image()
    if image.shape[-2:] != tuple(size):
        raise DenseSetError(f"{item.key}: the image is {list(image.shape[-2:])}, its truth {list(size)}")
    return image


@dataclass
class Images:
    """A set as an encoder is shown it."""

    data: DenseSet
    features: Features
    patch: int
    fill: float
    """Of a truth where there is no image."""
    _contents: dict[int, str] = field(default_factory=dict, repr=False)

    def content(self, index: int) -> str:
        if index not in self._contents:
            self._contents[index] = self.data.items[index].content()
        return self._contents[index]

    def tokens(self, requests: Sequence[Request]) -> Tensor:
        """[B, h, w, D]."""
        tokens = self.features(requests)
        if tokens.shape[1] != 1:
            raise ValueError(f"an image gave {tokens.shape[1]} time steps of tokens; dense tasks want one")
        return tokens[:, 0]

    def train_view(self, index: int, view: ViewConfig, augment: AugmentConfig, seed: int) -> tuple[Request, Tensor]:
        """A training image and its truth [H, W], drawn by the seed."""
        drawn, item = np.random.default_rng(seed), self.data.items[index]
        if augment.is_random:
            image, truth = self._augmented(item, view, augment, drawn)
            return Request(self.content(index), f"drawn {seed}", lambda: image[:, None].contiguous()), truth
        truth = item.truth()
        plan = Plan.of(truth.shape, view, self.patch)
        window = plan.windows[int(drawn.integers(len(plan.windows)))]
        is_mirrored = bool(drawn.random() < augment.flip)
        truth = resize_truth(cut(truth, plan.kept), plan.size)
        truth = cut(pad_to(truth, (window.top + window.height, window.left + window.width), self.fill), window)
        request = plan.request(item, self.content(index), window, is_mirrored=is_mirrored)
        return request, truth.flip(-1) if is_mirrored else truth

    def _augmented(
        self, item: DenseItem, view: ViewConfig, augment: AugmentConfig, drawn: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        truth = item.truth()
        image = _image(item, truth.shape)
        if augment.border is not None:
            top, bottom, left, right = augment.border
            image, truth = (cut(x, Box(top, left, bottom - top, right - left)) for x in (image, truth))
        if augment.rotate:
            image, truth = rotate((image, truth), drawn.uniform(-augment.rotate, augment.rotate), fill=self.fill)
        height, width = truth.shape
        size = (height, width) if view.short_side is None else short_side_size(height, width, view.short_side)
        scale = drawn.uniform(augment.scale_min, augment.scale_max)
        size = round(size[0] * scale), round(size[1] * scale)
        image, truth = resize_image(image, size), resize_truth(truth, size)
        if drawn.random() < augment.flip:
            image, truth = image.flip(-1), truth.flip(-1)
        crop = augment.crop or multiple_of(size, self.patch)
        image, truth = random_crop(
            (image, truth), (crop[0], crop[1]), drawn, fill=self.fill, max_ratio=augment.max_ratio
        )
        image = distort_colours(image, drawn) if augment.colours else image
        return brighten(image, drawn.uniform(1 - augment.brightness, 1 + augment.brightness)), truth

    def batches(self, config: DenseConfig, world: World) -> Callable[[int], tuple[Tensor, Tensor]]:
        """Step -> tokens [B, h, w, D] and truths [B, H, W], every `label_stride`th pixel of them."""
        draws, stride = Draws(len(self.data), config.fit.batch_size, config.fit.seed), config.label_stride

        def at(step: int) -> tuple[Tensor, Tensor]:
            views = [
                self.train_view(
                    draws.sample(ordinal), config.view, config.augment, derived_seed(config.fit.seed, "view", ordinal)
                )
                for ordinal in draws.ordinals(step, world)
            ]
            truths = [truth for _, truth in views]
            if len({truth.shape for truth in truths}) > 1:
                raise ValueError(
                    f"images of a batch have the sizes {sorted({tuple(truth.shape) for truth in truths})}: set "
                    "augment.crop, or view.crop, so that they have one"
                )
            middle = slice(stride // 2, None, stride)
            return self.tokens([request for request, _ in views]), torch.stack(truths)[:, middle, middle]

        return at

    def whole(self, view: ViewConfig, world: World, *, mirrored: bool) -> Iterator[tuple[tuple[Tensor, Plan], Tensor]]:
        """This rank's images one by one: tokens of all windows (then of mirrored ones), their plan, and the truth."""
        for index in range(world.rank, len(self.data), world.size):
            yield self.one(index, view, mirrored=mirrored)

    def one(self, index: int, view: ViewConfig, *, mirrored: bool) -> tuple[tuple[Tensor, Plan], Tensor]:
        item = self.data.items[index]
        truth = item.truth()
        plan = Plan.of(truth.shape, view, self.patch)
        sides = (False, True) if mirrored else (False,)
        requests = [
            plan.request(item, self.content(index), window, is_mirrored=side)
            for side in sides
            for window in plan.windows
        ]
        return (self.tokens(requests), plan), cut(truth, plan.kept)


def predict_whole(head: nn.Module, tokens: Tensor, plan: Plan) -> Tensor:
    """A head's outputs [K, H, W] for a whole image at the size it was kept, mean over windows and mirrored ones."""
    windows = list(plan.windows)
    size = windows[0].height, windows[0].width
    outputs = F.interpolate(head(tokens).float(), size=size, mode="bilinear", align_corners=False)  # [W, K, H, W]
    sides = outputs.split(len(windows))
    whole = assemble(windows, sides[0], plan.size)
    if len(sides) == 2:
        whole = (whole + assemble(windows, sides[1].flip(-1), plan.size)) / 2
    kept = plan.kept.height, plan.kept.width
    return F.interpolate(whole[None], size=kept, mode="bilinear", align_corners=False)[0]


# ------------------------------------------------------------------------------------------------------ the evaluation


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
    fitted, held_out = split_held_out(train, config)
    images = {name: Images(data, features, patch_size, task.fill) for name, data in (("fit", fitted), ("test", test))}
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
