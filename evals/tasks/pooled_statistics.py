"""Is a representation alive? Ranks, spreads and cosines of the tokens and clips of any folder, no labels."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from evals.features import FeatureSource
from evals.grid import generator
from evals.pooled_config import StatisticsConfig
from evals.pooled_features import Media, features_of, read_files
from evals.protocol import Score
from evals.statistics import feature_statistics
from vjepa.train.distributed import ALONE, World

log = logging.getLogger(__name__)
BETTER_LOW = ("dead_share", "cosine")


def statistics(source: FeatureSource, config: StatisticsConfig, *, world: World = ALONE) -> list[Score]:
    """RankMe of tokens, then all statistics of tokens and of clips' means."""
    paths = config.data.paths()
    order = torch.randperm(len(paths), generator=generator(config.seed, "files"))
    chosen = [paths[i] for i in sorted(order[: config.max_files].tolist())]
    wanted = 2 * config.tokens if config.data.skip_damaged else config.tokens  # half the files may turn out damaged
    each = -(-wanted // len(chosen))

    def keep(number: int, media: Media, tokens: Tensor) -> Tensor:
        """[rows + 1, D]: tokens of a file drawn by the seed, and the mean of all of them."""
        flat = tokens.flatten(0, -2).float()
        drawn = torch.randperm(len(flat), generator=generator(config.seed, "tokens", number))[:each]
        return torch.cat([flat[drawn], flat.mean(dim=0, keepdim=True)])

    skip = config.data.skip_damaged
    table = read_files(features_of(source, config, world), chosen, keep, config, skip_damaged=skip, world=world)
    there = table.values[table.is_there]
    kinds = {"tokens": there[:, :-1].flatten(0, 1), "clips": there[:, -1]}
    found = {
        f"{kind}_{name}": value
        for kind, rows in kinds.items()
        if len(rows) > 1
        for name, value in _described(rows, kind, source.name, config).items()
    }
    first = "tokens_rankme"
    scores = [Score(config.row, "none", "rankme", config.seed, found.pop(first))]
    return scores + [_score(name, value, config) for name, value in found.items()]


def _described(rows: Tensor, kind: str, model: str, config: StatisticsConfig) -> dict[str, float]:
    count, width = min(len(rows), config.tokens), rows.shape[1]
    if count < width:
        log.warning(
            "statistics of %s, %s: %d rows are fewer than %d channels, which bounds the ranks: give more files or "
            "clips.segments",
            model, kind, count, width,
        )  # fmt: skip
    elif kind == "tokens" and count < config.tokens:
        log.warning(
            "statistics of %s: there are %d tokens, not %d: compare ranks only at one number",
            model,
            count,
            config.tokens,
        )
    return feature_statistics(rows, most=config.tokens, seed=config.seed)


def _score(name: str, value: float, config: StatisticsConfig) -> Score:
    metric = name.partition("_")[2]
    return Score(f"{config.row}_{name}", "none", metric, config.seed, value, metric not in BETTER_LOW)
