"""A suite of questions on a labelled set out of our shards: an encoder beside its untrained self and the pixels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from evals.datasets import LabelledClips, read_labelled
from evals.features import EncoderFeatures, FeatureSet, FeatureSource, PixelFeatures, read_features
from evals.protocol import RGB, RGB_DIFFERENCE, TRAINED, UNTRAINED, EvalConfig, Kind, Readout, Row, Score, Task
from evals.suites import Suite
from evals.tasks import classification, knn, segmentation
from vjepa.hub import CONFIG
from vjepa.nn.encoder import Encoder
from vjepa.nn.init import WEIGHT_STD
from vjepa.registry import create_encoder


class Evaluator(Protocol):
    """What every module of `evals/tasks/` offers."""

    def __call__(
        self, tasks: Sequence[Task], train: FeatureSet, test: FeatureSet, config: EvalConfig
    ) -> Iterator[Score]: ...


EVALUATORS: dict[Kind, Evaluator] = {
    "classification": classification.evaluate,
    "knn": knn.evaluate,
    "segmentation": segmentation.evaluate,
}


def default_sources(encoder: Encoder, *, seed: int = 0, init_std: float = WEIGHT_STD) -> list[FeatureSource]:
    """The trained encoder and what it is measured against: itself before training, and the two made of pixels.

    `seed` and `init_std` are those the training started from.
    """
    device = next(encoder.parameters()).device
    untrained = create_encoder(encoder.config, device="cpu", seed=seed, weight_std=init_std).to(device)
    return [
        EncoderFeatures(TRAINED, encoder),
        EncoderFeatures(UNTRAINED, untrained),
        PixelFeatures(encoder.patch_size, encoder.tubelet_size),
        PixelFeatures(encoder.patch_size, encoder.tubelet_size, difference=True),
    ]


def read_splits(
    suite: Suite, data: Path | str, *, patch_size: int, tubelet_size: int
) -> tuple[LabelledClips, LabelledClips]:
    """The clips that probes are fitted on and those they are scored on, with labels on the grid of the tokens."""
    reader = suite.label_reader(patch_size=patch_size, tubelet_size=tubelet_size)
    train, test = (read_labelled(Path(data) / split, reader) for split in (suite.train_split, suite.test_split))
    shared = set(train.keys) & set(test.keys)
    if shared:
        raise ValueError(f"{data}: {len(shared)} records are in both splits, such as {min(shared)}")
    return train, test


def score_source(
    suite: Suite, source: FeatureSource, train: LabelledClips, test: LabelledClips, config: EvalConfig
) -> list[Score]:
    """The scores of one source in the order of the suite's tasks; its features are read once for all of them."""
    readouts: dict[Readout, None] = dict.fromkeys(task.readout for task in suite.tasks)
    kinds: dict[Kind, None] = dict.fromkeys(task.kind for task in suite.tasks)
    train_set, test_set = (
        read_features(source, data, readouts, batch_size=config.batch_size) for data in (train, test)
    )
    scores: list[Score] = []
    for kind in kinds:
        tasks = [task for task in suite.tasks if task.kind == kind]
        scores += EVALUATORS[kind](tasks, train_set, test_set, config)
    return sorted(scores, key=lambda score: _place(suite, score))


def _place(suite: Suite, score: Score) -> int:
    """Which task of the suite a score belongs to: of those whose name it begins with, the longest."""
    names = [task.name for task in suite.tasks]
    return names.index(max((name for name in names if f"{score.task}_".startswith(f"{name}_")), key=len))


def run_suite(
    suite: Suite,
    sources: Sequence[FeatureSource],
    train: LabelledClips,
    test: LabelledClips,
    config: EvalConfig | None = None,
    *,
    stage: str,
    step: int | None = None,
    training_seed: int | None = None,
) -> list[Row]:
    """All tasks of a suite on every source; the training seed is said of encoders, pixels have none."""
    rows = []
    for source in sources:
        scores = score_source(suite, source, train, test, config or EvalConfig())
        seed = None if source.name in (RGB, RGB_DIFFERENCE) else training_seed
        rows += [Row.of(score, stage=stage, model=source.name, step=step, training_seed=seed) for score in scores]
    return rows


def read_pretraining(model: Path) -> dict[str, Any]:
    """What an exported encoder's config.json says about its training: stage, seed, frames, size; {} for other files."""
    config = model / CONFIG
    return json.loads(config.read_text()).get("pretraining", {}) if config.is_file() else {}
