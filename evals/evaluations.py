"""The kinds of evaluation: what each asks of a recipe, a set and a model.

A kind is a class with `load` (a recipe under overrides), `open` (the set is there, and what it is), `rehearse` (a model
can take what it would be shown) and `measure` (the scores of a model). Questions to whole clips are in `pooled.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from omegaconf import MISSING, OmegaConf
from PIL import Image

from data_pipeline.transforms import Box
from evals.cache import file_digest
from evals.dense_config import DenseConfig, load_depth, load_segmentation
from evals.dense_fit import DenseResult
from evals.dense_images import Plan
from evals.dense_pictures import depth_picture, segmentation_picture
from evals.dense_sets import DenseSet
from evals.floors import DEPTH_FLOORS, SEGMENTATION_FLOORS, TRACKING_FLOORS, DenseFloor, Floor
from evals.labelled_files import DataMissing
from evals.labelled_suite import read_splits, score_source
from evals.media import stamp
from evals.models import Model, PixelModel, rehearse_clips, show
from evals.overlays import tracking_picture
from evals.probe_config import ProbeConfig, load_probe
from evals.propagation import PRESETS, PropagationConfig, input_size
from evals.protocol import RGB, DoesNotFit, EvalConfig, Score
from evals.references import RGB_PATCHES
from evals.results import PICTURES
from evals.suites import SUITES
from evals.tasks import attentive_probe, linear_depth, linear_segmentation
from evals.tasks.tracking import Tracker, dataset_means, track, tracking_scores
from evals.videos import AnnotatedVideo, DatasetError, DatasetName, open_dataset, read_frame, seen_categories
from evals.whole_files import writing
from vjepa.config import ConfigError, config_hash, merge, resolve
from vjepa.train.distributed import World

log = logging.getLogger(__name__)
NUM_PICTURED = 2  # first test images or videos in OUT/pictures/NAME/MODEL

Entrant = Model | Floor
"""What is measured: a model, or what a set gives away without one."""


class Evaluation(Protocol):
    """One evaluation, ready to run."""

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> Any:
        """The recipe, a dataclass."""
        ...

    @property
    def floors(self) -> tuple[str, ...]:
        """Names of the floors that are measured beside the models, as Floor."""
        ...

    def open(self) -> str:
        """Look for the set; a text of which files it is. Raises NotThere."""
        ...

    def numbers(self) -> str:
        """A digest of what decides the numbers, the set apart."""
        ...

    def column(self, model: Entrant) -> str:
        """The model's name in the rows."""
        ...

    def rehearse(self, model: Model) -> None:
        """Show the model something black of the recipe's size. Raises Unsuited as `measure` would, on all ranks."""
        ...

    def measure(self, model: Entrant, out: Path, world: World) -> list[Score]:
        """All scores of a model, the headline first, the same on all ranks, which call this together.

        The main rank alone writes pictures. Raises Unsuited, on all ranks, where it makes no sense for the model.
        """
        ...


def _save(picture: Image.Image, path: Path) -> None:
    """Without a picture a measurement is still one: where it cannot be written, the log says so."""
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    except OSError as error:
        log.warning("%s", error)


# ----------------------------------------------------------------------------------------------- kinds of evaluation


