"""Floating-point operations of encoder and predictor, counted from shapes: no profiler sees fused attention everywhere.

A multiplication and an addition are two. Counted: matrix products of linear layers, patch embeddings and attention;
norms, activations, rotations and softmax are left out, as is usual for MFU. A backward pass is twice its forward pass.
Block-causal attention counts as full attention: it is computed so, with scores that are thrown away.
"""

from __future__ import annotations

from collections.abc import Iterable

from vjepa.batch import Grid, Modality
from vjepa.nn.encoder import EncoderConfig
from vjepa.nn.latent import LatentConfig
from vjepa.nn.predictor import PredictorConfig

FORWARD_BACKWARD = 3  # times the forward pass


def block_flops(dim: int, hidden_dim: int, lengths: Iterable[int]) -> int:
    """One transformer block, forward, over sequences of these lengths."""
    lengths = list(lengths)
    linear = 2 * sum(lengths) * (4 * dim * dim + 2 * dim * hidden_dim)
    attention = 4 * dim * sum(length * length for length in lengths)  # q k^T, and its product with v
    return linear + attention


def encoder_flops(
    config: EncoderConfig, grid: Grid, modality: Modality, clips: int, contexts: Iterable[int | None]
) -> int:
    """Forward pass of `clips` clips through the tokenizer once and through the blocks for each of `contexts`.

    A context is the number of tokens that are kept, None for all of the grid.
    """
    tokens = grid[0] * grid[1] * grid[2]
    frames = 1 if modality == "image" and config.image_tokenizer else config.tubelet_size
    patch = config.in_chans * frames * config.patch_size**2
    hidden_dim = round(config.embed_dim * config.mlp_ratio)
    lengths = [tokens if kept is None else kept for kept in contexts]
    embedding = 2 * tokens * patch * config.embed_dim
    return clips * (embedding + config.depth * block_flops(config.embed_dim, hidden_dim, lengths))


def predictor_flops(config: PredictorConfig, clips: int, queries: Iterable[tuple[int, int]]) -> int:
    """Forward pass of `clips` clips for each query (context tokens, masked tokens)."""
    width, dim, levels = config.embed_dim, config.encoder_dim, config.num_levels
    embed = levels * dim * dim + dim * width if levels > 1 else dim * width
    total = 0
    for context, masked in queries:
        read = context * embed + (masked + context * config.context_head) * width * config.target_dim
        total += 2 * read + config.depth * block_flops(width, round(width * config.mlp_ratio), [context + masked])
    return clips * total


def latent_flops(
    config: LatentConfig, predictor: PredictorConfig, clips: int, tokens: int, masked: Iterable[int]
) -> int:
    """Forward pass of the latents of clips of so many tokens, for each number of masked ones, and of their reader."""
    if config.kind == "none":
        return 0
    told = 2 * config.width if config.kind == "gaussian" else config.width
    total = 2 * tokens * predictor.target_dim * config.hidden_dim
    for count in masked:
        latents = 1 if config.per == "clip" else count
        total += 2 * latents * (config.hidden_dim * told + config.width * predictor.embed_dim)
    return clips * total
