"""Typed configuration: dataclass defaults < parent recipe < recipe < command line; unknown keys are errors.

Schemas are ordinary dataclasses beside their owners, with their checks in `__post_init__`. This module reads recipe
files with `extends`, merges them onto a schema and turns OmegaConf's complaints into one readable line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vjepa.nn.attention import AttentionMask, BackendName, backend_for
from vjepa.nn.encoder import Encoder, EncoderConfig
from vjepa.nn.init import WEIGHT_STD
from vjepa.nn.predictor import Predictor, PredictorConfig
from vjepa.nn.rope import BASE, RopeLayout
from vjepa.registry import create_encoder, create_predictor, model_config

SchemaT = TypeVar("SchemaT")


class ConfigError(ValueError):
    """A recipe or an override that does not fit the schema; the message names field, value and remedy."""


@dataclass
class ModelConfig:
    """The encoder by name, with what may differ from the named size."""

    name: str = "vit_large"  # one of vjepa.list_models()
    levels: list[int] | None = None  # supervised blocks, from 1; -1: the last; null: four equally spaced
    patch_size: int = 16  # pixels
    tubelet_size: int = 2  # frames
    rope: RopeLayout = "interleaved"  # tiled only for V-JEPA 2 weights
    rope_base: float = BASE  # longest wavelength over 2 pi; the demo's grids of 4 tokens take 100
    interpolate_rope: bool = True  # scale rows and columns, absolute ones too, to the 16-wide reference grid
    absolute_position: float = 0.0  # add fixed sines and cosines of the position, times this, to all tokens
    absolute_position_base: float = BASE  # of their frequencies; smaller for grids of a few tokens
    image_tokenizer: bool = True  # false: an image is a frame repeated to a tubelet (V-JEPA 2 weights)
    modality_embed: bool = True  # false: nothing tells video from images (V-JEPA 2 weights)
    init_std: float = WEIGHT_STD  # of the initial weights of encoder and predictor
    attention_mask: AttentionMask = "full"  # block_causal: a token sees its own and earlier time steps; sdpa only
    attention: BackendName = "auto"  # auto: on CUDA xformers, compiled varlen; else sdpa; bf16 on a CPU: matmul
    embed_dim: int | None = None  # in place of the named size's
    depth: int | None = None  # in place of the named size's
    num_heads: int | None = None  # in place of the named size's

    def __post_init__(self) -> None:
        if self.levels is not None and any(level < 1 and level != -1 for level in self.levels or [0]):
            raise ValueError(
                f"model.levels={self.levels}: recipes count blocks from 1 as the paper does ([12, 24, 36, 48]); only "
                "Python's levels=... counts from 0"
            )
        try:
            backend_for(self.attention_mask, self.attention)
        except ValueError as error:
            raise ValueError(f"model.{error}") from error

    def encoder_config(self) -> EncoderConfig:
        whole = model_config(self.name, depth=self.depth)  # refuses an unknown name
        return model_config(
            self.name,
            levels=None if self.levels is None else [(whole.depth if n == -1 else n) - 1 for n in self.levels],
            patch_size=self.patch_size,
            tubelet_size=self.tubelet_size,
            rope=self.rope,
            rope_base=self.rope_base,
            interpolate_rope=self.interpolate_rope,
            absolute_position=self.absolute_position,
            absolute_position_base=self.absolute_position_base,
            image_tokenizer=self.image_tokenizer,
            modality_embed=self.modality_embed,
            attention_mask=self.attention_mask,
            embed_dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
        )


@dataclass
class PredictorSettings:
    """The predictor's size; its inputs and outputs follow from the encoder."""

    embed_dim: int = 384  # width
    depth: int = 24  # blocks
    num_heads: int = 12
    mask_token_std: float = 0.0  # initial standard deviation of mask tokens; the reference starts at zero

    def predictor_config(self, encoder: EncoderConfig) -> PredictorConfig:
        return PredictorConfig(
            encoder_dim=encoder.embed_dim,
            num_levels=len(encoder.levels),
            target_dim=encoder.embed_dim * len(encoder.levels),
            embed_dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            rope=encoder.rope,
            rope_base=encoder.rope_base,
            interpolate_rope=encoder.interpolate_rope,
            absolute_position=encoder.absolute_position,
            absolute_position_base=encoder.absolute_position_base,
            modality_embed=encoder.modality_embed,
            mask_token_std=self.mask_token_std,
        )


def build_models(
    model: ModelConfig, predictor: PredictorSettings, *, seed: int, device: Any = None
) -> tuple[Encoder, Predictor]:
    """Encoder and predictor as configured, initialised from the seed ("meta": shapes only)."""
    encoder = create_encoder(
        model.encoder_config(), attention=model.attention, seed=seed, weight_std=model.init_std, device=device
    )
    settings = predictor.predictor_config(encoder.config)
    return encoder, create_predictor(
        settings, attention=model.attention, seed=seed, weight_std=model.init_std, device=device
    )


def read_recipe(path: Path) -> DictConfig:
    """A recipe file merged over the file it `extends` (relative to itself), and so on."""
    chain: list[Any] = []
    seen: set[Path] = set()
    current: Path | None = path.resolve()
    while current is not None:
        if current in seen:
            raise ConfigError(f"{path}: `extends` goes round in a circle at {current}")
        seen.add(current)
        if not current.is_file():
            raise ConfigError(f"recipe {current} does not exist")
        try:
            node = OmegaConf.load(current)
        except Exception as error:
            raise ConfigError(f"{current} is not readable YAML: {' '.join(str(error).split())}") from error
        if not isinstance(node, DictConfig):
            raise ConfigError(f"{current} must hold a mapping")
        parent = node.pop("extends", None)
        chain.append(node)
        current = (current.parent / parent).resolve() if parent else None
    merged = OmegaConf.merge(*reversed(chain))
    assert isinstance(merged, DictConfig)
    return merged


def resolve(schema: type[SchemaT], layers: Sequence[DictConfig], overrides: Sequence[str]) -> SchemaT:
    """The schema's object from its defaults, the layers in order, and `key=value` overrides.

    Raises ConfigError naming the unknown key, wrong value, missing value or broken rule.
    """
    return to_object(merge(schema, layers, overrides))


def merge(schema: type[Any], layers: Sequence[DictConfig], overrides: Sequence[str]) -> DictConfig:
    """The merged node of `resolve`, not yet turned into objects."""
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override!r} is no override: write key=value, for example train.steps=1000")
    try:
        node = OmegaConf.structured(schema)
        node = OmegaConf.merge(node, *layers)
        node = OmegaConf.merge(node, OmegaConf.from_dotlist(list(overrides)))
    except OmegaConfBaseException as error:
        raise ConfigError(_readable(error)) from error
    assert isinstance(node, DictConfig)
    return node


def to_object(node: DictConfig) -> Any:
    """Dataclass objects of a merged node, after their checks."""
    missing = sorted(OmegaConf.missing_keys(node))
    if missing:
        raise ConfigError(
            f"no value for {', '.join(missing)}: set it in the recipe or as key=value (or mistyped name?)"
        )
    try:
        return OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise ConfigError(_readable(error)) from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML, as it is stored with the run."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def config_hash(yaml: str) -> str:
    """A short name for a resolved configuration."""
    return hashlib.sha256(yaml.encode()).hexdigest()[:16]


def _readable(error: OmegaConfBaseException) -> str:
    """OmegaConf's message on one line: its first, and the full key where it knows one."""
    first = str(error).splitlines()[0]
    key = getattr(error, "full_key", None)
    return f"{key}: {first}" if key and key not in first else first
