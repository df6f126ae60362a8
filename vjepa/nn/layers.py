"""The transformer block that encoder and predictor share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vjepa.nn.attention import Attention, BackendName, Segments
from vjepa.nn.rope import RopeTable

LAYER_NORM_EPS = 1e-6  # of every LayerNorm inside the modules; targets are normalised with torch's 1e-5


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block over flat tokens [N, D]."""

    def __init__(
        self, dim: int, num_heads: int, hidden_dim: int, *, qkv_bias: bool = True, attention: BackendName = "auto"
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, backend=attention)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, hidden_dim)

    def forward(self, x: Tensor, table: RopeTable, layout: Sequence[Segments]) -> Tensor:
        x = x + self.attn(self.norm1(x), table, layout)
        return x + self.mlp(self.norm2(x))