@dataclass
class Dense:
    """A head on the tokens of images: segmentation or depth."""

    name: str
    config: Any  # SegmentationConfig or DepthConfig, as `module` wants it
    module: ModuleType
    picture: Callable[[DenseResult, int, str], Image.Image]
    floor: Mapping[str, DenseFloor]
    _kept: tuple[int, Box] | None = field(default=None, init=False, repr=False)
    """Patch size of the first model that was rehearsed, and what is scored of an image with it."""

    @classmethod
    def segmentation(cls, name: str, overrides: Sequence[str]) -> Dense:
        return cls(
            name, load_segmentation(name, overrides), linear_segmentation, segmentation_picture, SEGMENTATION_FLOORS
        )

    @classmethod
    def depth(cls, name: str, overrides: Sequence[str]) -> Dense:
        return cls(name, load_depth(name, overrides), linear_depth, depth_picture, DEPTH_FLOORS)

    @property
    def floors(self) -> tuple[str, ...]:
        return tuple(self.floor)

    @cached_property
    def splits(self) -> tuple[DenseSet, DenseSet]:
        return self.module.open_splits(self.config)

    def open(self) -> str:
        train, test = ([f"{item.key} {item.stamp()}" for item in split.items] for split in self.splits)
        if shared := sorted(set(train) & set(test)):
            log.warning(
                "%s: %d of %d test images are training images too, such as %s: figures say nothing of unseen images; "
                "see data.train_split=%s and data.test_split=%s",
                self.name, len(shared), len(test), shared[0].split()[0], *(each.split for each in self.splits),
            )  # fmt: skip
        return f"{Path(self.config.data.root).resolve()} {[' '.join(train), ' '.join(test)]}"

    def numbers(self) -> str:
        config: DenseConfig = self.config
        return config.numbers()

    def column(self, model: Entrant) -> str:
        return model.name

    def rehearse(self, model: Model) -> None:
        source, view, augment = model.dense(self.config), self.config.view.crop, self.config.augment.crop
        for key, size in (("view.crop", view), ("augment.crop", augment)):
            if size is not None and any(side % model.patch_size for side in size):
                same = [round(side / 16) * model.patch_size for side in size]
                raise DoesNotFit(
                    f"{key}={list(size)} must be multiples of the patch size {model.patch_size}: {same} has as many "
                    "patches as that of patches of 16"
                )
        plan = Plan.of(self.splits[1].items[0].truth().shape, self.config.view, model.patch_size)
        self._compare_kept(model.patch_size, plan.kept)
        whole = plan.windows[0]
        for height, width in (augment or whole[2:], whole[2:]):
            show(source, 1, height, width)

    def _compare_kept(self, patch: int, kept: Box) -> None:
        """Warn where models of different patches are scored on different pixels."""
        self._kept = self._kept or (patch, kept)
        if kept != self._kept[1]:
            log.warning(
                "%s: with patches of %d, %d x %d pixels of an image are scored, with patches of %d %d x %d: rows "
                "differ by that too; view.edges=resize scores all pixels with both",
                self.name, *(self._kept[0], *self._kept[1][2:]), patch, *kept[2:],
            )  # fmt: skip

    def measure(self, model: Entrant, out: Path, world: World) -> list[Score]:
        if isinstance(model, Floor):
            measure = self.floor[model.name]
            return measure(*self.splits, self.config, patch_size=model.patch_size, world=world)
        source = model.dense(self.config)
        result = self.module.run(source, self.config, splits=self.splits, patch_size=model.patch_size, world=world)
        for index in range(min(NUM_PICTURED, len(self.splits[1])) if world.is_main else 0):
            picture = self.picture(result, index, model.name)
            _save(picture, out / PICTURES / self.name / model.name / f"{index:02}.png")
        return self.module.scores(result, self.config)


@dataclass
class TrackingData:
    """Which videos, and where they lie."""

    dataset: DatasetName = MISSING
    root: str = MISSING  # the set's folder; nothing is downloaded
    split: str = "val"
    sequences: list[str] = field(default_factory=list)  # these videos alone; []: all of the split
    seen: str | None = None  # YouTube-VOS: meta.json of the training set, whose categories are seen
    skip_missing: bool = False  # leave out listed videos that are not there


@dataclass
class TrackingConfig:
    """Masks carried along by features."""

    data: TrackingData = field(default_factory=TrackingData)
    preset: str = "vjepa21"  # one of evals.propagation.PRESETS, which `propagation` changes
    propagation: PropagationConfig = field(default_factory=PropagationConfig)


def load_tracking(name: str, overrides: Sequence[str]) -> TrackingConfig:
    """The settings of a set's official protocol under `key=value` overrides; ConfigError for what cannot be."""
    base = OmegaConf.create({"data": {"dataset": name}})
    preset = merge(TrackingConfig, [base], overrides).preset
    if preset not in PRESETS:
        raise ConfigError(f"preset={preset} is unknown: choose one of {', '.join(PRESETS)}")
    return resolve(TrackingConfig, [base, OmegaConf.create({"propagation": asdict(PRESETS[preset])})], overrides)


