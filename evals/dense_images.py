"""Images as an encoder is shown them: whole or in windows to be scored, drawn anew to be trained on, read ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.transforms import Box
from evals.cache import Features, Request
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
from evals.grid import Draws, derived_seed
from vjepa.train.distributed import World

MIRRORED, STRAIGHT = "mirrored", "straight"
STEPS_AHEAD = 2  # whose training images threads read in the meantime


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

    def shown(self, item: DenseItem) -> Callable[[], Tensor]:
        """What gives the whole image at its size, decoded when it is first asked for, for all of its windows."""
        return cache(lambda: resize_image(cut(_image(item, self.full), self.kept), self.size))

    def request(self, shown: Callable[[], Tensor], content: str, window: Box, *, is_mirrored: bool = False) -> Request:
        """A window of the image: mirrored inside the window, so that its prediction is mirrored back."""

        def read() -> Tensor:
            view = cut(pad_to(shown(), (window.top + window.height, window.left + window.width), 0), window)
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
        request = plan.request(plan.shown(item), self.content(index), window, is_mirrored=is_mirrored)
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
        fit, stride = config.fit, config.label_stride
        draws = Draws(len(self.data), fit.batch_size, fit.seed)

        def view(ordinal: int) -> tuple[Request, Tensor]:
            seed = derived_seed(fit.seed, "view", ordinal)
            return self.train_view(draws.sample(ordinal), config.view, config.augment, seed)

        views_of = Ahead(view, lambda step: draws.ordinals(step, world), fit.steps, config.workers)

        def at(step: int) -> tuple[Tensor, Tensor]:
            views = views_of(step)
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
        sides, shown = (False, True) if mirrored else (False,), plan.shown(item)
        requests = [
            plan.request(shown, self.content(index), window, is_mirrored=side)
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


@dataclass
class Ahead:
    """Step -> its training views, in order; with `workers` threads those of the next steps are made in the meantime."""

    view: Callable[[int], tuple[Request, Tensor]]
    """Of an ordinal: a function of it alone, so that it does not matter who makes it when."""
    ordinals: Callable[[int], range]
    steps: int
    workers: int
    _made: dict[int, list[Future[tuple[Request, Tensor]]]] = field(default_factory=dict, init=False, repr=False)
    _threads: ThreadPoolExecutor | None = field(default=None, init=False, repr=False)

    def __call__(self, step: int) -> list[tuple[Request, Tensor]]:
        if not self.workers:
            return list(map(self.view, self.ordinals(step)))
        self._threads = self._threads or ThreadPoolExecutor(self.workers, "training images")
        for each in range(step, max(step + 1, min(step + 1 + STEPS_AHEAD, self.steps))):
            if each not in self._made:
                self._made[each] = [self._threads.submit(self.view, ordinal) for ordinal in self.ordinals(each)]
        return [future.result() for future in self._made.pop(step)]
