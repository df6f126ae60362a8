"""Evaluations of whole clips of one's own videos and images, as one kind of evaluation among the registry's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.features import FeatureSource
from evals.floors import Floor
from evals.models import Model, rehearse_clips
from evals.pooled_config import (
    ArrowOfTimeConfig,
    KnnConfig,
    LinearConfig,
    MotionOnlyConfig,
    PcaConfig,
    PooledConfig,
    RetrievalConfig,
    StatisticsConfig,
    load_pooled,
)
from evals.protocol import Score
from evals.results import PICTURES
from evals.tasks.pooled_labels import knn, linear, retrieval
from evals.tasks.pooled_motion import arrow_of_time, motion_only
from evals.tasks.pooled_pca import pca
from evals.tasks.pooled_statistics import statistics
from vjepa.train.distributed import ALONE, World


@dataclass
class Pooled:
    """One recipe of `recipes/pooled`."""

    name: str
    config: PooledConfig
    floors: tuple[str, ...] = ()

    @classmethod
    def load(cls, name: str, overrides: Sequence[str]) -> Pooled:
        return cls(name, load_pooled(name, overrides))

    def open(self) -> str:
        return self.config.describe()

    def numbers(self) -> str:
        return self.config.numbers()

    def column(self, model: Model | Floor) -> str:
        return model.name

    def rehearse(self, model: Model) -> None:
        rehearse_clips(model.last(), self.config.clips, model)

    def measure(self, model: Model | Floor, out: Path, world: World) -> list[Score]:
        assert not isinstance(model, Floor)  # there is none
        return evaluate(model.last(), self.config, out / PICTURES / self.name / model.name, world=world)


def evaluate(source: FeatureSource, config: PooledConfig, pictures: Path, *, world: World = ALONE) -> list[Score]:
    """All scores of a source by a recipe, the headline first; `pictures` is the folder of those that draw some."""
    match config:
        case KnnConfig():
            return knn(source, config, world=world)
        case LinearConfig():
            return linear(source, config, world=world)
        case RetrievalConfig():
            return retrieval(source, config, world=world)
        case MotionOnlyConfig():
            return motion_only(source, config, world=world)
        case ArrowOfTimeConfig():
            return arrow_of_time(source, config, world=world)
        case StatisticsConfig():
            return statistics(source, config, world=world)
        case PcaConfig():
            return pca(source, config, pictures, world=world)
    raise AssertionError(f"{type(config).__name__} is a schema of no task")
