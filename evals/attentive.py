"""The attentive probe of V-JEPA: self-attention over all tokens of a video, then learned queries that read them.

Reference evaluation.md 1.1 and 1.2. Names of modules are those of the reference, so that released probes load
strictly; `attentive_weights.py` maps them to and from the layout of `transformers`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evals.features import bf16_on_gpus

WEIGHT_STD = 0.02


@dataclass
class AttentiveConfig:
    """The shape of an attentive probe; its width is that of the features (evaluation.md 1.1)."""

    depth: int = 4  # blocks: the last one is the cross-attention, those before it attend among tokens
    num_heads: int = 16
    mlp_ratio: float = 4.0
    eps: float = 1e-5  # of every LayerNorm; 1e-6 in the probes of transformers
    recompute: bool = True  # do not keep the activations of self-attention blocks for the backward pass

    def __post_init__(self) -> None:
        if self.depth < 1 or self.num_heads < 1 or self.mlp_ratio <= 0 or self.eps <= 0:
            raise ValueError(f"head: depth, num_heads, mlp_ratio and eps must be positive, got {self}")


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SelfAttention(nn.Module):
    """Multi-head attention among tokens [B, N, D], without positions."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, A, N, d]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Queries [B, Q, D] read tokens [B, N, D]; there is no output projection."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        q = self.q(queries).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, A, Q, d]
        k, v = self.kv(tokens).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, A, N, d]
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class SelfAttentionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, config: AttentiveConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=config.eps)
        self.attn = SelfAttention(dim, config.num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=config.eps)
        self.mlp = Mlp(dim, round(dim * config.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CrossAttentionBlock(nn.Module):
    """Only keys and values are normalised before the attention; the residual is added to the raw query."""

    def __init__(self, dim: int, config: AttentiveConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=config.eps)
        self.xattn = CrossAttention(dim, config.num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=config.eps)
        self.mlp = Mlp(dim, round(dim * config.mlp_ratio))

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        queries = queries + self.xattn(queries, self.norm1(tokens))
        return queries + self.mlp(self.norm2(queries))


class AttentivePooler(nn.Module):
    """Tokens [B, N, D] -> what learned queries read of them [B, Q, D]."""

    def __init__(self, embed_dim: int, num_queries: int = 1, config: AttentiveConfig | None = None) -> None:
        super().__init__()
        config = config or AttentiveConfig()
        if embed_dim % config.num_heads:
            raise ValueError(
                f"head.num_heads={config.num_heads} does not divide the features' width {embed_dim}: set "
                f"head.num_heads to a divisor of {embed_dim}"
            )
        self.recompute = config.recompute
        self.query_tokens = nn.Parameter(torch.empty(1, num_queries, embed_dim))
        self.blocks = nn.ModuleList(SelfAttentionBlock(embed_dim, config) for _ in range(config.depth - 1))
        self.cross_attention_block = CrossAttentionBlock(embed_dim, config)

    def forward(self, tokens: Tensor) -> Tensor:
        """In bf16 on CUDA; what is read is float32, and so are the scores that are made of it: bf16 would tie them."""
        is_recomputed = self.recompute and self.training and torch.is_grad_enabled()
        with bf16_on_gpus(tokens.device):
            for block in self.blocks:
                tokens = checkpoint(block, tokens, use_reentrant=False) if is_recomputed else block(tokens)
            return self.cross_attention_block(self.query_tokens.expand(len(tokens), -1, -1), tokens).float()


class AttentiveClassifier(nn.Module):
    """Tokens [B, N, D] of all clips of a video -> class scores [B, classes]."""

    def __init__(
        self, embed_dim: int, num_classes: int, config: AttentiveConfig | None = None, *, seed: int = 0
    ) -> None:
        super().__init__()
        self.pooler = AttentivePooler(embed_dim, 1, config)
        self.linear = nn.Linear(embed_dim, num_classes)
        initialise(self, seed)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.pooler(tokens)[:, 0])


class AttentiveClassifiers(nn.Module):
    """Several questions about the same tokens, a query and a linear layer each: [B, N, D] -> {name: [B, classes]}.

    The probe of action anticipation asks `verb`, `noun`, `action` (evaluation.md 1.2).
    """

    def __init__(
        self, embed_dim: int, num_classes: Mapping[str, int], config: AttentiveConfig | None = None, *, seed: int = 0
    ) -> None:
        super().__init__()
        self.pooler = AttentivePooler(embed_dim, len(num_classes), config)
        self.linears = nn.ModuleDict({name: nn.Linear(embed_dim, count) for name, count in num_classes.items()})
        initialise(self, seed)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        read = self.pooler(tokens).unbind(dim=1)  # each [B, D], one per question
        return {name: linear(query) for (name, linear), query in zip(self.linears.items(), read, strict=True)}


@torch.no_grad()
def initialise(head: nn.Module, seed: int) -> None:
    """Weights and queries truncated normal, std 0.02, biases 0; outputs of residual block i divided by sqrt(2 i).

    The cross-attention's last layer is divided like that of the last self-attention block. Every parameter draws from
    a generator of its own (seed, name): heads that differ in width of their output share the rest.
    """
    count = sum(isinstance(part, SelfAttentionBlock) for part in head.modules())
    for name, parameter in head.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if leaf == "bias":
            parameter.zero_()
        elif isinstance(head.get_submodule(owner), nn.LayerNorm):
            parameter.fill_(1.0)
        else:
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            values = nn.init.trunc_normal_(torch.empty(parameter.shape), std=WEIGHT_STD, generator=generator)
            parameter.copy_(values / _residual_scale(owner, count))


def _residual_scale(owner: str, num_self_blocks: int) -> float:
    """sqrt(2 i) for the two outputs of self-attention block i, counted from 1; 1 for what adds to no residual."""
    if owner.endswith("cross_attention_block.mlp.fc2"):
        return math.sqrt(2.0 * max(1, num_self_blocks))
    if owner.endswith(("attn.proj", "mlp.fc2")):
        return math.sqrt(2.0 * (int(owner.split("blocks.")[1].split(".")[0]) + 1))
    return 1.0


def average_views(logits: Tensor, views: int) -> Tensor:
    """Class scores [B * V, classes], the views of a video side by side -> mean of their softmax [B, classes]."""
    if len(logits) % views:
        raise ValueError(f"{len(logits)} rows of scores do not divide into videos of {views} views")
    return logits.float().softmax(dim=-1).unflatten(0, (-1, views)).mean(dim=1)
