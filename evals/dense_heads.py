"""What stands before the linear layer of a dense task: nothing, or attention among the tokens of an image.

No source gives a dense attentive head. Ours is the token part of the published attentive probe (reference evaluation.md
1.1: three pre-norm self-attention blocks, its first weights), then a norm, then the same linear head as without.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evals.attentive import SelfAttentionBlock, initialise
from evals.dense_config import DenseConfig, DenseHeadConfig
from evals.features import bf16_on_gpus


class TokenAttention(nn.Module):
    """Self-attention among all tokens of an image or window, and a norm: [B, h, w, D] -> [B, h, w, width].

    With `head.width` a linear layer brings the tokens to that width first: levels side by side are then summed, each
    through a projection of its own. No positions are added.
    """

    def __init__(self, dim: int, config: DenseHeadConfig, *, seed: int) -> None:
        super().__init__()
        self.width, self.recompute = config.width or dim, config.recompute
        if self.width % config.num_heads:
            raise ValueError(
                f"head.num_heads={config.num_heads} does not divide the width {self.width}: set head.num_heads to a "
                f"divisor of it, or head.width to a multiple of head.num_heads"
            )
        self.project = nn.Identity() if config.width is None else nn.Linear(dim, self.width)
        self.blocks = nn.ModuleList(SelfAttentionBlock(self.width, config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(self.width, eps=config.eps)
        initialise(self, seed)

    def forward(self, tokens: Tensor) -> Tensor:
        is_recomputed = self.recompute and self.training and torch.is_grad_enabled()
        x = self.project(tokens).flatten(1, 2)  # [B, N, width]
        with bf16_on_gpus(tokens.device):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False) if is_recomputed else block(x)
        return self.norm(x.float()).unflatten(1, tokens.shape[1:3])


def dense_head(dim: int, config: DenseConfig, make_linear: Callable[[int], nn.Module]) -> nn.Module:
    """The head of a recipe on tokens of `dim` numbers: `make_linear` of a width, behind attention where it says so."""
    if config.head.kind == "linear":
        return make_linear(dim)
    attention = TokenAttention(dim, config.head, seed=config.fit.seed)
    return nn.Sequential(attention, make_linear(attention.width))
