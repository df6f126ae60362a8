"""What evaluations of whole clips may be told; recipes are `evals/recipes/pooled/NAME.yaml`, unknown keys are errors.

A recipe names its `task`, and with it its schema: a recipe of one's own is another file of one of these tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from omegaconf import MISSING, OmegaConf

from evals.augment import AugmentConfig
from evals.clip_protocol import ClipProtocol
from evals.dense_config import RECIPES, CacheConfig
from evals.grid import SGD, Setting, grid
from evals.labelled_files import DataMissing, FileIndex, check_splits, read_index
from evals.labelled_layouts import DATASETS, Split
from evals.media import is_image, list_media
from evals.neighbours import NEIGHBOURS, TEMPERATURE
from vjepa.config import ConfigError, config_hash, read_recipe, resolve

POOLED = RECIPES / "pooled"
ClipReadout = Literal["mean", "mean_std"]
"""Of a clip: the mean of its tokens; or that, and beside it their standard deviation over time, mean over places."""
DINOV3_LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)


# ------------------------------------------------------------------------------------------------------ which files


@dataclass
class LabelledData:
    """Videos or images with a class each, in a layout of `evals.labelled_layouts`."""

    name: str = "folders"  # of labelled_layouts.DATASETS; folders: train/CLASS/FILE, val/CLASS/FILE of your own
    root: str = MISSING  # folder of the set; the error where it is not found says how it should look
    train_files: str | None = None  # list of 'path label' lines in place of the set's own
    validation_files: str | None = None
    skip_missing: bool = False  # go on without files that are named and not on disk
    skip_damaged: bool = False  # go on without files that cannot be decoded

    def __post_init__(self) -> None:
        if self.name not in DATASETS:
            raise ValueError(f"data.name={self.name} is unknown: choose one of {', '.join(sorted(DATASETS))}")

    def index(self, split: Split) -> FileIndex:
        """The files of a split. Raises DataMissing."""
        files = self.train_files if split == "train" else self.validation_files
        return read_index(self.name, self.root, split, files=files, skip_missing=self.skip_missing)


@dataclass
class FolderData:
    """Any folder of videos or images; nothing needs a label."""

    root: str = MISSING  # everything below it that is a video or an image by its ending
    frame_folders: bool = False  # true: a folder of images is a video, its frames in the order of their names
    skip_damaged: bool = False  # go on without files that cannot be decoded

    def paths(self, kind: Literal["any", "video"] = "any") -> tuple[Path, ...]:
        """In the order of their names. Raises DataMissing where there are none."""
        root = Path(self.root)
        found = list_media(root, frame_folders=self.frame_folders) if root.is_dir() else []
        found = [path for path in found if kind == "any" or path.is_dir() or not is_image(path)]
        if not found:
            wanted = "videos" if kind == "video" else "videos or images"
            reason = f"holds no {wanted}" if root.is_dir() else "is no folder"
            raise DataMissing(
                f"{root} {reason}. Expected as data.root: a folder with {wanted} in it or in its subfolders "
                "(data.frame_folders=true takes folders of images for videos)"
            )
        return tuple(found)


# -------------------------------------------------------------------------------------------------------- how probed


@dataclass
class LinearFit:
    """A linear layer for each learning rate, all trained at once, the best chosen on held-out training files."""

    lrs: list[float] = field(default_factory=lambda: list(DINOV3_LRS))
    weight_decay: float = 0.0
    momentum: float = 0.9
    steps: int = 12_500  # DINOv3: 10 epochs of 1250; the learning rate falls to 0 as a cosine
    batch_size: int = 128  # over all ranks
    held_out: float = 0.1  # share of training files, one at least, on which the head is chosen
    standardise: bool = False  # features to mean 0 and standard deviation 1 by the training files' statistics

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size) < 1 or not 0 < self.held_out < 1:
            raise ValueError(
                f"fit: steps={self.steps} and batch_size={self.batch_size} must be at least 1, "
                f"0 < held_out={self.held_out} < 1"
            )
        try:
            _ = self.settings, self.optim
        except ValueError as error:
            raise ValueError(f"fit: {error}") from error

    @property
    def settings(self) -> tuple[Setting, ...]:
        return grid(self.lrs, [self.weight_decay])

    @property
    def optim(self) -> SGD:
        return SGD(self.momentum)


@dataclass
class PooledConfig(ABC):
    """What all of them share: how a file becomes clips, and where features are kept."""

    task: str = ""  # which schema of SCHEMAS
    name: str = ""  # the recipe's
    source: str = ""  # where the figures are from
    clips: ClipProtocol = field(default_factory=lambda: ClipProtocol(segments=1, views=1))
    cache: CacheConfig = field(default_factory=CacheConfig)  # of features by the content of their files
    workers: int = 0  # threads that decode ahead
    batch_clips: int = 8  # that the encoder sees at a time
    seed: int = 0

    def __post_init__(self) -> None:
        if self.workers < 0 or self.batch_clips < 1:
            raise ValueError(f"workers={self.workers} must not be negative, batch_clips={self.batch_clips} at least 1")
        if self.clips.validation_offset == "random" or self.clips.augment != AugmentConfig():
            raise ValueError(
                "clips.validation_offset=random and clips.augment are for attentive probes: clips here are the same "
                "every time"
            )

    def numbers(self) -> str:
        """A digest of what decides the numbers; where the data lie is not among it."""
        kept = asdict(self)
        kept["dtype"] = kept.pop("cache")["dtype"]
        for name in ("source", "workers", "batch_clips"):
            kept.pop(name)
        kept["data"].pop("root")
        return config_hash(repr(kept))

    @property
    def row(self) -> str:
        """The headline's name in the results."""
        return f"pooled_{self.name}"

    @abstractmethod
    def describe(self) -> str:
        """A text of which files there are. Raises DataMissing."""
        ...


