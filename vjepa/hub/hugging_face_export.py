"""Folders that `transformers`' VJEPA2Model loads, written without importing it, and compared where it is installed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vjepa.batch import IMAGENET_MEAN, IMAGENET_STD
from vjepa.hub.files import file_digest
from vjepa.hub.folder import CARD, CONFIG, DTYPES, WEIGHTS, Dtype, probe_clips, stored_as
from vjepa.hub.hugging_face import (
    ENCODER_NAMES,
    FIELDS_OF_2_1,
    LAYOUT,
    MASK_TOKENS,
    MODEL_TYPE,
    PREDICTOR_NAMES,
)
from vjepa.hub.strict import rename, swapped, write_atomically
from vjepa.nn.encoder import Encoder, EncoderConfig
from vjepa.nn.layers import LAYER_NORM_EPS
from vjepa.nn.predictor import Predictor, PredictorConfig
from vjepa.nn.rope import BASE

VIDEO_PREPROCESSOR = "video_preprocessor_config.json"
NUM_MASK_TOKENS = 10
INSTALL = "pip install 'transformers>=5'"


def export_hf(
    encoder: Encoder,
    folder: Path | str,
    predictor: Predictor | None = None,
    *,
    size: int = 256,
    frames: int = 64,
    dtype: Dtype = "fp32",
) -> Path:
    """Write a folder that `transformers.VJEPA2Model.from_pretrained` loads and that gives our numbers within 1e-5.

    `size` becomes crop_size: the class gives our numbers on square clips of that size only. Without a predictor
    transformers says on loading that its predictor is new: call it with skip_predictor=True. Raises ValueError, with
    all reasons, for an encoder or predictor that is not in the layout of V-JEPA 2.
    """
    reasons = _not_version_2(encoder.config)
    if predictor is not None:
        reasons += _no_hf_predictor(predictor.config, encoder.config)
    if reasons:
        raise ValueError(
            f"transformers' VJEPA2Model cannot hold this model: {'; '.join(reasons)}. {_support_of_2_1()} Use "
            "vjepa.hub.save_pretrained or export_onnx"
        )
    if size % encoder.patch_size or frames % encoder.tubelet_size:
        raise ValueError(
            f"size={size} and frames={frames} must be multiples of patch_size={encoder.patch_size} and "
            f"tubelet_size={encoder.tubelet_size}"
        )
    state = rename(_parted(encoder.state_dict()), swapped(ENCODER_NAMES))
    if predictor is not None:
        state |= _hf_predictor_state(predictor)
    state = stored_as(state, dtype)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt"}))
    config = _hf_config(encoder.config, None if predictor is None else predictor.config, size, frames, dtype)
    for name, content in ((VIDEO_PREPROCESSOR, _hf_preprocessor(size)), (CONFIG, config)):
        text = json.dumps(content, indent=2) + "\n"
        write_atomically(folder / name, lambda path, text=text: path.write_text(text))
    card = _hf_card(folder, size, has_predictor=predictor is not None)
    write_atomically(folder / CARD, lambda path: path.write_text(card))
    return folder


@torch.no_grad()
def compare_with_transformers(encoder: Encoder, folder: Path | str, predictor: Predictor | None = None) -> float:
    """Largest difference between our features (and predictions) and those of the folder's VJEPA2Model.

    On one random clip of its size; the predictor reads the first half of the tokens and predicts the other half.
    """
    try:
        from transformers import VJEPA2Model
    except ImportError as error:
        raise ValueError(f"comparing with transformers needs it installed: {INSTALL}") from error
    model = VJEPA2Model.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32).eval()
    patches = model.config.crop_size // encoder.patch_size
    clips = probe_clips(encoder, patches=patches).cpu()
    ours = encoder.cpu().eval()(clips)
    places = torch.arange(ours.shape[1])[None]
    context, masked = places.tensor_split(2, dim=1)
    theirs = model(
        clips.transpose(1, 2), context_mask=[context], target_mask=[masked], skip_predictor=predictor is None
    )
    difference = float((ours - theirs.last_hidden_state).abs().max())
    if predictor is None:
        return difference
    predicted, _ = predictor.cpu().eval()(
        ours[:, : context.shape[1]], context=context, masked=masked, grid=encoder.grid(clips), modality="video"
    )
    return max(difference, float((predicted - theirs.predictor_output.last_hidden_state).abs().max()))


def _not_version_2(config: EncoderConfig) -> list[str]:
    """Why an encoder is not in the layout of V-JEPA 2, field by field."""
    needed = {
        **LAYOUT,
        "rope_base": BASE,
        "absolute_position": 0.0,
        "attention_mask": "full",
        "levels": (config.depth - 1,),
    }
    return [
        f"{name}={getattr(config, name)!r}, it has {value!r} only"
        for name, value in needed.items()
        if getattr(config, name) != value
    ]


def _no_hf_predictor(config: PredictorConfig, encoder: EncoderConfig) -> list[str]:
    needed = {
        "encoder_dim": encoder.embed_dim,
        "qkv_bias": encoder.qkv_bias,
        "num_levels": 1,
        "target_dim": config.encoder_dim,
        "rope": "tiled",
        "rope_base": BASE,
        "interpolate_rope": False,
        "absolute_position": 0.0,
        "modality_embed": False,
        "context_head": False,
        "latent_dim": 0,
    }
    return [
        f"the predictor's {name}={getattr(config, name)!r}, it has {value!r} only"
        for name, value in needed.items()
        if getattr(config, name) != value
    ]


def _support_of_2_1() -> str:
    """What the installed transformers has of V-JEPA 2.1, by the fields of its configuration."""
    try:
        import transformers
        from transformers import VJEPA2Config
    except ImportError:
        return "transformers is not installed; up to release 5.24 it has no V-JEPA 2.1."
    found = [name for name in FIELDS_OF_2_1 if hasattr(VJEPA2Config(), name)]
    if not found:
        return f"The installed transformers {transformers.__version__} has no V-JEPA 2.1: none of {FIELDS_OF_2_1}."
    return (
        f"The installed transformers {transformers.__version__} seems to have V-JEPA 2.1 ({', '.join(found)}), but "
        "this code has never been compared with it and does not write it."
    )


def _parted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_joined`."""
    parted = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                parted[name.replace("attn.qkv", f"attention.{part}")] = rows
        else:
            parted[name.replace(".attn.proj.", ".attention.proj.")] = value
    return parted


