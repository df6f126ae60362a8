"""The video encoder: a plain pre-norm ViT with 3-axis RoPE and one LayerNorm per supervised level (2.1, section 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, overload

import torch
from torch import Tensor, nn

from vjepa.batch import Grid, Modality
from vjepa.nn.attention import AttentionMask, BackendName, Segments, backend_for, block_causal_bias
from vjepa.nn.gather import gather_table, pack, take_tokens, unpack
from vjepa.nn.layers import LAYER_NORM_EPS, Block
from vjepa.nn.rope import BASE, RopeLayout, RopeTable, grid_table, sincos_table
from vjepa.nn.tokenizer import Tokenizer


@dataclass(frozen=True)
class EncoderConfig:
    """Everything that decides an encoder's parameters and numbers; stored with exported weights."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    levels: tuple[int, ...] = ()  # 0-based blocks that have a norm; () means `default_levels(depth)`
    patch_size: int = 16
    tubelet_size: int = 2
    in_chans: int = 3
    rope: RopeLayout = "interleaved"
    rope_base: float = BASE  # longest wavelength over 2 pi; smaller for grids of a few tokens
    interpolate_rope: bool = True  # scale rows and columns, absolute ones too, to the 16-wide reference grid
    absolute_position: float = 0.0  # add fixed sines and cosines of the position, times this (not in V-JEPA 2.1)
    absolute_position_base: float = BASE  # of their frequencies
    image_tokenizer: bool = True
    modality_embed: bool = True
    attention_mask: AttentionMask = "full"  # block_causal: a token sees its own and earlier time steps (LeVJEPA)

    def __post_init__(self) -> None:
        if not self.levels:
            object.__setattr__(self, "levels", default_levels(self.depth))
        object.__setattr__(self, "levels", tuple(self.levels))
        if list(self.levels) != sorted(set(self.levels)) or self.levels[0] < 0:
            raise ValueError(f"levels={self.levels} must be ascending 0-based block numbers without repeats")
        if self.levels[-1] != self.depth - 1:
            raise ValueError(
                f"levels={self.levels} must end with the last block, {self.depth - 1} (0-based) at depth {self.depth}: "
                "the blocks behind the last level would never be trained. Recipes count from 1."
            )


