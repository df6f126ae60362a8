"""Hugging Face folders of `transformers`' VJEPA2Model, read without importing transformers.

The class has the layout of V-JEPA 2 alone: tiled RoPE at unscaled positions, one final norm, no image tokenizer, no
modality embeddings. It derives rows and columns from config.crop_size, so its numbers are ours on square clips of that
size only (others: differences of the size of the features, reference 3). Its predictor takes mask token 1 of ten by
default, of which only token 0 was ever trained: it is token 0 that is read, and all ten that are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjepa.batch import MODALITIES
from vjepa.hub.files import read_json, read_safetensors
from vjepa.hub.folder import CONFIG, WEIGHTS, read_config
from vjepa.hub.layouts import encoder_heads
from vjepa.hub.strict import Names, WeightsError, load_strict, rename
from vjepa.nn.attention import BackendName
from vjepa.nn.encoder import Encoder, EncoderConfig
from vjepa.nn.layers import LAYER_NORM_EPS
from vjepa.nn.predictor import Predictor, PredictorConfig

MODEL_TYPE = "vjepa2"
SHARDS = "model.safetensors.index.json"
CLASSIFIER_PARTS = ("pooler.", "classifier.")
MASK_TOKENS = "predictor.embeddings.mask_tokens"
FIELDS_OF_2_1 = (
    "use_rope_interleave",
    "interpolate_rope",
    "use_modality_embeddings",
    "use_image_patch_embedder",
    "hierarchical_layers",
)  # of huggingface/transformers pull request 45497, in no release yet
ENCODER_NAMES: Names = (
    ("encoder.embeddings.patch_embeddings.proj.", "tokenizer.video."),
    ("encoder.layer.", "blocks."),
    ("encoder.layernorm.", "norms.0."),
)
PREDICTOR_NAMES: Names = (
    ("predictor.embeddings.predictor_embeddings.", "embed."),
    ("predictor.layer.", "blocks."),
    ("predictor.layernorm.", "norm."),
    ("predictor.proj.", "masked_head."),
)
LAYOUT: dict[str, Any] = {
    "rope": "tiled",
    "interpolate_rope": False,
    "image_tokenizer": False,
    "modality_embed": False,
}
DEFAULTS: dict[str, Any] = {  # of VJEPA2Config: transformers leaves fields at their defaults out of some files
    "patch_size": 16,
    "tubelet_size": 2,
    "hidden_size": 1024,
    "in_chans": 3,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "mlp_ratio": 4.0,
    "layer_norm_eps": LAYER_NORM_EPS,
    "qkv_bias": True,
    "hidden_act": "gelu",
    "pred_hidden_size": 384,
    "pred_num_attention_heads": 12,
    "pred_num_hidden_layers": 12,
    "pred_mlp_ratio": 4.0,
}


def import_hf(folder: Path | str, *, attention: BackendName = "auto") -> tuple[Encoder, Predictor | None]:
    """Encoder and predictor of a folder saved by VJEPA2Model (or its classifier, whose head is left out), strictly."""
    folder = Path(folder)
    encoder_config, predictor_config = read_hf_configs(folder)
    weights = _read_weights(folder)
    parts = {
        part: {name: value for name, value in weights.items() if name.startswith("predictor.") is (part == "predictor")}
        for part in ("encoder", "predictor")
    }
    encoder = Encoder(encoder_config, attention=attention)
    load_strict(encoder, rename(_joined(parts["encoder"]), ENCODER_NAMES), source=f"{folder}[encoder]")
    if not parts["predictor"]:
        return encoder, None
    predictor = Predictor(predictor_config, attention=attention)
    load_strict(predictor, _predictor_state(parts["predictor"], folder), source=f"{folder}[predictor]")
    return encoder, predictor


def read_hf_configs(folder: Path) -> tuple[EncoderConfig, PredictorConfig]:
    """What config.json says of both networks; fields that would change the numbers and are not ours are refused."""
    stored, source = {**DEFAULTS, **read_config(folder)}, str(folder / CONFIG)
    _refuse_other_numbers(stored, source)
    width, narrow = stored["hidden_size"], stored["pred_hidden_size"]
    heads = encoder_heads(width, stored["num_hidden_layers"], stored["num_attention_heads"], source)
    if narrow % stored["pred_num_attention_heads"]:
        raise WeightsError(
            f"{source}: pred_hidden_size={narrow} does not divide by pred_num_attention_heads="
            f"{stored['pred_num_attention_heads']}"
        )
    encoder = EncoderConfig(
        embed_dim=width,
        depth=stored["num_hidden_layers"],
        num_heads=heads,
        mlp_ratio=int(width * stored["mlp_ratio"]) / width,
        qkv_bias=stored["qkv_bias"],
        levels=(stored["num_hidden_layers"] - 1,),
        patch_size=stored["patch_size"],
        tubelet_size=stored["tubelet_size"],
        in_chans=stored["in_chans"],
        **LAYOUT,
    )
    predictor = PredictorConfig(
        encoder_dim=width,
        num_levels=1,
        target_dim=width,
        embed_dim=narrow,
        depth=stored["pred_num_hidden_layers"],
        num_heads=stored["pred_num_attention_heads"],
        mlp_ratio=int(narrow * stored["pred_mlp_ratio"]) / narrow,
        qkv_bias=stored["qkv_bias"],
        rope="tiled",
        interpolate_rope=False,
        modality_embed=False,
        context_head=False,
    )
    return encoder, predictor


def _refuse_other_numbers(stored: Mapping[str, Any], source: str) -> None:
    for name, ours in (("layer_norm_eps", LAYER_NORM_EPS), ("hidden_act", "gelu")):
        if stored[name] != ours:
            raise WeightsError(f"{source}: {name}={stored[name]!r}, this code computes with {ours!r} only")
    if not isinstance(stored["patch_size"], int):
        raise WeightsError(f"{source}: patch_size={stored['patch_size']} must be one number: patches are square here")
    if newer := [name for name in FIELDS_OF_2_1 if stored.get(name)]:
        raise WeightsError(
            f"{source}: {', '.join(newer)}: a V-JEPA 2.1 model of transformers, whose weights are not read yet (as "
            "V-JEPA 2 they would load with the wrong RoPE); give the released .pt file"
        )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of one file or several, fp32, without the classifier's prefix and head."""
    if (folder / SHARDS).is_file():
        files = sorted(set(read_json(folder / SHARDS).get("weight_map", {}).values()))
    else:
        files = [WEIGHTS]
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: only safetensors are read")
    weights = {key: value for name in files for key, value in read_safetensors(folder / name).items()}
    weights = {key.removeprefix("vjepa2."): value for key, value in weights.items()}
    return {key: value for key, value in weights.items() if not key.startswith(CLASSIFIER_PARTS)}


def _joined(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """query, key and value as one qkv: rows in this order, as in the released files."""
    state = {}
    for name, value in weights.items():
        if ".attention.query." in name:
            parts = [weights.get(name.replace("query", part)) for part in ("query", "key", "value")]
            if all(part is not None for part in parts):
                state[name.replace("attention.query", "attn.qkv")] = torch.cat([p for p in parts if p is not None])
        elif ".attention.key." not in name and ".attention.value." not in name:
            state[name.replace(".attention.proj.", ".attn.proj.")] = value
    return state


def _predictor_state(weights: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    if MASK_TOKENS not in weights:
        raise WeightsError(f"{folder}[predictor]: missing {MASK_TOKENS}")
    trained = weights[MASK_TOKENS][0].flatten()
    others = {name: value for name, value in weights.items() if name != MASK_TOKENS}
    state = rename(_joined(others), PREDICTOR_NAMES)
    return state | {f"mask_tokens.{name}": trained.clone() for name in MODALITIES}
