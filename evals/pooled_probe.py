"""A linear layer on vectors in memory: a head for each learning rate, one chosen on held-out rows (DINOv3's probe).

Every rank holds all rows; a step's batch and what is scored are shared out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evals.grid import Draws, choose, fit_grid, score_heads
from evals.heads import Standardiser
from evals.pooled_config import LinearFit
from vjepa.train.distributed import ALONE, World

INIT_STD = 0.01  # of a head's first weights, as in DINO; biases start at 0
SCORED = 1024  # rows at a time


@dataclass(frozen=True)
class Rows:
    """Vectors [N, D] and their classes [N]."""

    features: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.features.shape[:1] != self.labels.shape or not len(self.labels):
            raise ValueError(f"features {list(self.features.shape)} and labels {list(self.labels.shape)} are no rows")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, places: Sequence[int]) -> Rows:
        return Rows(self.features[list(places)], self.labels[list(places)])

    def batch(self, draws: Draws, step: int, world: World) -> tuple[Tensor, Tensor]:
        places = [draws.sample(ordinal) for ordinal in draws.ordinals(step, world)]
        return self.features[places], self.labels[places]

    def scored(self, world: World) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share, in parts."""
        mine = slice(world.rank, None, world.size)
        yield from zip(self.features[mine].split(SCORED), self.labels[mine].split(SCORED), strict=True)


@dataclass
class Hits:
    """Right answers, their sum of losses and how many were asked, float64 [3]."""

    state: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        loss = F.cross_entropy(outputs.float(), labels, reduction="sum")
        right = (outputs.argmax(dim=1) == labels).sum()
        self.state += torch.stack([right.double(), loss.double(), torch.tensor(len(labels)).to(loss)]).cpu()

    def reduce(self, world: World) -> None:
        world.sum(self.state)


@dataclass(frozen=True)
class ProbeHits:
    """What each head got right on the rows that are scored, and which head held-out rows prefer."""

    right: tuple[float, ...]
    count: int
    chosen: int

    @property
    def accuracy(self) -> float:
        return self.right[self.chosen] / self.count

    @property
    def max_over_heads(self) -> float:
        return max(self.right) / self.count


def probe(
    train: Rows, held_out: Rows, test: Rows, num_classes: int, fit: LinearFit, *, seed: int = 0, world: World = ALONE
) -> ProbeHits:
    """Fit the heads on `train`, choose one on `held_out`, score all on `test`.

    Of equal held-out accuracies the smaller loss is preferred: few rows are often held out.
    """
    if fit.standardise:
        scale = Standardiser.fit(train.features)
        train, held_out, test = (Rows(scale(rows.features), rows.labels) for rows in (train, held_out, test))
    draws = Draws(len(train), fit.batch_size, seed)
    found = fit_grid(
        lambda: _head(train.features.shape[1], num_classes),
        fit.settings,
        lambda step: train.batch(draws, step, world),
        lambda outputs, labels, *, step: F.cross_entropy(outputs, labels),
        steps=fit.steps,
        optim=fit.optim,
        seed=seed,
        world=world,
    )
    chosen_on, scored = (
        [meter.state.tolist() for meter in score_heads(found.heads, rows.scored(world), Hits, world=world)]
        for rows in (held_out, test)
    )
    right = [each[0] for each in scored]
    choice = choose(_worth([(hits, loss) for hits, loss, _ in chosen_on]), right)
    return ProbeHits(tuple(right), len(test), choice.index)


def _head(width: int, num_classes: int) -> nn.Linear:
    head = nn.Linear(width, num_classes)
    nn.init.normal_(head.weight, std=INIT_STD)
    nn.init.zeros_(head.bias)
    return head


def _worth(scores: Sequence[tuple[float, float]]) -> list[float]:
    """Places of (right, loss) from the worst on; not a number where the loss is none."""
    keys = [(right, -loss) for right, loss in scores]
    order = sorted({key for key in keys if math.isfinite(key[1])})
    return [float(order.index(key)) if math.isfinite(key[1]) else math.nan for key in keys]


def in_hashed_order(keys: Sequence[str], *, seed: int) -> list[str]:
    """Each key once, in an order that is a function of the seed and the keys alone."""
    return sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).hexdigest())


def held_out_keys(keys: Sequence[str], share: float, *, seed: int) -> set[str]:
    """About `share` of the different keys, one at least and never all."""
    order = in_hashed_order(keys, seed=seed)
    if len(order) < 2:
        raise ValueError(
            f"there is {len(order)} file to train on, and one is held out to choose a head: give at least 2"
        )
    return set(order[: min(len(order) - 1, max(1, round(share * len(order))))])