@dataclass
class LabelledConfig(PooledConfig):
    """Files with a class each, as one vector each."""

    data: LabelledData = field(default_factory=LabelledData)
    readout: ClipReadout = "mean"

    @property
    def splits(self) -> tuple[Split, ...]:
        return ("train", "validation")

    def describe(self) -> str:
        indices = [self.data.index(split) for split in self.splits]
        if len(indices) == 2:
            check_splits(*indices)
        found = [f"{index.labels} {' '.join(map(str, index.paths))}" for index in indices]
        return f"{Path(self.data.root).resolve()} {found}"


@dataclass
class KnnConfig(LabelledConfig):
    """The class that the nearest training files vote for (reference evaluation.md 1.6)."""

    neighbours: list[int] = field(default_factory=lambda: list(NEIGHBOURS))
    headline: int = 20  # which k has the evaluation's name; the others are rows beside it
    temperature: float = TEMPERATURE

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.neighbours or min(self.neighbours) < 1 or self.temperature <= 0:
            raise ValueError(
                f"neighbours={self.neighbours} must be at least 1 and temperature={self.temperature} positive"
            )
        if self.headline not in self.neighbours:
            raise ValueError(f"headline={self.headline} must be one of neighbours={self.neighbours}")


@dataclass
class LinearConfig(LabelledConfig):
    """DINOv3's linear probe on the mean of a clip's tokens."""

    fit: LinearFit = field(default_factory=LinearFit)


@dataclass
class RetrievalConfig(LabelledConfig):
    """Which files a file finds first: its own class, or others."""

    at: list[int] = field(default_factory=lambda: [1, 5, 10])
    leave_one_out: bool = False  # true: every training file is looked for among the others; no validation is read

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.at or min(self.at) < 1:
            raise ValueError(f"at={self.at}: ranks are at least 1")

    @property
    def splits(self) -> tuple[Split, ...]:
        return ("train",) if self.leave_one_out else ("train", "validation")

    def describe(self) -> str:
        try:
            return super().describe()
        except DataMissing as error:
            raise DataMissing(
                f"{error}\nWhere there is one split alone, leave_one_out=true looks for each of its files among the "
                "others."
            ) from error