def default_levels(depth: int) -> tuple[int, ...]:
    """Four equally spaced 0-based levels, as in the paper ([12, 24, 36, 48] from 1 for depth 48); all below depth 4.

    The released weights of depth 48 were trained with 11, 23, 37, 47 (reference 1.1): the importer sets that.
    """
    count = min(4, depth)
    return tuple(depth * (i + 1) // count - 1 for i in range(count))


@dataclass(frozen=True)
class View:
    """Clips [B, C, T, H, W] float and the token subsets wanted of them: indices [B, K] each, None for all tokens."""

    clips: Tensor
    contexts: tuple[Tensor | None, ...] = (None,)


class Encoder(nn.Module):
    """Clips to tokens. One instance serves as context encoder (given token subsets) and as target encoder."""

    def __init__(self, config: EncoderConfig, *, attention: BackendName = "auto") -> None:
        super().__init__()
        self.config = config
        self.tokenizer = Tokenizer(
            config.embed_dim,
            patch_size=config.patch_size,
            tubelet_size=config.tubelet_size,
            in_chans=config.in_chans,
            image_tokenizer=config.image_tokenizer,
            modality_embed=config.modality_embed,
        )
        hidden_dim = round(config.embed_dim * config.mlp_ratio)
        attention = backend_for(config.attention_mask, attention)
        self.blocks = nn.ModuleList(
            Block(config.embed_dim, config.num_heads, hidden_dim, qkv_bias=config.qkv_bias, attention=attention)
            for _ in range(config.depth)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(config.embed_dim, eps=LAYER_NORM_EPS) for _ in config.levels)

    @property
    def levels(self) -> tuple[int, ...]:
        """0-based numbers of the blocks that have a level norm."""
        return self.config.levels

    @property
    def embed_dim(self) -> int:
        return self.config.embed_dim

    @property
    def patch_size(self) -> int:
        return self.config.patch_size

    @property
    def tubelet_size(self) -> int:
        return self.config.tubelet_size

    def grid(self, clips: Tensor) -> Grid:
        """Token grid (t, h, w) of clips [B, C, T, H, W]."""
        return self.tokenizer.grid(clips)

    def modality(self, clips: Tensor) -> Modality:
        """Which tokenizer clips [B, C, T, H, W] go through."""
        return self.tokenizer.modality(clips)

    @overload
    def forward(self, clips: Tensor, context: Tensor | None = None) -> Tensor: ...
    @overload
    def forward(self, clips: Tensor, context: Sequence[Tensor]) -> list[Tensor]: ...
    def forward(self, clips: Tensor, context: Tensor | Sequence[Tensor] | None = None) -> Tensor | list[Tensor]:
        """clips [B, C, T, H, W] float -> tokens [B, N, D] through the last level's norm.

        `context` [B, K] selects tokens by index before the first block and gives [B, K, D]; a sequence of such index
        tensors is run in one pass and gives a list.
        """
        contexts = (context,) if context is None or isinstance(context, Tensor) else tuple(context)
        states, layout = self._states([View(clips, contexts)], {self.levels[-1]})
        tokens = unpack(self.norms[-1](states[self.levels[-1]]), layout)
        return tokens[0] if context is None or isinstance(context, Tensor) else tokens

    def forward_levels(self, views: Sequence[View]) -> list[list[Tensor]]:
        """All token subsets of all views in one pass -> per view, per subset, levels side by side [B, K, L*D]."""
        states, layout = self._states(views, set(self.levels))
        flat = torch.cat([norm(states[i]) for i, norm in zip(self.levels, self.norms, strict=True)], dim=-1)
        outputs = iter(unpack(flat, layout))
        return [[next(outputs) for _ in view.contexts] for view in views]

    def forward_intermediates(
        self,
        clips: Tensor,
        *,
        indices: Sequence[int] | None = None,
        context: Tensor | None = None,
        output_fmt: Literal["NLC", "NCTHW"] = "NLC",
        norm: bool = True,
    ) -> list[Tensor]:
        """Outputs of the 0-based blocks `indices` (default: the levels), each through its level's norm.

        [B, N, D] each, or [B, D, t, h, w] with output_fmt="NCTHW". Blocks without a level norm only with norm=False.
        """
        wanted = list(self.levels if indices is None else indices)
        self._check_intermediates(wanted, context, output_fmt, norm)
        states, layout = self._states([View(clips, (context,))], set(wanted))
        outputs = []
        for index in wanted:
            state = self.norms[self.levels.index(index)](states[index]) if norm else states[index]
            outputs.append(unpack(state, layout)[0])
        if output_fmt == "NLC":
            return outputs
        return [tokens.transpose(1, 2).unflatten(2, self.grid(clips)) for tokens in outputs]

    def _check_intermediates(self, wanted: list[int], context: Tensor | None, output_fmt: str, norm: bool) -> None:
        for index in wanted:
            if not 0 <= index < self.config.depth:
                raise ValueError(f"indices: block {index} does not exist, the encoder has 0..{self.config.depth - 1}")
            if norm and index not in self.levels:
                raise ValueError(f"indices: block {index} has no level norm (levels {self.levels}); pass norm=False")
        if output_fmt not in ("NLC", "NCTHW"):
            raise ValueError(f"output_fmt={output_fmt!r} is unknown: choose NLC or NCTHW")
        if output_fmt == "NCTHW" and context is not None:
            raise ValueError("output_fmt='NCTHW' needs all tokens: leave context out or use NLC")

    def _states(self, views: Sequence[View], wanted: set[int]) -> tuple[dict[int, Tensor], list[Segments]]:
        """Flat outputs [N, D] of the wanted blocks for all subsets of all views, and their layout."""
        groups, tables, biases = [], [], []
        for view in views:
            tokens = self.tokenizer(view.clips)
            if self.config.absolute_position:
                grid, base = self.grid(view.clips), self.config.absolute_position_base
                position = sincos_table(grid, self.embed_dim, base, self.config.interpolate_rope, tokens.device)
                tokens = tokens + (self.config.absolute_position * position).to(tokens.dtype)
            table = self._table(self.grid(view.clips), tokens.device)
            for indices in view.contexts:
                groups.append(tokens if indices is None else take_tokens(tokens, indices))
                tables.append((table, indices, tokens.shape[0]))
                biases.append(self._bias(self.grid(view.clips), indices, tokens))
        x, layout = pack(groups)
        table = gather_table(tables)
        seen = [replace(segments, bias=bias) for segments, bias in zip(layout, biases, strict=True)]
        states = {}
        for index in range(max(wanted) + 1):
            x = self.blocks[index](x, table, seen)
            if index in wanted:
                states[index] = x
        return states, layout

    def _table(self, grid: Grid, device: torch.device) -> RopeTable:
        head_dim = self.config.embed_dim // self.config.num_heads
        return grid_table(grid, head_dim, self.config.rope, self.config.rope_base, self.config.interpolate_rope, device)

    def _bias(self, grid: Grid, indices: Tensor | None, tokens: Tensor) -> Tensor | None:
        """What block-causal attention adds to the scores of tokens at `indices` [B, K]; one time step needs nothing."""
        if self.config.attention_mask == "full" or grid[0] == 1:
            return None
        device = tokens.device
        places = torch.arange(tokens.shape[1], device=device)[None] if indices is None else indices
        is_cast = torch.is_autocast_enabled(device.type)  # made once in the dtype of the scores, not in every block
        dtype = torch.get_autocast_dtype(device.type) if is_cast else tokens.dtype
        return block_causal_bias(places // (grid[1] * grid[2]), dtype)
