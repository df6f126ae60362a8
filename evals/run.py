"""Evaluate a frozen encoder beside its untrained self and the pixels: one command, one table.

    python -m evals.run --model runs/demo/exports/primary --suite motion --data DIR --out runs/demo

DIR holds a shard folder for each split of the suite: for `motion`, DIR/probe_train and DIR/test.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from evals.datasets import LabelledClips, read_labelled
from evals.features import EncoderFeatures, FeatureSet, FeatureSource, PixelFeatures, read_features
from evals.protocol import RGB, RGB_DIFFERENCE, TRAINED, UNTRAINED, EvalConfig, Kind, Readout, Row, Score, Task
from evals.results import print_table, save
from evals.suites import SUITES, Suite
from evals.tasks import classification, knn, segmentation
from vjepa.hub import CONFIG, from_pretrained
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
    untrained = create_encoder(encoder.config, seed=seed, weight_std=init_std)
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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evals.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of an exported encoder, or a released .pt")
    parser.add_argument("--suite", choices=sorted(SUITES), required=True, help="which questions")
    parser.add_argument("--data", type=Path, required=True, help="the suite's labelled set: a shard folder per split")
    parser.add_argument("--seeds", type=int, default=3, help="times every probe is fitted (default: 3)")
    parser.add_argument("--out", type=Path, help="run directory that keeps the results (default: only print them)")
    parser.add_argument(
        "--stage", help="name of the stage in the results (default: as trained, else the folder's name)"
    )
    parser.add_argument(
        "--untrained-seed", type=int, help="initialisation of the untrained encoder (default: as trained, else 0)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    begin = time.monotonic()
    suite, pretraining = SUITES[options.suite], read_pretraining(options.model)
    stage = options.stage or pretraining.get("stage") or options.model.stem
    seed = pretraining.get("seed", 0) if options.untrained_seed is None else options.untrained_seed
    encoder = from_pretrained(options.model)
    train, test = read_splits(suite, options.data, patch_size=encoder.patch_size, tubelet_size=encoder.tubelet_size)
    config = EvalConfig(seeds=tuple(range(options.seeds)))
    init_std = pretraining.get("init_std", WEIGHT_STD)
    sources = default_sources(encoder, seed=seed, init_std=init_std)
    trained_with = pretraining.get("seed")
    rows = run_suite(suite, sources, train, test, config, stage=stage, training_seed=trained_with)
    if options.out:
        save(options.out, rows)
    title = f"{suite.name}: probes on {len(train)} clips, {len(test)} test clips, {time.monotonic() - begin:.0f} s"
    print_table(rows, title=title)


if __name__ == "__main__":
    main()
