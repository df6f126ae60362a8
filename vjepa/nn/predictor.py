"""The predictor: from the context tokens' levels to the target's features at masked and at visible places (2.1, 1.5).

Positions are carried explicitly, so the order of tokens does not matter: mask tokens simply follow the context tokens.
Where it has a latent (`nn/latent.py`), one linear layer of it is added to the mask tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vjepa.batch import MODALITIES, Grid, Modality
from vjepa.nn.attention import BackendName
from vjepa.nn.gather import gather_table, pack, unpack
from vjepa.nn.layers import LAYER_NORM_EPS, Block
from vjepa.nn.rope import BASE, RopeLayout, RopeTable, grid_table, sincos_table


@dataclass(frozen=True)
class PredictorConfig:
    """Everything that decides a predictor's parameters and numbers."""

    encoder_dim: int  # D of the encoder that feeds it
    num_levels: int  # levels it reads, side by side in the channels: L*D in
    target_dim: int  # width of its output: L*D of the target
    embed_dim: int = 384
    depth: int = 24
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    rope: RopeLayout = "interleaved"
    rope_base: float = BASE
    interpolate_rope: bool = True
    absolute_position: float = 0.0  # add fixed sines and cosines of the position, times this (not in V-JEPA 2.1)
    absolute_position_base: float = BASE  # of their frequencies
    modality_embed: bool = True
    context_head: bool = True  # the second head, for visible tokens
    mask_token_std: float = 0.0  # the reference starts mask tokens at zero
    latent_dim: int = 0  # channels of the latent that every query brings; 0: none


@dataclass(frozen=True)
class Query:
    """Context tokens [B, K, L*D] at `context` [B, K], and the places `masked` [B, M] to predict, on one grid."""

    tokens: Tensor
    context: Tensor
    masked: Tensor
    grid: Grid
    modality: Modality
    latent: Tensor | None = None  # [B, 1 or M, latent_dim]


class Predictor(nn.Module):
    """A narrow ViT over context and mask tokens, read by one linear head for each of the two."""

    def __init__(self, config: PredictorConfig, *, attention: BackendName = "auto") -> None:
        super().__init__()
        self.config = config
        dim, width = config.encoder_dim, config.embed_dim
        if config.num_levels > 1:
            self.embed = nn.Sequential(nn.Linear(config.num_levels * dim, dim), nn.GELU(), nn.Linear(dim, width))
        else:
            self.embed = nn.Linear(dim, width)
        self.mask_tokens = nn.ParameterDict({m: nn.Parameter(torch.empty(width)) for m in MODALITIES})
        embeds = {m: nn.Parameter(torch.empty(width)) for m in MODALITIES} if config.modality_embed else {}
        self.modality_embeds = nn.ParameterDict(embeds)
        self.latent_embed = nn.Linear(config.latent_dim, width) if config.latent_dim else None
        hidden_dim = round(width * config.mlp_ratio)
        self.blocks = nn.ModuleList(
            Block(width, config.num_heads, hidden_dim, qkv_bias=config.qkv_bias, attention=attention)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.masked_head = nn.Linear(width, config.target_dim)
        self.context_head = nn.Linear(width, config.target_dim) if config.context_head else None

    @property
    def trains_context_head(self) -> bool:
        """Whether the head for visible tokens is there and not frozen: no other is exported."""
        head = self.context_head
        return head is not None and any(parameter.requires_grad for parameter in head.parameters())

    def forward(
        self,
        context_tokens: Tensor,
        *,
        context: Tensor,
        masked: Tensor,
        grid: Grid,
        modality: Modality,
        latent: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Context tokens [B, K, L*D] at indices [B, K] -> predictions [B, M, L*D] and, at the context, [B, K, L*D]."""
        return self.forward_queries([Query(context_tokens, context, masked, grid, modality, latent)])[0]

    def forward_queries(self, queries: Sequence[Query]) -> list[tuple[Tensor, Tensor | None]]:
        """All queries in one pass: per query the predictions at masked [B, M, L*D] and context [B, K, L*D] places."""
        tokens, layout = pack([query.tokens for query in queries])
        embedded = unpack(self.embed(tokens), layout)
        x, layout = pack([self._sequence(x, query) for x, query in zip(embedded, queries, strict=True)])
        table = gather_table(
            [(self._table(q), torch.cat((q.context, q.masked), dim=1), q.context.shape[0]) for q in queries]
        )
        for block in self.blocks:
            x = block(x, table, layout)
        sequences = unpack(self.norm(x), layout)
        contexts = [x[:, : query.context.shape[1]] for x, query in zip(sequences, queries, strict=True)]
        masked = [x[:, query.context.shape[1] :] for x, query in zip(sequences, queries, strict=True)]
        predicted = _apply(self.masked_head, masked)
        visible = _apply(self.context_head, contexts) if self.context_head is not None else [None] * len(queries)
        return list(zip(predicted, visible, strict=True))

    def _sequence(self, embedded: Tensor, query: Query) -> Tensor:
        """Embedded context [B, K, P] -> context and mask tokens [B, K + M, P], with modality and place added."""
        count, masked = query.masked.shape
        mask_tokens = self.mask_tokens[query.modality].to(embedded.dtype).expand(count, masked, -1)
        if (latent := self._latent(query)) is not None:
            mask_tokens = mask_tokens + latent.to(embedded.dtype)
        tokens = torch.cat((embedded, mask_tokens), dim=1)
        if self.config.modality_embed:
            tokens = tokens + self.modality_embeds[query.modality].to(tokens.dtype)
        if self.config.absolute_position:
            config = self.config
            base, is_scaled = config.absolute_position_base, config.interpolate_rope
            table = sincos_table(query.grid, config.embed_dim, base, is_scaled, tokens.device)
            places = torch.cat((query.context, query.masked), dim=1)
            tokens = tokens + (config.absolute_position * table[places]).to(tokens.dtype)
        return tokens

    def _latent(self, query: Query) -> Tensor | None:
        """What the query's latent adds to its mask tokens: [B, 1 or M, P]."""
        found = 0 if query.latent is None else query.latent.shape[-1]
        if found != self.config.latent_dim:
            raise ValueError(
                f"a query's latent has {found} channels, the predictor's latent_dim={self.config.latent_dim}"
            )
        return None if self.latent_embed is None or query.latent is None else self.latent_embed(query.latent)

    def _table(self, query: Query) -> RopeTable:
        head_dim = self.config.embed_dim // self.config.num_heads
        config = self.config
        return grid_table(
            query.grid, head_dim, config.rope, config.rope_base, config.interpolate_rope, query.tokens.device
        )


def _apply(head: nn.Linear, groups: Sequence[Tensor]) -> list[Tensor]:
    flat, layout = pack(groups)
    return unpack(head(flat), layout)
