"""Classes of whole clips by their features: nearest neighbours, retrieval, DINOv3's linear probe."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from evals.features import FeatureSource
from evals.labelled_files import FileIndex
from evals.labelled_layouts import Split
from evals.neighbours import knn_accuracy, leave_one_out_retrieval, retrieval_scores
from evals.pooled_config import KnnConfig, LabelledConfig, LinearConfig, RetrievalConfig
from evals.pooled_features import UNCHANGED, Change, pooled_table
from evals.pooled_probe import Rows, held_out_keys, probe
from evals.protocol import Score
from vjepa.train.distributed import ALONE, World

log = logging.getLogger(__name__)


def read_rows(
    source: FeatureSource,
    index: FileIndex,
    config: LabelledConfig,
    *,
    changes: Sequence[Change] = UNCHANGED,
    world: World = ALONE,
) -> list[Rows]:
    """A vector for every file, mean over its segments, under each change."""
    skip = config.data.skip_damaged
    table = pooled_table(source, index.paths, config, config.readout, skip_damaged=skip, changes=changes, world=world)
    values, labels = table.labelled(index.labels)
    return [Rows(each.mean(dim=1), labels) for each in values.unbind(dim=1)]


def read_split(source: FeatureSource, split: Split, config: LabelledConfig, world: World = ALONE) -> tuple[Rows, int]:
    """A split's rows and how many classes the set has."""
    index = config.data.index(split)
    return read_rows(source, index, config, world=world)[0], len(index.classes)


def knn(source: FeatureSource, config: KnnConfig, *, world: World = ALONE) -> list[Score]:
    """Accuracy for every k, the headline's first."""
    (train, num_classes), (test, _) = (read_split(source, split, config, world) for split in config.splits)
    if max(config.neighbours) > len(train):
        log.warning("%s: there are %d training files; a larger k asks all of them", config.row, len(train))
    found = knn_accuracy(
        train.features,
        train.labels,
        test.features,
        test.labels,
        num_classes=num_classes,
        neighbours=config.neighbours,
        temperature=config.temperature,
    )
    others = [k for k in config.neighbours if k != config.headline]
    names = {config.headline: config.row, **{k: f"{config.row}_k{k}" for k in others}}
    return [Score(name, "knn", "accuracy", config.seed, found[k]) for k, name in names.items()]


def retrieval(source: FeatureSource, config: RetrievalConfig, *, world: World = ALONE) -> list[Score]:
    """Mean average precision, then the recalls."""
    gallery, _ = read_split(source, "train", config, world)
    if config.leave_one_out:
        found = leave_one_out_retrieval(gallery.features, gallery.labels, at=config.at)
    else:
        queries, _ = read_split(source, "validation", config, world)
        found = retrieval_scores(queries.features, queries.labels, gallery.features, gallery.labels, at=config.at)
    names = {metric: config.row if metric == "mAP" else f"{config.row}_{metric}" for metric in found}
    return [Score(names[metric], "retrieval", metric, config.seed, value) for metric, value in found.items()]


def linear(source: FeatureSource, config: LinearConfig, *, world: World = ALONE) -> list[Score]:
    """Accuracy of the head that held-out training files prefer, then the best head's on validation itself."""
    index = config.data.index("train")
    train, held_out = (
        read_rows(source, part, config, world=world)[0]
        for part in split_training(index, config.fit.held_out, config.seed)
    )
    test, _ = read_split(source, "validation", config, world)
    hits = probe(train, held_out, test, len(index.classes), config.fit, seed=config.seed, world=world)
    found = {config.row: hits.accuracy, f"{config.row}_max_over_heads": hits.max_over_heads}
    return [Score(name, "linear", "accuracy", config.seed, value) for name, value in found.items()]


def split_training(index: FileIndex, share: float, seed: int) -> tuple[FileIndex, FileIndex]:
    """Training files to fit on and those to choose a head on, by a hash of their paths."""
    keys = [f"{path.parent.name}/{path.name}" for path in index.paths]
    held = held_out_keys(keys, share, seed=seed)
    rest = [i for i, key in enumerate(keys) if key not in held]
    return index.take(rest), index.take(i for i, key in enumerate(keys) if key in held)
