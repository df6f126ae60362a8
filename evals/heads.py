"""The heads that are put on frozen features, and the scale they see them at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONSTANT = 1e-6
"""A feature whose spread is below this share of its own mean or of the widest feature's spread is rounding noise."""


@dataclass(frozen=True)
class Standardiser:
    """Features to mean 0 and standard deviation 1, by the statistics of the features it was fitted on."""

    mean: Tensor  # [D]
    std: Tensor  # [D]; infinite for a constant feature, which becomes 0

    @classmethod
    def fit(cls, features: Tensor) -> Standardiser:
        """The statistics of training features [N, D]."""
        std, mean = torch.std_mean(features, dim=0, correction=0)
        is_constant = std <= CONSTANT * torch.maximum(10 * mean.abs(), std.max())
        # Infinity and not 1: what is constant here must tell a probe nothing on other data either.
        return cls(mean, std.masked_fill(is_constant, torch.inf))

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


class LinearHead(nn.Module):
    """Standardised features to class scores, one matrix: [..., D] -> [..., classes]."""

    def __init__(self, weight: Tensor, bias: Tensor, scale: Standardiser) -> None:
        """weight [classes, D] and bias [classes] act on standardised features; the scale is folded into both."""
        super().__init__()
        folded = weight.double() / scale.std.double()
        offset = bias.double() - folded @ scale.mean.double()
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", folded.float())
        self.register_buffer("bias", offset.float())

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """The class with the highest score: [..., D] -> int64 [...]."""
        return self(features).argmax(dim=-1)
