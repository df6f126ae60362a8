"""Encoders by name, in the sizes of the reference (section 1.1)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vjepa.nn.attention import AttentionMask, BackendName
from vjepa.nn.encoder import Encoder, EncoderConfig
from vjepa.nn.init import WEIGHT_STD, build
from vjepa.nn.predictor import Predictor, PredictorConfig
from vjepa.nn.rope import BASE, RopeLayout


@dataclass(frozen=True)
class Size:
    """Width, depth, heads and MLP ratio of a named encoder."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0


SIZES = {
    "vit_debug": Size(48, 4, 3),
    "vit_tiny": Size(192, 12, 3),
    "vit_small": Size(384, 12, 6),
    "vit_base": Size(768, 12, 12),
    "vit_large": Size(1024, 24, 16),
    "vit_huge": Size(1280, 32, 16),
    "vit_giant": Size(1408, 40, 22, 48 / 11),
    "vit_gigantic": Size(1664, 48, 26, 64 / 13),
}


def list_models() -> list[str]:
    """Names that `create_model` takes, by size."""
    return list(SIZES)


def model_config(
    name: str,
    *,
    levels: Sequence[int] | None = None,
    patch_size: int = 16,
    tubelet_size: int = 2,
    rope: RopeLayout = "interleaved",
    rope_base: float = BASE,
    interpolate_rope: bool = True,
    absolute_position: float = 0.0,
    absolute_position_base: float = BASE,
    image_tokenizer: bool = True,
    modality_embed: bool = True,
    attention_mask: AttentionMask = "full",
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
) -> EncoderConfig:
    """The configuration of the named encoder; levels are 0-based and default to four equally spaced ones."""
    if name not in SIZES:
        close = difflib.get_close_matches(name, SIZES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"there is no model {name!r}.{hint} Models: {', '.join(SIZES)}")
    size = SIZES[name]
    return EncoderConfig(
        embed_dim=embed_dim or size.embed_dim,
        depth=depth or size.depth,
        num_heads=num_heads or size.num_heads,
        mlp_ratio=size.mlp_ratio,
        levels=tuple(levels or ()),
        patch_size=patch_size,
        tubelet_size=tubelet_size,
        rope=rope,
        rope_base=rope_base,
        interpolate_rope=interpolate_rope,
        absolute_position=absolute_position,
        absolute_position_base=absolute_position_base,
        image_tokenizer=image_tokenizer,
        modality_embed=modality_embed,
        attention_mask=attention_mask,
    )


def create_model(
    name: str,
    *,
    levels: Sequence[int] | None = None,
    patch_size: int = 16,
    tubelet_size: int = 2,
    rope: RopeLayout = "interleaved",
    interpolate_rope: bool = True,
    image_tokenizer: bool = True,
    modality_embed: bool = True,
    attention_mask: AttentionMask = "full",
    attention: BackendName = "auto",
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Encoder:
    """A freshly initialised encoder, deterministic in `seed`; device="meta" costs no memory."""
    config = model_config(
        name,
        levels=levels,
        patch_size=patch_size,
        tubelet_size=tubelet_size,
        rope=rope,
        interpolate_rope=interpolate_rope,
        image_tokenizer=image_tokenizer,
        modality_embed=modality_embed,
        attention_mask=attention_mask,
    )
    return create_encoder(config, attention=attention, device=device, seed=seed)


def create_encoder(
    config: EncoderConfig,
    *,
    attention: BackendName = "auto",
    device: torch.device | str | None = None,
    seed: int = 0,
    weight_std: float = WEIGHT_STD,
) -> Encoder:
    """An encoder of any configuration, freshly initialised with weights of standard deviation `weight_std`."""
    return build(
        lambda: Encoder(config, attention=attention), scope="encoder", seed=seed, weight_std=weight_std, device=device
    )


def create_predictor(
    config: PredictorConfig,
    *,
    attention: BackendName = "auto",
    device: torch.device | str | None = None,
    seed: int = 0,
    weight_std: float = WEIGHT_STD,
) -> Predictor:
    """A predictor, freshly initialised, deterministic in `seed`."""
    return build(
        lambda: Predictor(config, attention=attention),
        scope="predictor",
        seed=seed,
        weight_std=weight_std,
        device=device,
    )
