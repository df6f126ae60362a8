"""The settings of attentive probes: typed recipes under `recipes/probe/`, one per data set, unknown keys refused."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from omegaconf import MISSING, OmegaConf

from evals.anticipation import AnticipationConfig
from evals.attentive import AttentiveConfig
from evals.clip_protocol import ClipProtocol
from evals.dense_config import CacheConfig
from evals.dense_features import readable_blocks
from evals.grid import Setting, grid
from evals.labelled_layouts import DATASETS
from vjepa.config import ConfigError, config_hash, merge, read_recipe, to_object
from vjepa.nn.encoder import Encoder

RECIPES = Path(__file__).parent / "recipes" / "probe"
EPIC_KITCHENS = "ek100"
V2_BLOCKS = {
    24: (17, 19, 21, 23),
    40: (24, 29, 34, 39),
}  # depth of V-JEPA 2 -> blocks its probes of levels read, from 0


@dataclass
class ProbeData:
    """Which labelled set, and where it lies."""

    name: str  # one of evals.labelled_layouts.DATASETS, or ek100
    root: str  # folder of the set; the error where it is not found says how it should look
    train_files: str | None = None  # list of 'path label' lines in place of the set's own
    validation_files: str | None = None
    skip_missing: bool = False  # go on without files that are named and not on disk
    skip_damaged: bool = False  # go on without files that cannot be decoded; in training the next one stands in
    held_out: float = 0.1  # share of training files on which the best head is chosen; none of one head

    def __post_init__(self) -> None:
        if self.name not in (*DATASETS, EPIC_KITCHENS):
            known = ", ".join(sorted([*DATASETS, EPIC_KITCHENS]))
            raise ValueError(f"data.name={self.name} is unknown: choose one of {known}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"data.held_out={self.held_out} must be a share between 0 and 1")


@dataclass
class GridConfig:
    """A head for every pair, all trained at once on the same tokens."""

    lr: list[float] = field(default_factory=lambda: [5e-3, 3e-3, 1e-3, 3e-4, 1e-4])
    weight_decay: list[float] = field(default_factory=lambda: [0.01, 0.1, 0.4, 0.8])  # on all parameters, constant

    def __post_init__(self) -> None:
        if not self.lr or not self.weight_decay or min(self.lr) <= 0 or min(self.weight_decay) < 0:
            raise ValueError(f"grid: lr={self.lr} must be positive, weight_decay={self.weight_decay} not negative")

    def settings(self) -> tuple[Setting, ...]:
        """That of each head."""
        return grid(self.lr, self.weight_decay)


@dataclass
class ProbeSchedule:
    """How long heads are trained: AdamW with torch's betas, no clipping, no label smoothing."""

    epochs: int = 20
    batch_size: int = 256  # videos a step, over all ranks
    warmup_epochs: float = 0.0  # linear from start_lr to the head's own
    start_lr: float = 0.0
    final_lr: float = 0.0  # where the cosine ends
    val_every: int | None = (
        None  # epochs between two validations, for the papers' best epoch; null: after the last alone
    )

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"schedule: epochs={self.epochs} and batch_size={self.batch_size} must be at least 1, "
                f"warmup_epochs={self.warmup_epochs} below epochs"
            )
        if self.val_every is not None and self.val_every < 1:
            raise ValueError(f"schedule.val_every={self.val_every} must be at least 1; null validates once, at the end")
        if self.start_lr < 0 or self.final_lr < 0:
            raise ValueError(f"schedule: start_lr={self.start_lr} and final_lr={self.final_lr} must not be negative")

    def lr(self, peak: float, step: int, steps: int) -> float:
        """The learning rate at an update numbered from 0, of `steps` in all, for a head whose own is `peak`."""
        progress, warmup = step / steps, self.warmup_epochs / self.epochs
        if progress < warmup:
            return self.start_lr + (peak - self.start_lr) * progress / warmup
        share = (progress - warmup) / (1 - warmup)
        return self.final_lr + (peak - self.final_lr) * 0.5 * (1 + math.cos(math.pi * share))