def _hf_predictor_state(predictor: Predictor) -> dict[str, Tensor]:
    state = {name: value for name, value in predictor.state_dict().items() if not name.startswith("mask_tokens.")}
    token = predictor.mask_tokens["video"].detach()
    tokens = token.expand(NUM_MASK_TOKENS, 1, 1, -1)
    return {**rename(_parted(state), swapped(PREDICTOR_NAMES)), MASK_TOKENS: tokens}


def _hf_config(
    encoder: EncoderConfig, predictor: PredictorConfig | None, size: int, frames: int, dtype: Dtype
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["VJEPA2Model"],
        "model_type": MODEL_TYPE,
        "dtype": str(DTYPES[dtype]).removeprefix("torch."),
        "patch_size": encoder.patch_size,
        "crop_size": size,
        "frames_per_clip": frames,
        "tubelet_size": encoder.tubelet_size,
        "hidden_size": encoder.embed_dim,
        "in_chans": encoder.in_chans,
        "num_attention_heads": encoder.num_heads,
        "num_hidden_layers": encoder.depth,
        "mlp_ratio": _mlp_ratio(encoder.embed_dim, encoder.mlp_ratio),
        "layer_norm_eps": LAYER_NORM_EPS,
        "qkv_bias": encoder.qkv_bias,
        "hidden_act": "gelu",
    }
    if predictor is not None:
        config |= {
            "pred_hidden_size": predictor.embed_dim,
            "pred_num_attention_heads": predictor.num_heads,
            "pred_num_hidden_layers": predictor.depth,
            "pred_num_mask_tokens": NUM_MASK_TOKENS,
            "pred_mlp_ratio": _mlp_ratio(predictor.embed_dim, predictor.mlp_ratio),
        }
    return config


def _mlp_ratio(dim: int, ratio: float) -> float:
    """A ratio of which transformers, which rounds down, makes the hidden width that we round to."""
    hidden = round(dim * ratio)
    exact = hidden / dim
    return exact if int(dim * exact) == hidden else math.nextafter(exact, math.inf)


def _hf_preprocessor(size: int) -> dict[str, Any]:
    """The fields of VJEPA2VideoProcessor: short side to 256/224 of the crop, its centre, the ImageNet statistics."""
    return {
        "video_processor_type": "VJEPA2VideoProcessor",
        "do_resize": True,
        "size": {"shortest_edge": int(size * 256 / 224)},
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "resample": 2,
    }


def _hf_card(folder: Path, size: int, *, has_predictor: bool) -> str:
    predictor = "" if has_predictor else " The predictor is not in it: what transformers makes of it is untrained."
    return (
        "---\nlicense: unknown\nlibrary_name: transformers\npipeline_tag: feature-extraction\n---\n\n"
        f"# {folder.name}\n\nA V-JEPA 2 encoder for `transformers`.{predictor} The class derives rows and columns from "
        f"crop_size={size}: give square clips of that size.\n\n"
        f"SHA-256 of {WEIGHTS}: `{file_digest(folder / WEIGHTS)}`\n\n"
        "```python\nfrom transformers import VJEPA2Model\n\n"
        'model = VJEPA2Model.from_pretrained("THIS_FOLDER")\n'
        f"clips = ...  # float [B, T, 3, {size}, {size}], ImageNet mean and standard deviation\n"
        "tokens = model(clips, skip_predictor=True).last_hidden_state\n```\n"
    )
