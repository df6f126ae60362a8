"""What a dense evaluation may be told; recipes are `evals/recipes/TASK/NAME.yaml`, unknown keys are errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import MISSING

from evals.attentive import AttentiveConfig
from evals.cache import Dtype
from evals.dense_sets import MaskName
from evals.grid import AdamW, Schedule, Setting, grid
from vjepa.config import ConfigError, config_hash, read_recipe, resolve

RECIPES = Path(__file__).parent / "recipes"
C = TypeVar("C", bound="DenseConfig")


@dataclass
class DataConfig:
    """Which images, and where they lie."""

    dataset: str = MISSING  # one of the names in dense_sets.py
    root: str = MISSING  # its folder; nothing is downloaded
    train_split: str = "train"
    test_split: str = "val"  # what is reported
    limit: int | None = None  # first images of each split, for a try

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"data.limit={self.limit} must be at least 1; null takes all")


@dataclass
class ViewConfig:
    """How an image is shown to the encoder when it is scored, and without augmentation in training too."""

    short_side: int | None = 512  # pixels of the shorter side; null: as it is
    crop: list[int] | None = None  # height and width of sliding windows; null: the whole image at once
    stride: int = 341  # pixels between windows
    edges: Literal["resize", "crop"] = "resize"  # of whole images that are no whole patches; crop leaves pixels out

    def __post_init__(self) -> None:
        _check_size("view.crop", self.crop)
        if self.stride < 1 or (self.short_side is not None and self.short_side < 1):
            raise ValueError(f"view: short_side={self.short_side} and stride={self.stride} must be at least 1")


@dataclass
class AugmentConfig:
    """What is drawn anew for every image of every batch; the defaults change nothing."""

    border: list[int] | None = None  # top, bottom, left, right of what is kept, before anything else
    rotate: float = 0.0  # degrees, either way
    scale_min: float = 1.0  # of the short side
    scale_max: float = 1.0
    crop: list[int] | None = None  # height and width
    max_ratio: float = 1.0  # largest share of one class in a crop, over ten tries
    flip: float = 0.0  # probability of a mirrored image
    colours: bool = False  # brightness, contrast, saturation, hue
    brightness: float = 0.0  # factor between 1 - this and 1 + this

    def __post_init__(self) -> None:
        _check_size("augment.crop", self.crop)
        if self.border is not None and len(self.border) != 4:
            raise ValueError(f"augment.border={self.border} must be top, bottom, left, right")
        if not 0 < self.scale_min <= self.scale_max or not 0 <= self.flip <= 1 or not 0 <= self.brightness < 1:
            raise ValueError(
                f"augment: 0 < scale_min={self.scale_min} <= scale_max={self.scale_max}, 0 <= flip={self.flip} <= 1 "
                f"and 0 <= brightness={self.brightness} < 1 must hold"
            )

    @property
    def is_random(self) -> bool:
        """Whether a view is hardly ever seen twice; mirroring alone makes two of each."""
        is_scaled = (self.scale_min, self.scale_max) != (1, 1)
        return bool(self.border or self.crop or self.rotate or self.colours or self.brightness or is_scaled)


@dataclass
class FitConfig:
    """The grid of heads and its training."""

    lrs: list[float] = field(default_factory=lambda: [1e-3])
    weight_decays: list[float] = field(default_factory=lambda: [1e-3])
    steps: int = 40_000
    batch_size: int = 16  # over all ranks
    warmup_steps: int = 1500
    warmup: Literal["linear", "cosine"] = "linear"
    warmup_start: float = 1e-6  # share of the learning rate at step 0
    final: float = 0.0  # share after the last step
    beta1: float = 0.9
    beta2: float = 0.999
    clip_grad: float | None = None
    held_out: float = 0.1  # share of training images on which the head is chosen; none where there is one head
    seed: int = 0
    state: str | None = None  # folder for the state of the fit, which then goes on after a stop
    save_every: int = 500  # steps

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.save_every) < 1 or not 0 < self.held_out < 1:
            raise ValueError(
                f"fit: steps={self.steps}, batch_size={self.batch_size}, save_every={self.save_every} must be at least "
                f"1 and 0 < held_out={self.held_out} < 1"
            )
        try:
            _ = self.settings, self.schedule, self.optim
        except ValueError as error:
            raise ValueError(f"fit: {error}") from error

    @property
    def settings(self) -> tuple[Setting, ...]:
        return grid(self.lrs, self.weight_decays)

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.warmup_steps, self.warmup_start, self.final, self.warmup)

    @property
    def optim(self) -> AdamW:
        return AdamW(self.beta1, self.beta2, clip_grad=self.clip_grad)


@dataclass
class CacheConfig:
    """Where features are kept, if they are."""

    folder: str | None = None  # null: computed each time
    max_gib: float = 50.0  # on the disk
    dtype: Dtype = "float32"  # of the features, cached or not


@dataclass
class DenseCacheConfig(CacheConfig):
    """The same, and what a process holds of training images that look the same each time, where there is no folder."""

    memory_gib: float = 4.0  # of their features, in memory; 0: computed in each epoch anew

    def __post_init__(self) -> None:
        if self.memory_gib < 0:
            raise ValueError(f"cache.memory_gib={self.memory_gib} must not be negative; 0 keeps nothing")


@dataclass
class DenseHeadConfig(AttentiveConfig):
    """The head: a linear layer, or one behind attention among the tokens, whose shape the other fields give."""

    kind: Literal["linear", "attentive"] = "linear"
    depth: int = 3  # self-attention blocks
    width: int | None = None  # of the blocks, to which a linear layer brings the tokens; null: that of the tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width is not None and self.width < 1:
            raise ValueError(f"head.width={self.width} must be at least 1; null keeps that of the tokens")


@dataclass
class DenseConfig:
    """What segmentation and depth share."""

    data: DataConfig = field(default_factory=DataConfig)
    view: ViewConfig = field(default_factory=ViewConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    head: DenseHeadConfig = field(default_factory=DenseHeadConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    cache: DenseCacheConfig = field(default_factory=DenseCacheConfig)
    levels: list[int] | None = None  # blocks of the encoder, from 1; null: the last
    tokenizer: Literal["image", "video"] = "image"
    encoder_bf16: bool = False  # the frozen encoder under bf16 autocast, on CUDA only; DINOv3's protocol is fp32
    workers: int = 0  # threads that read and augment the next training images; 0: this one does, when they are wanted
    label_stride: int = 1  # every so many pixels of a truth are learnt from; scores always see all

    def __post_init__(self) -> None:
        if self.label_stride < 1 or self.workers < 0:
            raise ValueError(
                f"label_stride={self.label_stride} must be at least 1, workers={self.workers} not negative"
            )
        if self.levels is not None and any(level < 1 for level in self.levels or [0]):
            raise ValueError(f"levels={self.levels}: recipes count blocks from 1 as the papers do")
        if self.cache.folder is not None and self.augment.is_random:
            raise ValueError(
                "cache.folder is set, but augment makes every view new, so that nothing would be found again: leave "
                "cache.folder out, or set augment.border=null augment.crop=null augment.rotate=0 augment.colours=false "
                "augment.brightness=0 augment.scale_min=1 augment.scale_max=1"
            )

    def task(self, question: str) -> str:
        """The name of its rows: `linear_QUESTION_SET` or `attentive_QUESTION_SET`."""
        return f"{self.head.kind}_{question}_{self.data.dataset}"

    @property
    def level_indices(self) -> tuple[int, ...]:
        """0-based; () for the last."""
        return tuple(level - 1 for level in self.levels or [])

    def numbers(self) -> str:
        """A digest of what decides the numbers of a fit."""
        kept = asdict(self)
        kept.pop("cache")
        kept.pop("workers")
        kept["dtype"] = self.cache.dtype
        for name in ("state", "save_every"):
            kept["fit"].pop(name)
        kept["data"].pop("root")
        return config_hash(repr(kept))


@dataclass
class SegmentationConfig(DenseConfig):
    """A class for every pixel of an image, out of frozen tokens (reference evaluation.md 1.3)."""

    dropout: float = 0.1  # of whole channels
    per_class: bool = False  # the IoU of every class as well

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in 0 <= dropout < 1")


@dataclass
class DepthConfig(DenseConfig):
    """Metres for every pixel of an image, out of frozen tokens (reference evaluation.md 1.4)."""

    num_bins: int = 256
    min_depth: float = 1e-3  # metres; also the smallest depth that is scored
    max_depth: float = 10.0
    mask: MaskName = "none"  # which pixels of a test image are scored
    flip_average: bool = True  # predict the mirrored image too, and average
    mean_steps: int = 100  # first steps whose loss is its term of the mean alone

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_bins < 2 or not 0 < self.min_depth < self.max_depth:
            raise ValueError(
                f"num_bins={self.num_bins} must be at least 2, and 0 < min_depth={self.min_depth} < "
                f"max_depth={self.max_depth} must hold"
            )


def load_segmentation(name: str, overrides: Sequence[str] = ()) -> SegmentationConfig:
    """The recipe of a labelled set under `key=value` overrides, such as data.root=DIR."""
    return _load(SegmentationConfig, "segmentation", name, overrides)


def load_depth(name: str, overrides: Sequence[str] = ()) -> DepthConfig:
    """The recipe of a set with depth under `key=value` overrides, such as data.root=DIR."""
    return _load(DepthConfig, "depth", name, overrides)


def _load(schema: type[C], task: str, name: str, overrides: Sequence[str]) -> C:
    path = RECIPES / task / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in path.parent.glob("*.yaml")))
        raise ConfigError(f"there is no {task} recipe {name!r}. Recipes: {known}")
    return resolve(schema, [read_recipe(path)], list(map(_as_text, overrides)))


def _as_text(override: str) -> str:
    """A split as it is written: YAML takes 100:30 for minutes and seconds, and 700: for a mapping."""
    key, equals, value = override.partition("=")
    is_plain = bool(value) and not value.startswith(("'", '"'))
    return f"{key}{equals}'{value}'" if key in ("data.train_split", "data.test_split") and is_plain else override


def _check_size(name: str, size: Any) -> None:
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"{name}={size} must be height and width, such as [512, 512], or null")
