"""What an evaluation is, in records: a task, the settings of its probe, a score, a row of the table.

One task gives one headline number under its own name, so a reader of `summary.json` needs no more than the name.
Readouts, probes and metrics are part of the task: they are fixed before a result is looked at.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Readout = Literal["mean", "msm", "tokens"]
"""What a probe sees of a clip: the mean of its tokens, mean, std and max side by side, or every token."""
Kind = Literal["classification", "knn", "segmentation"]
PROBES: dict[Kind, str] = {"classification": "linear", "knn": "knn", "segmentation": "linear"}

TRAINED, UNTRAINED = "trained", "untrained"
RGB, RGB_DIFFERENCE = "rgb", "rgb_difference"
MODELS = (TRAINED, UNTRAINED, RGB, RGB_DIFFERENCE)  # the order of the table's columns

IGNORE = -100
"""The label of what counts neither in fitting nor in scoring (torch's default)."""


class NotThere(ValueError):
    """A set is not on the disk, or not whole; the message has the tree that was expected."""


class Unsuited(ValueError):
    """An evaluation makes no sense for a model; the message says why."""


class DoesNotFit(Unsuited):
    """A model cannot take pictures or clips of the recipe's size; the message says what to set."""


@dataclass(frozen=True)
class Focus:
    """A part of a segmentation: the accuracy over the tokens whose true class is one of these."""

    name: str
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """One question put to frozen features."""

    name: str
    """Its name in the results; DESIGN section 8 fixes those of the demo."""
    kind: Kind
    """Which module of `evals/tasks/` answers it."""
    label: str
    """Which of the set's labels is the truth."""
    classes: tuple[str, ...]
    """Class names, in the order of the label's numbers."""
    readout: Readout
    per_class: bool = False
    """Whether a segmentation gives the IoU of every class as well, as NAME_CLASS."""
    focus: Focus | None = None
    """A segmentation's extra accuracy, as NAME_FOCUS."""

    def __post_init__(self) -> None:
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"task {self.name}: classes={self.classes} must be at least two different names")
        if (self.readout == "tokens") != (self.kind == "segmentation"):
            raise ValueError(
                f"task {self.name}: readout={self.readout!r} does not fit kind={self.kind!r}; a segmentation reads "
                "tokens, anything else mean or msm"
            )
        missing = set(self.focus.classes) - set(self.classes) if self.focus else set()
        if missing:
            raise ValueError(f"task {self.name}: focus names {sorted(missing)}, which are not among its classes")

    @property
    def probe(self) -> str:
        return PROBES[self.kind]


@dataclass(frozen=True)
class FitConfig:
    """How a linear probe is fitted (reference demo-learning.md, section 2: AdamW 5e-3, 1e-3, 300 steps, cosine)."""

    lr: float = 5e-3
    """Learning rate of the first step; it falls to 0 as a cosine."""
    weight_decay: float = 1e-3
    """On weights and biases alike, as in the probes of V-JEPA 2 (reference evaluation.md 1.1)."""
    steps: int = 300
    batch_size: int = 4096
    """Rows per step, drawn without repeats within a pass; all rows at once where there are no more than this."""
    init_std: float = 0.01
    """Of the first weights (the linear head of DINOv3, evaluation.md 1.3); biases start at 0."""

    def __post_init__(self) -> None:
        if min(self.lr, self.steps, self.batch_size) <= 0 or min(self.weight_decay, self.init_std) < 0:
            raise ValueError(
                f"{self}: lr, steps and batch_size must be positive, weight_decay and init_std not negative"
            )


@dataclass(frozen=True)
class KnnConfig:
    """Cosine k-NN with the settings of DINO (reference evaluation.md 1.6: k = 20, T = 0.07)."""

    k: int = 20
    temperature: float = 0.07

    def __post_init__(self) -> None:
        if self.k < 1 or self.temperature <= 0:
            raise ValueError(f"{self}: k must be at least 1 and temperature positive")


@dataclass(frozen=True)
class EvalConfig:
    """The settings that all tasks of a suite share."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Every fitted probe is fitted once with each; k-NN has nothing to fit and is scored once, as the first seed."""
    batch_size: int = 64
    """Clips per encoder pass."""
    fit: FitConfig = FitConfig()
    knn: KnnConfig = KnnConfig()

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={self.seeds}: give at least one, without repeats")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: must be at least 1")


@dataclass(frozen=True)
class Score:
    """One number of one task; evaluations yield these and know nothing of models, stages and files."""

    task: str
    probe: str
    metric: str
    seed: int
    """Of the probe's fit."""
    value: float
    higher_is_better: bool = True


@dataclass(frozen=True)
class Row:
    """A score and what it was measured on: an entry of `evals` in summary.json (DESIGN section 8)."""

    stage: str
    task: str
    probe: str
    metric: str
    higher_is_better: bool
    model: str
    seed: int
    value: float
    step: int | None = None
    """Training step of the weights, where they are not a finished stage's: the training curve."""
    training_seed: int | None = None
    """Where several trainings share a table."""
    digest: str | None = None
    """Of the model's weights, the recipe and the files it was measured on, by which it is found again."""

    @classmethod
    def of(
        cls,
        score: Score,
        *,
        stage: str,
        model: str,
        step: int | None = None,
        training_seed: int | None = None,
        digest: str | None = None,
    ) -> Row:
        return cls(**asdict(score), stage=stage, model=model, step=step, training_seed=training_seed, digest=digest)

    @property
    def identity(self) -> tuple[Any, ...]:
        """All but value and digest: measured again, a row with the same identity takes the place of the old one."""
        return tuple(value for name, value in asdict(self).items() if name not in ("value", "digest"))

    def to_json(self) -> dict[str, Any]:
        """The fields of DESIGN section 8; `step`, `training_seed` and `digest` only where they are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}
