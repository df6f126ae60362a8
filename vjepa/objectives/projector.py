"""What stands between an encoder's final LayerNorm and a regulariser: an MLP with batch normalisation over all ranks.

LayerNorm puts every sample on one sphere, where N(0, I) cannot be reached; LeWorldModel (arXiv 2603.19312) therefore
regularises, and predicts, behind an MLP with batch normalisation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vjepa.nn.init import WEIGHT_STD, initialise
from vjepa.objectives.collectives import moments_over_ranks
from vjepa.objectives.precision import at_least_fp32, without_autocast

GELU_RMS = 0.6522  # sqrt of E[gelu(x)^2] for x ~ N(0, 1)


class GlobalBatchNorm(nn.Module):
    """Batch normalisation of x [..., D] over all leading dimensions and all ranks; torch.nn.BatchNorm1d in one process.

    Written here because torch's SyncBatchNorm has no CPU path. While training, all ranks must call it together (see
    collectives.py); in evaluation it reads its running statistics, which are the same on every rank, and needs no one.
    Each call in training moves them, so keep it out of recomputed blocks. They are buffers: on the meta device, or
    after `to_empty`, they mean nothing until `reset`.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    @torch.no_grad()
    def reset(self) -> None:
        """Weight 1, bias 0, running statistics of N(0, 1); whole or in shards."""
        self.weight.fill_(1.0)
        self.bias.zero_()
        self.running_mean.zero_()
        self.running_var.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            samples = at_least_fp32(x)
            mean, variance = self._of_batch(samples) if self.training else (self.running_mean, self.running_var)
            normal = (samples - mean) * (variance + self.eps).rsqrt()
            return (normal * self.weight + self.bias).to(x.dtype)

    def _of_batch(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of the batch; the running variance follows the unbiased one, as torch's does."""
        moments = moments_over_ranks(samples.flatten(0, -2))
        unbiased = moments.variance * (moments.count / (moments.count - 1).clamp(min=1))
        with torch.no_grad():
            self.running_mean.lerp_(moments.mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        return moments.mean, moments.variance


class Projector(nn.Module):
    """Linear, batch normalisation over all ranks, exact GELU, linear: [..., D] -> [..., out]."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.norm = GlobalBatchNorm(hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, out_dim)

    def initialise(self, *, scope: str, seed: int, weight_std: float = WEIGHT_STD) -> None:
        """Fill parameters and buffers, whole or in shards; call it in place of `vjepa.nn.init.initialise`.

        fc2 is scaled so that outputs begin with unit variance: the gradient of SIGReg vanishes with the scale of its
        inputs and VISReg collapses from a small one. What fc1's scale is matters little before a batch normalisation.
        """
        initialise(self.fc1, scope=f"{scope}.fc1", seed=seed, weight_std=weight_std)
        self.norm.reset()
        out_std = 1.0 / (GELU_RMS * math.sqrt(self.fc2.in_features))
        initialise(self.fc2, scope=f"{scope}.fc2", seed=seed, weight_std=out_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.norm(self.fc1(x))))
