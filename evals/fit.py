"""Fitting linear probes on features in memory, several problems over one reading of the features."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from evals.heads import LinearHead, Standardiser
from evals.protocol import IGNORE, FitConfig


@dataclass(frozen=True)
class Problem:
    """What a probe is to tell apart."""

    labels: Tensor  # int64 [N]; IGNORE leaves a row out
    num_classes: int


def fit_linear(
    features: Tensor, problems: Mapping[str, Problem], config: FitConfig | None = None, *, seed: int
) -> dict[str, LinearHead]:
    """A linear probe for each problem on the same features [N, D]: standardised, cross-entropy, AdamW, cosine to 0.

    Fitting problems together gives what fitting each alone gives, and reads the features once: their weights lie side
    by side, their losses are summed, and AdamW treats every weight by itself. The first weights depend on the seed and
    the problem's name, the order of rows on the seed. Standardisation uses these features only.
    """
    config = config or FitConfig()
    _check(features, problems)
    scale = Standardiser.fit(features)
    rows = scale(features)
    widths = [problem.num_classes for problem in problems.values()]
    weight = torch.cat(
        [_first_weights(n, rows.shape[1], config, seed, name) for name, n in zip(problems, widths, strict=True)]
    )
    weight = weight.to(rows.device).requires_grad_()
    bias = torch.zeros(sum(widths), device=rows.device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=config.lr, weight_decay=config.weight_decay)
    for step, chosen in enumerate(_row_batches(len(rows), config, seed)):
        optimizer.param_groups[0]["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        batch = rows if chosen is None else rows[chosen]
        scores = F.linear(batch, weight, bias).split(widths, dim=1)
        loss = torch.stack(
            [_loss(part, problem.labels, chosen) for part, problem in zip(scores, problems.values(), strict=True)]
        ).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights, biases = weight.detach().split(widths), bias.detach().split(widths)
    return {name: LinearHead(weights[i], biases[i], scale) for i, name in enumerate(problems)}


def _loss(scores: Tensor, labels: Tensor, chosen: Tensor | None) -> Tensor:
    """Mean cross-entropy over the rows that are not ignored; 0 where all are."""
    labels = labels if chosen is None else labels[chosen]
    total = F.cross_entropy(scores, labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp_min(1)


def _first_weights(num_classes: int, width: int, config: FitConfig, seed: int, name: str) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(num_classes, width, generator=generator) * config.init_std


def _row_batches(count: int, config: FitConfig, seed: int) -> Iterator[Tensor | None]:
    """The rows of each step: None for all of them, or slices of one shuffle after another."""
    if count <= config.batch_size:
        yield from [None] * config.steps
        return
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(config.steps):
        if len(order) < config.batch_size:  # the rest of a pass is dropped: every batch has one size
            order = torch.randperm(count, generator=generator)
        yield order[: config.batch_size]
        order = order[config.batch_size :]


def _check(features: Tensor, problems: Mapping[str, Problem]) -> None:
    if features.ndim != 2 or not features.isfinite().all():
        raise ValueError(f"features must be finite and [N, D], got {list(features.shape)}")
    if not problems:
        raise ValueError("no problem to fit: give at least one")
    for name, problem in problems.items():
        labels = problem.labels
        if labels.shape != features.shape[:1]:
            raise ValueError(f"{name}: labels {list(labels.shape)} do not fit features {list(features.shape)}")
        known = labels[labels != IGNORE]
        if not len(known):
            raise ValueError(f"{name}: every label is ignored, there is nothing to fit")
        if not 0 <= int(known.min()) <= int(known.max()) < problem.num_classes:
            raise ValueError(
                f"{name}: labels lie in {int(known.min())}..{int(known.max())}, classes in 0..{problem.num_classes - 1}"
            )
