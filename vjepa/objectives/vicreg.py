"""Variance, invariance and covariance of embeddings (VICReg, arXiv 2105.04906), over the batch of all ranks.

Without a stop-gradient, variance keeps every dimension alive and covariance keeps them apart. Embeddings are [N, D], or
[..., N, D]: each leading index, a time step for instance, has statistics of its own over N, and the loss is their mean.
Ranks may hold different N but the same leading sizes; a loss is computed alike on all of them, and its gradient after
DDP's averaging is that of one process. Statistics are in fp32 (fp64 stays fp64) whatever autocast says. They are not
additive: a batch in parts is put together first (embeddings.py). One row over all ranks has variance 0 and no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vjepa.batch import Grid
from vjepa.objectives.collectives import count_over_ranks, sum_over_ranks
from vjepa.objectives.precision import at_least_fp32, without_autocast

Normalise = Literal["dimensions", "pairs"]


def variance(z: Tensor, *, target: float = 1.0, eps: float = 1e-4) -> Tensor:
    """mean_j max(0, target - sqrt(Var(z_j) + eps)), z: [..., N, D]; a scalar from 0 to target - sqrt(eps).

    Var divides by N - 1. VICReg (section 4.1, eq. 1) and eb_jepa use target 1 and eps 1e-4; VICReg's code averages
    over two views. The root's slope is finite at Var = 0, but rows that are all the same have no gradient at all.
    """
    with without_autocast(z):
        centred, divisor = _centred(z)
        squares = sum_over_ranks(centred.square().sum(dim=-2))  # [..., D]
        std = (squares / divisor + eps).sqrt()
        return F.relu(target - std).mean()


def covariance(z: Tensor, *, normalise: Normalise = "dimensions") -> Tensor:
    """sum_{i != j} C_ij^2 over D or D(D - 1), C = sum_n (z_n - mean)(z_n - mean)^T / (N - 1), z: [..., N, D]; a scalar.

    `dimensions` divides by D: VICReg (section 4.1, eq. 4), stable-pretraining, PLDM (arXiv 2502.14819) by default.
    `pairs` divides by D(D - 1), the mean over off-diagonal entries: eb_jepa, PLDM with adjust_cov. A weight for `pairs`
    is D - 1 times the weight for `dimensions`. The matrix, [..., D, D], is what is summed over ranks.
    """
    dim = z.shape[-1]
    if normalise not in ("dimensions", "pairs"):
        raise ValueError(f"normalise={normalise!r} is unknown: use 'dimensions' (over D) or 'pairs' (over D(D - 1))")
    if dim < 2:
        raise ValueError(f"covariance needs at least two dimensions, got embeddings of {list(z.shape)}")
    with without_autocast(z):
        centred, divisor = _centred(z)
        products = sum_over_ranks(centred.mT @ centred) / divisor  # [..., D, D]
        off_diagonal = products - torch.diag_embed(products.diagonal(dim1=-2, dim2=-1))
        total = off_diagonal.square().sum(dim=(-2, -1)).mean()
        return total / (dim if normalise == "dimensions" else dim * (dim - 1))


def invariance(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of two embeddings of the same samples, both [..., N, D]; a scalar.

    Over samples and dimensions, as in VICReg's code, eb_jepa and PLDM; the paper's eq. 5 sums over dimensions, which is
    D times this. Gradients flow into both.
    """
    if a.shape != b.shape:
        raise ValueError(f"invariance needs embeddings of one shape, got {list(a.shape)} and {list(b.shape)}")
    with without_autocast(a):
        squares = (at_least_fp32(a) - at_least_fp32(b)).square()
        return sum_over_ranks(squares.sum()) / count_over_ranks(squares.numel(), a.device)


def view_spread(views: Sequence[Tensor], num_global: int, *, reduce: Literal["mean", "sum"] = "mean") -> Tensor:
    """Mean squared distance of views [..., N, D] of the same samples to the mean of the first `num_global`; a scalar.

    (1 / V) sum_v mean_n |mu_n - z_nv|^2, over D or not (`reduce`): LeJEPA (arXiv 2511.08544), algorithm 2 and its
    formula. Gradients flow into all views, through mu too. As many samples on every rank.
    """
    if not 1 <= num_global <= len(views):
        raise ValueError(f"num_global={num_global} must be between 1 and the {len(views)} views")
    with without_autocast(views[0]):
        stacked = torch.stack([at_least_fp32(z) for z in views])  # [V, ..., N, D]
        squares = (stacked - stacked[:num_global].mean(dim=0)).square()
        return squares.mean() if reduce == "mean" else squares.sum(dim=-1).mean()


def pooled(tokens: Tensor) -> Tensor:
    """All tokens of all clips as samples: [B, N, D] -> [B * N, D], eb_jepa's video example.

    Differences within a clip count as variance: features of position alone pass. `per_place` does not let them.
    """
    return tokens.flatten(0, 1)


def clip_means(tokens: Tensor) -> Tensor:
    """One sample per clip, the mean of its tokens: [B, N, D] -> [B, D]."""
    return tokens.mean(dim=1)


def per_place(tokens: Tensor) -> Tensor:
    """Statistics over clips at each place on its own: [B, N, D] -> [N, B, D]. Covariance then needs N * D^2 numbers."""
    return tokens.transpose(0, 1)


def per_time_step(tokens: Tensor, grid: Grid) -> Tensor:
    """Statistics for each time step on its own, its tokens of all clips as samples: [B, N, D] -> [T, B * H * W, D].

    PLDM and LeWorldModel, which have one embedding per frame.
    """
    return _by_time(tokens, grid).transpose(0, 1).flatten(1, 2)


def first_frame(tokens: Tensor, grid: Grid) -> Tensor:
    """Tokens of the first time step as samples: [B, N, D] -> [B * H * W, D] (eb_jepa, first_t_only)."""
    return _by_time(tokens, grid)[:, 0].flatten(0, 1)


def _by_time(tokens: Tensor, grid: Grid) -> Tensor:
    times, rows, columns = grid
    if tokens.dim() != 3 or tokens.shape[1] != times * rows * columns:
        raise ValueError(
            f"tokens must be [B, N, D] with all {times * rows * columns} tokens of grid {tuple(grid)}, "
            f"got {list(tokens.shape)}"
        )
    return tokens.unflatten(1, (times, rows * columns))  # [B, T, H * W, D]


def _centred(z: Tensor) -> tuple[Tensor, Tensor]:
    """z less its mean over all ranks, and the divisor of second moments: rows of all ranks - 1."""
    z = at_least_fp32(z)
    if z.dim() < 2 or z.shape[-2] == 0:
        raise ValueError(f"embeddings must be [N, D] or [..., N, D] with N >= 1 rows, got {list(z.shape)}")
    count = count_over_ranks(z.shape[-2], z.device)
    with torch.no_grad():  # sum_n (z_n - m)(z_n - m)^T has slope 0 by m where m is the mean
        mean = sum_over_ranks(z.sum(dim=-2, keepdim=True)) / count
    return z - mean, (count - 1).clamp_min(1)
