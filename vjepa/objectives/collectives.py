"""Sums over ranks with gradient, for losses and layers that look at a whole batch: SIGReg, variances, batch norm.

The convention. Every rank calls `backward` on a loss of its own, and DDP or FSDP averages the gradients. What is
descended is therefore the mean over ranks of the ranks' losses. The backward pass here is the exact transpose of the
forward pass (a sum over ranks, of gradients), so that this holds whatever a loss does with global statistics:

    loss computed from global statistics, the same on every rank    -> return it as it is
    mean over this rank's samples, as many on every rank            -> return it as it is
    sum over this rank's share of an uneven batch                   -> times num_ranks() / global count

A global statistic is never divided by the number of ranks, nor multiplied by it to undo an average. Two ranks
then have the gradient of one process (tests/objectives/test_global_statistics.py: ratio 1, cosine 1; a gather or a sum
without gradient, in place, or whose result is dropped has ratio 0.5 or another direction, reference 1.6).

Dangers. All ranks must make the same calls in the same order, in the forward pass (also under `no_grad`: a rank that
evaluates alone waits for ever) and in the backward pass (a rank that leaves the loss out waits for ever: multiply it by
zero instead). Keep them out of recomputed blocks, which would repeat them. A step in several
micro-batches gives them all of its samples each time (embeddings.py): statistics of parts do not add up.

Ranks are counted at each call, never earlier: it does not matter whether a module or the process group is built first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


@dataclass(frozen=True)
class Moments:
    """Of samples on all ranks: mean and biased variance [..., D], and the number of samples (int64, on the device)."""

    mean: Tensor
    variance: Tensor
    count: Tensor


def num_ranks() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over ranks of x, of one shape everywhere; with gradient. With one rank, x itself."""
    if num_ranks() == 1:
        return x
    return _Sum.apply(x)  # pyright: ignore[reportReturnType]


def count_over_ranks(count: int, device: torch.device) -> Tensor:
    """The sum over ranks of a number of samples: int64 scalar on the device, which the host does not wait for."""
    return _all_reduce(torch.full((), count, dtype=torch.int64, device=device))


def gather_over_ranks(rows: Tensor) -> Tensor:
    """Rows [N, ...], as many on every rank, of all ranks one after another: [ranks * N, ...]; with gradient."""
    if num_ranks() == 1:
        return rows
    return _Gather.apply(rows)  # pyright: ignore[reportReturnType]


def moments_over_ranks(samples: Tensor) -> Moments:
    """Mean and biased variance over the N samples [..., N, D] of all ranks, with gradient.

    In two passes, each a sum of D numbers: the mean of squares minus the square of the mean loses its digits where a
    mean is large beside the deviation.
    """
    count = count_over_ranks(samples.shape[-2], samples.device)
    mean = sum_over_ranks(samples.sum(dim=-2)) / count
    variance = sum_over_ranks((samples - mean.unsqueeze(-2)).square().sum(dim=-2)) / count
    return Moments(mean, variance, count)


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _all_reduce(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return sum_over_ranks(gradient)


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(num_ranks())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return sum_over_ranks(gradient).chunk(num_ranks())[dist.get_rank()]


def _all_reduce(x: Tensor) -> Tensor:
    """A new tensor, the sum over ranks; without gradient."""
    total = x.detach().clone(memory_format=torch.contiguous_format)
    if num_ranks() > 1:
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total