@dataclass
class Tracking:
    """Video object segmentation without training."""

    name: str
    config: TrackingConfig
    floors: tuple[str, ...] = TRACKING_FLOORS

    @classmethod
    def load(cls, name: str, overrides: Sequence[str]) -> Tracking:
        return cls(name, load_tracking(name, overrides))

    @cached_property
    def videos(self) -> list[AnnotatedVideo]:
        data = self.config.data
        return open_dataset(
            data.dataset, Path(data.root), split=data.split, sequences=data.sequences, skip_missing=data.skip_missing
        )

    def open(self) -> str:
        frames = [
            f"{video.name} {name} {stamp(path)}"
            for video in self.videos
            for name, path in (*video.frames.items(), *video.masks.items())
        ]
        return f"{Path(self.config.data.root).resolve()} {frames}"

    def numbers(self) -> str:
        kept = asdict(self.config)
        kept["data"].pop("root")
        return config_hash(repr(kept))

    def column(self, model: Entrant) -> str:
        """Pixels go without their position here, and are called so."""
        return model.name.replace(RGB, RGB_PATCHES, 1) if isinstance(model, PixelModel) else model.name

    def rehearse(self, model: Model) -> None:
        video = self.videos[0]
        size = read_frame(next(iter(video.frames.values()))).shape[-2:]
        height, width = input_size((size[0], size[1]), self.config.propagation.side(model.patch_size), model.patch_size)
        show(model.frames(), 1, height, width)

    def measure(self, model: Entrant, out: Path, world: World) -> list[Score]:
        data, source = self.config.data, None if isinstance(model, Floor) else model.frames()
        tracker = Tracker(self.column(model), source, model.patch_size)
        masks = out / "masks" / self.name / tracker.name
        objects = track(self.videos, tracker, self.config.propagation, masks, world=world)
        for video in self.videos[:NUM_PICTURED] if world.is_main else []:
            picture = tracking_picture(video, {tracker.name: masks})
            _save(picture, out / PICTURES / self.name / tracker.name / f"{video.name}.png")
        if not objects:
            raise DatasetError(f"{self.name}: there are no true masks to score with; predictions are in {masks}")
        seen = seen_categories(Path(data.seen)) if data.seen else None
        return tracking_scores(data.dataset, dataset_means(data.dataset, objects, self.videos, seen))


@dataclass
class Attentive:
    """An attentive probe of clips or images."""

    name: str
    config: ProbeConfig
    floors: tuple[str, ...] = ()

    @classmethod
    def load(cls, name: str, overrides: Sequence[str]) -> Attentive:
        return cls(name, load_probe(name, overrides))

    def open(self) -> str:
        return attentive_probe.describe_data(self.config)

    def numbers(self) -> str:
        return self.config.numbers()

    def column(self, model: Entrant) -> str:
        return model.name

    def rehearse(self, model: Model) -> None:
        source = model.clips(self.config)
        rehearse_clips(source, self.config.clips, model)
        if self.config.levels == [] and not isinstance(model, PixelModel) and len(getattr(source, "levels", ())) < 2:
            log.warning(
                "%s, %s: one level of tokens is read, the papers read four; levels=[...] says which of ours",
                self.name, model.name,
            )  # fmt: skip

    def measure(self, model: Entrant, out: Path, world: World) -> list[Score]:
        assert not isinstance(model, Floor)  # there is none
        return attentive_probe.evaluate(model.clips(self.config), self.config, world=world, about=model.identity)


@dataclass
class ShardData:
    """Where the shards of a suite lie."""

    root: str = MISSING  # a shard folder for each split


@dataclass
class LabelledConfig:
    """A suite of questions on shards with labels of their own."""

    data: ShardData = field(default_factory=ShardData)
    seeds: int = 3  # times every probe is fitted


@dataclass
class Labelled:
    """The demo's questions: all tasks of a suite of `suites.py` on its shards."""

    name: str
    config: LabelledConfig
    floors: tuple[str, ...] = ()

    @classmethod
    def load(cls, name: str, overrides: Sequence[str]) -> Labelled:
        return cls(name, resolve(LabelledConfig, [], overrides))

    def open(self) -> str:
        suite, root = SUITES[self.name], Path(self.config.data.root)
        splits = (suite.train_split, suite.test_split)
        for split in splits:
            if not (root / split).is_dir():
                raise DataMissing(
                    f"{self.name}: {root / split} is not there. Expected below data.root: shard folders "
                    f"{suite.train_split}/ and {suite.test_split}/; python -m data_pipeline.prepare.digits makes them"
                )
        indices = [path for path in sorted(root.glob("*/*.json*")) if path.parent.name in splits]
        return f"{root.resolve()} {' '.join(map(file_digest, indices))}"  # they have a digest of every record

    def numbers(self) -> str:
        return config_hash(f"{self.config.seeds} {SUITES[self.name].tasks}")

    def column(self, model: Entrant) -> str:
        return model.name

    def rehearse(self, model: Model) -> None:
        """Its clips are small: nothing is lost where they do not fit."""

    def measure(self, model: Entrant, out: Path, world: World) -> list[Score]:
        assert not isinstance(model, Floor)  # there is none
        return world.on_main(lambda: self._scores(model))  # too small to be shared

    def _scores(self, model: Model) -> list[Score]:
        suite, settings = SUITES[self.name], EvalConfig(seeds=tuple(range(self.config.seeds)))
        train, test = read_splits(
            suite, self.config.data.root, patch_size=model.patch_size, tubelet_size=model.tubelet_size
        )
        return score_source(suite, model.last(), train, test, settings)