@dataclass
class MotionOnlyConfig(LabelledConfig):
    """The same probe on clips, on clips that stand still and on clips out of order: what of it is motion?"""

    fit: LinearFit = field(default_factory=LinearFit)
    shuffle_seed: int = 0

    def describe(self) -> str:
        images = [path for split in self.splits for path in self.data.index(split).paths if is_image(path)]
        if images:
            raise DataMissing(f"motion is asked for, and {images[0]} is an image ({len(images)} are): give videos")
        return super().describe()


@dataclass
class ArrowOfTimeConfig(PooledConfig):
    """Does a clip run forward or backward? Any videos will do."""

    data: FolderData = field(default_factory=FolderData)
    readout: ClipReadout = "mean_std"
    fit: LinearFit = field(default_factory=LinearFit)
    folds: int = 5  # parts of the videos; each is scored by heads trained on the others
    group_by_folder: bool = False  # files of one folder are never in two parts: for clips cut out of one film

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds < 2:
            raise ValueError(f"folds={self.folds} must be at least 2")

    def describe(self) -> str:
        return f"{Path(self.data.root).resolve()} {' '.join(map(str, self.data.paths('video')))}"


@dataclass
class StatisticsConfig(PooledConfig):
    """Numbers that tell collapse from health, on tokens and on clips' means."""

    data: FolderData = field(default_factory=FolderData)
    tokens: int = 25_600  # drawn by the seed, as many from each clip
    max_files: int = 1024  # drawn by the seed where there are more

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 2 or self.max_files < 1:
            raise ValueError(f"tokens={self.tokens} must be at least 2, max_files={self.max_files} at least 1")

    def describe(self) -> str:
        return f"{Path(self.data.root).resolve()} {' '.join(map(str, self.data.paths()))}"


@dataclass
class PcaConfig(PooledConfig):
    """Pictures of the three main directions of a clip's tokens."""

    data: FolderData = field(default_factory=FolderData)
    files: int = 4  # the first so many

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.files < 1:
            raise ValueError(f"files={self.files} must be at least 1")

    def describe(self) -> str:
        return f"{Path(self.data.root).resolve()} {' '.join(map(str, self.data.paths()[: self.files]))}"


SCHEMAS: dict[str, type[PooledConfig]] = {
    "knn": KnnConfig,
    "linear": LinearConfig,
    "retrieval": RetrievalConfig,
    "motion_only": MotionOnlyConfig,
    "arrow_of_time": ArrowOfTimeConfig,
    "statistics": StatisticsConfig,
    "pca": PcaConfig,
}


def list_pooled() -> list[str]:
    """The recipes: first those that are called after a task, in the tasks' order, then others."""
    found = {path.stem for path in POOLED.glob("*.yaml")}
    return [name for name in SCHEMAS if name in found] + sorted(found - set(SCHEMAS))


def load_pooled(name: str, overrides: Sequence[str] = ()) -> PooledConfig:
    """The recipe of this name under `key=value` overrides; ConfigError for unknown names, keys and bad values."""
    path = POOLED / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"there is no pooled recipe {name!r}. Recipes: {', '.join(list_pooled())}")
    recipe = read_recipe(path)
    if recipe.get("task") not in SCHEMAS:
        raise ConfigError(f"{path}: task={recipe.get('task')} is unknown: choose one of {', '.join(SCHEMAS)}")
    if any(override.startswith("task=") for override in overrides):
        raise ConfigError("task says which settings there are and cannot be changed: write a recipe of that task")
    return resolve(SCHEMAS[recipe["task"]], [recipe, OmegaConf.create({"name": name})], overrides)
