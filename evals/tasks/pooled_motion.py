"""How much of what features know is motion: clips against the same clips held still, out of order, backward."""

from __future__ import annotations

import torch
from torch import Tensor

from evals.features import FeatureSource
from evals.grid import MAX_OVER_HEADS
from evals.pooled_config import ArrowOfTimeConfig, MotionOnlyConfig
from evals.pooled_features import AS_IT_IS, BACKWARD, STILL, pooled_table, shuffled
from evals.pooled_probe import ProbeHits, Rows, held_out_keys, in_hashed_order, probe
from evals.protocol import Score
from evals.tasks.pooled_labels import read_rows, split_training
from vjepa.train.distributed import ALONE, World


def motion_only(source: FeatureSource, config: MotionOnlyConfig, *, world: World = ALONE) -> list[Score]:
    """Accuracy on clips minus that on their middle frame held still; then what it is made of, and chance.

    Each has its own probe, fitted and scored on the same view of the clips. Chance is what the commonest class of
    training gets.
    """
    changes = {"clip": AS_IT_IS, "still": STILL, "shuffled": shuffled(config.shuffle_seed)}
    index = config.data.index("train")
    parts = [*split_training(index, config.fit.held_out, config.seed), config.data.index("validation")]
    rows = [read_rows(source, part, config, changes=list(changes.values()), world=world) for part in parts]
    found, chance = dict[str, float](), 0.0
    for name, (train, held_out, test) in zip(changes, zip(*rows, strict=True), strict=True):
        hits = probe(train, held_out, test, len(index.classes), config.fit, seed=config.seed, world=world)
        found[name] = hits.accuracy
        chance = (test.labels == train.labels.mode().values).float().mean().item()
    differences = {"": found["clip"] - found["still"], "_order": found["clip"] - found["shuffled"]}
    found["chance"] = chance
    scores = [_score(config, f"{config.row}{end}", value, "accuracy difference") for end, value in differences.items()]
    return scores + [_score(config, f"{config.row}_{name}", value) for name, value in found.items()]


def arrow_of_time(source: FeatureSource, config: ArrowOfTimeConfig, *, world: World = ALONE) -> list[Score]:
    """Share of clips, shown forward and backward, whose direction is told right by heads that never saw their video."""
    data = config.data
    paths = data.paths("video")
    ways = (AS_IT_IS, BACKWARD)
    table = pooled_table(
        source, paths, config, config.readout, skip_damaged=data.skip_damaged, changes=ways, world=world
    )
    units = [
        str(path.parent) if config.group_by_folder else key for path, key in zip(paths, table.contents, strict=True)
    ]
    there = [unit for unit, is_there in zip(units, table.is_there.tolist(), strict=True) if is_there]
    hits = _cross_validated(table.values[table.is_there], there, config, world)
    count = sum(each.count for each in hits)
    by_head = [sum(rights) for rights in zip(*(each.right for each in hits), strict=True)]
    accuracy = sum(each.right[each.chosen] for each in hits) / count
    return [
        _score(config, config.row, accuracy),
        _score(config, f"{config.row}_{MAX_OVER_HEADS}", max(by_head) / count),
        _score(config, f"{config.row}_chance", 0.5),
    ]


def _cross_validated(values: Tensor, units: list[str], config: ArrowOfTimeConfig, world: World) -> list[ProbeHits]:
    """What heads trained on the other parts get right of each part; values [n, 2, S, D], units [n] are never split."""
    order = in_hashed_order(units, seed=config.seed)
    if len(order) < max(config.folds, 3):
        raise ValueError(
            f"{len(order)} different {'folders' if config.group_by_folder else 'videos'} do not divide into "
            f"folds={config.folds} parts with one left to choose a head on: give more, or set fewer folds"
        )
    found = []
    for fold in range(config.folds):
        tested = set(order[fold :: config.folds])
        held = held_out_keys([unit for unit in order if unit not in tested], config.fit.held_out, seed=config.seed)
        parts = (set(order) - tested - held, held, tested)
        train, held_out, test = (_both_ways(values, [unit in part for unit in units]) for part in parts)
        found.append(probe(train, held_out, test, 2, config.fit, seed=config.seed, world=world))
    return found


def _both_ways(values: Tensor, is_taken: list[bool]) -> Rows:
    """Clips [n, 2, S, D] of the files that are taken as rows: 0 forward, 1 backward."""
    taken = values[torch.tensor(is_taken)]
    labels = torch.arange(2)[None, :, None].expand(taken.shape[:3])
    return Rows(taken.flatten(0, 2), labels.flatten())


def _score(config: MotionOnlyConfig | ArrowOfTimeConfig, name: str, value: float, metric: str = "accuracy") -> Score:
    return Score(name, "linear", metric, config.seed, value)
