"""What a file or folder of weights holds, in words: which model, which entry, levels, RoPE, parameters."""

from __future__ import annotations

from pathlib import Path

import torch

from vjepa.hub import folder as own
from vjepa.hub.card import network_facts, num_parameters, words
from vjepa.hub.hugging_face import read_hf_configs
from vjepa.hub.layouts import ReleasedPredictor, clean
from vjepa.hub.pretrained import is_hugging_face
from vjepa.hub.released import ENCODER_KEYS, read_checkpoint, released_encoder, same_size
from vjepa.nn.encoder import Encoder, EncoderConfig
from vjepa.nn.predictor import Predictor, PredictorConfig
from vjepa.registry import SIZES


def describe(path: Path | str) -> dict[str, str]:
    """Facts about the weights at `path`, label -> words; nothing but names and shapes is read of a .pt file.

    Raises WeightsError for a layout that is not known, with the nearest one.
    """
    path = Path(path)
    if path.is_file():
        return _released(path)
    return _hugging_face(path) if is_hugging_face(path) else _own(path)


def _released(path: Path) -> dict[str, str]:
    checkpoint = read_checkpoint(path)
    released = released_encoder(checkpoint, path)
    config = released.config()
    files = ", ".join(f"{file.title} ({file.name})" for file in same_size(released))
    facts = {
        "format": f"released checkpoint, layout of {released.layout.name}",
        "model": files or f"none of the released sizes; {size_name(config)}",
        "key": f"{released.source.rpartition('[')[2].rstrip(']')}; encoders there: "
        + ", ".join(key for key in ENCODER_KEYS if key in checkpoint),
        **_encoder(config),
    }
    try:
        predictor = ReleasedPredictor(clean(checkpoint["predictor"]), released.layout, str(path)).config(config, 12)
    except ValueError as error:
        return {**facts, "predictor": f"not readable: {error}"}
    return {**facts, "predictor": _predictor(predictor)}


def _own(path: Path) -> dict[str, str]:
    stored = own.read_config(path)
    config = own.read_encoder_config(path)
    facts = {
        "format": f"our own, weights in {stored.get('dtype', 'fp32')}",
        "model": size_name(config),
        **_encoder(config),
    }
    facts |= {str(name): words(value) for name, value in stored.get("pretraining", {}).items() if value is not None}
    predictor = own.read_predictor_config(path)
    return facts if predictor is None else {**facts, "predictor": _predictor(predictor)}


def _hugging_face(path: Path) -> dict[str, str]:
    config, predictor = read_hf_configs(path)
    crop = own.read_config(path).get("crop_size", 256)
    return {
        "format": "Hugging Face, transformers' VJEPA2Model (layout of V-JEPA 2)",
        "model": size_name(config),
        **_encoder(config),
        "predictor": f"{_predictor(predictor)} (by config.json)",
        "crop_size": f"{crop}: transformers numbers rows and columns by it whatever the clip, this code by the clip",
    }


def size_name(config: EncoderConfig) -> str:
    """The registry's name of an encoder's size, or its widths."""
    for name, size in SIZES.items():
        if (size.embed_dim, size.depth, size.num_heads) == (config.embed_dim, config.depth, config.num_heads):
            return name
    return f"{config.embed_dim} wide, {config.depth} blocks"


def _encoder(config: EncoderConfig) -> dict[str, str]:
    with torch.device("meta"):
        parameters = num_parameters(Encoder(config))
    return {
        "parameters": f"{parameters:,}",
        "width, blocks, heads": f"{config.embed_dim}, {config.depth}, {config.num_heads}",
        **network_facts(config),
    }


def _predictor(config: PredictorConfig) -> str:
    with torch.device("meta"):
        parameters = num_parameters(Predictor(config))
    return (
        f"{parameters:,} parameters, {config.embed_dim} wide, {config.depth} blocks; reads {config.num_levels} "
        f"level{'s' if config.num_levels > 1 else ''}, gives {config.target_dim} channels"
    )