@dataclass
class ProbeConfig:
    """One attentive evaluation of one data set."""

    name: str = ""  # the recipe's
    source: str = ""  # where the figures are from
    data: ProbeData = MISSING
    clips: ClipProtocol = field(default_factory=ClipProtocol)
    encoder_bf16: bool = True  # the frozen encoder under bf16 autocast, on CUDA only; the papers: fp16, EK100 bf16
    levels: list[int] = field(
        default_factory=lambda: [-1]
    )  # blocks from 1, -1: the last, []: all with a norm (V-JEPA 2: its four)
    head: AttentiveConfig = field(default_factory=AttentiveConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    schedule: ProbeSchedule = field(default_factory=ProbeSchedule)
    anticipation: AnticipationConfig = field(default_factory=AnticipationConfig)  # of ek100 only
    augmented: bool = True  # false: training clips are the middle view of validation, the same in every epoch
    cache: CacheConfig = field(default_factory=CacheConfig)  # of tokens of clips that are the same every time
    state: str | None = None  # folder for the state of the fit, which then goes on after a stop
    save_every: int = 500  # steps between two savings of the state
    workers: int = 0  # processes that decode videos; 0: this one does
    score_batch: int = 16  # videos at a time in scoring
    seed: int = 0

    def __post_init__(self) -> None:
        if any(level == 0 or level < -1 for level in self.levels):
            raise ValueError(f"levels={self.levels}: blocks count from 1 here, and -1 is the last")
        if self.is_anticipation and (self.clips.fps is None or (self.clips.segments, self.clips.views) != (1, 1)):
            raise ValueError(
                "ek100 takes one clip by its rate, in one view: set clips.fps, clips.frame_step=null, clips.segments=1 "
                f"and clips.views=1, not {self.clips}"
            )
        if self.is_anticipation and (self.data.train_files or self.data.validation_files):
            raise ValueError("ek100 reads its own tables: leave data.train_files and data.validation_files out")
        if self.workers < 0 or min(self.score_batch, self.save_every) < 1:
            raise ValueError(
                f"workers={self.workers} must not be negative, score_batch={self.score_batch} and "
                f"save_every={self.save_every} at least 1"
            )
        if self.cache.folder is not None and (self.is_anticipation or self.clips.validation_offset == "random"):
            raise ValueError(
                "cache.folder is set, but no clips are the same every time: leave it out for ek100 and with "
                "clips.validation_offset=random"
            )

    def numbers(self) -> str:
        """A digest of what decides the numbers of a fit; where the data lie is not among it."""
        kept = asdict(self)
        kept["dtype"] = kept.pop("cache")["dtype"]
        for name in ("state", "save_every", "workers", "score_batch", "source"):
            kept.pop(name)
        kept["data"].pop("root")
        return config_hash(repr(kept))

    @property
    def is_anticipation(self) -> bool:
        return self.data.name == EPIC_KITCHENS

    def blocks(self, encoder: Encoder) -> tuple[int, ...]:
        """The blocks that are read, from 0, for `dense_features.LevelFeatures`."""
        depth, readable = encoder.config.depth, readable_blocks(encoder)
        blocks = tuple((depth if level == -1 else level) - 1 for level in self.levels)
        if not blocks:  # all that have a norm; V-JEPA 2 has one for all
            blocks = encoder.levels if len(encoder.levels) > 1 else V2_BLOCKS.get(depth, encoder.levels)
        if without := [block + 1 for block in blocks if block not in readable]:
            counted = [level + 1 for level in readable]
            raise ValueError(f"levels: block {without[0]} (from 1) has no norm in this encoder; {counted} have one")
        return blocks


def list_recipes() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_probe(name: str, overrides: Sequence[str] = ()) -> ProbeConfig:
    """The recipe of this name under `key=value` overrides; ConfigError for unknown names, keys and bad values."""
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        close = difflib.get_close_matches(name, list_recipes(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"there is no probe recipe {name!r}.{hint} Recipes: {', '.join(list_recipes())}")
    return to_object(merge(ProbeConfig, [read_recipe(path), OmegaConf.create({"name": name})], overrides))
