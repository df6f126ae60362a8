"""Depth against the truth: errors of each image over its known pixels, then their means over images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vjepa.objectives.collectives import count_over_ranks, num_ranks, sum_over_ranks
from vjepa.train.distributed import World

METRICS = ("RMSE", "AbsRel", "delta1", "delta2", "delta3", "RMSElog", "log10", "SILog", "SqRel")


def depth_errors(predicted: Tensor, true: Tensor) -> dict[str, float]:
    """Every metric over known pixels: positive metres [N] each.

    Eigen et al. 2014 as the field computes them: deltas are shares of max(p/t, t/p) < 1.25, 1.25^2, 1.25^3; SILog is
    the standard deviation of log p - log t, times 100.
    """
    predicted, true = predicted.double(), true.double()
    difference, logs = predicted - true, predicted.log() - true.log()
    ratio = torch.maximum(predicted / true, true / predicted)
    values = {
        "RMSE": difference.square().mean().sqrt(),
        "AbsRel": (difference.abs() / true).mean(),
        **{f"delta{power}": (ratio < 1.25**power).double().mean() for power in (1, 2, 3)},
        "RMSElog": logs.square().mean().sqrt(),
        "log10": (logs.abs() / math.log(10)).mean(),
        "SILog": (logs.square().mean() - logs.mean().square()).clamp_min(0).sqrt() * 100,
        "SqRel": (difference.square() / true).mean(),
    }
    return {name: value.item() for name, value in values.items()}


class DepthMeter:
    """Means over images of the errors of each (reference evaluation.md 1.4: RMSE is not pooled over pixels).

    Predictions are clamped to the range; true depths outside it, and images without any inside, count nowhere.
    """

    def __init__(self, min_depth: float, max_depth: float) -> None:
        self.min_depth, self.max_depth = min_depth, max_depth
        self.sums = torch.zeros(len(METRICS), dtype=torch.float64)
        self.images = 0

    def update(self, outputs: Tensor, labels: Tensor, /) -> DepthMeter:
        """Metres [1, H, W] or [H, W] and the truth [H, W], 0 where it is not known. Returns itself."""
        known = (labels > self.min_depth) & (labels < self.max_depth)
        if known.any():
            predicted = outputs.view_as(labels)[known].float().clamp(self.min_depth, self.max_depth)
            errors = depth_errors(predicted, labels[known])
            self.sums += torch.tensor([errors[name] for name in METRICS], dtype=torch.float64)
            self.images += 1
        return self

    def reduce(self, world: World) -> DepthMeter:
        """Add up what the ranks have seen, on all of them. Returns itself."""
        totals = world.sum(torch.cat([self.sums, self.sums.new_tensor([self.images])]).to(world.device)).cpu()
        self.sums, self.images = totals[:-1], int(totals[-1])
        return self

    def scores(self) -> dict[str, float]:
        if not self.images:
            raise ValueError("nothing was scored: no image has a known depth within the range")
        return dict(zip(METRICS, (self.sums / self.images).tolist(), strict=True))

    def headline(self) -> float:
        """The RMSE in metres."""
        return self.scores()["RMSE"]


def sig_loss(
    predicted: Tensor, true: Tensor, *, min_depth: float, max_depth: float, mean_only: bool = False, eps: float = 1e-3
) -> Tensor:
    """sqrt(var(g) + 0.15 mean(g)^2), g = log(predicted + eps) - log(true + eps), over the known pixels of all ranks.

    `mean_only` leaves the variance out, as for the first 100 steps (reference evaluation.md 1.4). The variance is the
    unbiased one. Known are true depths within the range.
    """
    known = (true > min_depth) & (true < max_depth)
    g = torch.where(known, (predicted.float() + eps).log() - (true + eps).log(), 0)
    count = count_over_ranks(int(known.sum()), g.device).clamp_min(1)
    mean = sum_over_ranks(g.sum()) / count
    if mean_only:
        return math.sqrt(0.15) * mean.abs()
    squares = torch.where(known, (g - mean).square(), 0).sum()
    variance = sum_over_ranks(squares) / (count - 1).clamp_min(1)
    return (variance + 0.15 * mean.square()).clamp_min(1e-12).sqrt()  # the root of 0 has no gradient


def share_of_sum(total: Tensor, count: int) -> Tensor:
    """This rank's sum as its part of the mean over all ranks, by the convention of vjepa's collectives.py."""
    return total * num_ranks() / count_over_ranks(count, total.device).clamp_min(1)
