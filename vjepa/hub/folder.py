"""Our own format: `model.safetensors` beside a `config.json`, a preprocessor file and a model card.

A predictor, where there is one, lies beside it in `predictor.safetensors`. Weights may be stored in bf16 or fp16: they
are read back into fp32, and what the rounding does to the features is measured and said in the card.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from vjepa.hub.card import model_card, preprocessor
from vjepa.hub.files import check_digests, file_digest, read_json, read_safetensors
from vjepa.hub.strict import WeightsError, load_strict, write_atomically
from vjepa.nn.attention import BackendName
from vjepa.nn.encoder import Encoder, EncoderConfig
from vjepa.nn.predictor import Predictor, PredictorConfig

FORMAT_VERSION = 1
WEIGHTS, CONFIG, PREDICTOR_WEIGHTS = "model.safetensors", "config.json", "predictor.safetensors"
PREPROCESSOR, CARD = "preprocessor_config.json", "README.md"
Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Rounding:
    """What storing weights in fewer bits does to the features of a random clip."""

    max_difference: float  # largest absolute difference of one number
    relative: float  # norm of the difference over the norm of the features


def save_pretrained(
    encoder: Encoder,
    folder: Path | str,
    *,
    predictor: Predictor | None = None,
    extra: Mapping[str, Any] | None = None,
    dtype: Dtype = "fp32",
    licence: str | None = None,
) -> Path:
    """Write an encoder's weights, configuration, preprocessing and model card to `folder`.

    `extra` is kept in config.json for the reader; of it `pretraining` (a flat mapping: recipe, steps, frames, fps,
    size, ...) is told in the card, and frames, fps and size go into the preprocessor file.
    """
    folder, weights = Path(folder), stored_as(encoder.state_dict(), dtype)
    beside = None if predictor is None else stored_as(predictor.state_dict(), dtype)
    folder.mkdir(parents=True, exist_ok=True)
    rounding = None if dtype == "fp32" else rounding_difference(encoder, weights)
    digests = {WEIGHTS: _save(weights, folder / WEIGHTS)}
    told = {"dtype": dtype, **(extra or {})}
    if predictor is not None and beside is not None:
        digests[PREDICTOR_WEIGHTS] = _save(beside, folder / PREDICTOR_WEIGHTS)
        told["predictor"] = asdict(predictor.config)
    else:
        (folder / PREDICTOR_WEIGHTS).unlink(missing_ok=True)  # of an export before this one
    trained_on = (extra or {}).get("pretraining", {})
    _write_json(folder / PREPROCESSOR, preprocessor(encoder.config, trained_on))
    card = model_card(
        folder.name, encoder, trained_on, sha256=digests[WEIGHTS], dtype=dtype, rounding=rounding,
        predictor=predictor, licence=licence,
    )  # fmt: skip
    write_atomically(folder / CARD, lambda path: path.write_text(card))
    save_config(encoder.config, folder, extra={**told, "sha256": digests})  # last: it says the rest is there
    return folder


def save_config(config: EncoderConfig, folder: Path | str, *, extra: Mapping[str, Any] | None = None) -> None:
    """Write what `encoder_config` reads; a folder with nothing else says what shape its weights will have."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / CONFIG, {"format_version": FORMAT_VERSION, "encoder": asdict(config), **(extra or {})})


def read_encoder(folder: Path, *, attention: BackendName = "auto") -> Encoder:
    """The encoder of a folder of ours, in fp32."""
    encoder = Encoder(read_encoder_config(folder), attention=attention)
    load_strict(encoder, read_safetensors(folder / WEIGHTS), source=str(folder / WEIGHTS))
    return encoder


def read_predictor(folder: Path, *, attention: BackendName = "auto") -> Predictor | None:
    """The predictor of a folder of ours, None where it holds none."""
    config = read_predictor_config(folder)
    if config is None:
        return None
    predictor = Predictor(config, attention=attention)
    load_strict(predictor, read_safetensors(folder / PREDICTOR_WEIGHTS), source=str(folder / PREDICTOR_WEIGHTS))
    return predictor


def read_encoder_config(folder: Path) -> EncoderConfig:
    stored = read_config(folder)
    if stored.get("format_version") != FORMAT_VERSION:
        raise WeightsError(
            f"{folder / CONFIG}: format_version is {stored.get('format_version')!r}, this code reads {FORMAT_VERSION}"
        )
    try:
        return EncoderConfig(**stored.get("encoder", {}))
    except (TypeError, ValueError) as error:
        raise WeightsError(
            f"{folder / CONFIG}: the encoder's configuration does not fit this version: {error}"
        ) from error


def read_predictor_config(folder: Path) -> PredictorConfig | None:
    """None where the folder holds no predictor."""
    stored = read_config(folder).get("predictor")
    try:
        return None if stored is None else PredictorConfig(**stored)
    except TypeError as error:
        raise WeightsError(f"{folder / CONFIG}: the predictor's configuration does not fit: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json holds; FileNotFoundError says what to give instead of a folder without one."""
    path = folder / CONFIG
    if path.is_file():
        return read_json(path)
    if exports := sorted(found.parent for found in folder.glob(f"exports/*/{CONFIG}")):
        raise FileNotFoundError(f"{folder} is a run: give one of its exports, {', '.join(map(str, exports))}")
    raise FileNotFoundError(
        f"{folder} {f'holds no {CONFIG}' if folder.is_dir() else 'does not exist'}: give a folder written by "
        "vjepa.hub.save_pretrained (RUN/exports/STAGE), a folder of a VJEPA2Model saved by transformers, or a released "
        ".pt file. Nothing is downloaded by name."
    )


def verify(folder: Path) -> list[str]:
    """Compare every file of a folder of ours with the SHA-256 in its config.json; their names.

    Not part of loading, which every rank of a node does at once: 500 MB take 0.56 s of a core, and a ViT-G has 7.4 GB.
    """
    known = read_config(folder).get("sha256")
    if not known:
        raise WeightsError(f"{folder / CONFIG} has no SHA-256 of its files: only folders of ours written with it do")
    check_digests(folder, known)
    return list(known)


def stored_as(weights: Mapping[str, Tensor], dtype: Dtype) -> dict[str, Tensor]:
    """Weights as they are written to a file; ValueError for a dtype that is unknown or too narrow for a value."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    stored = {name: value.detach().to("cpu", DTYPES[dtype]).contiguous() for name, value in weights.items()}
    if dtype != "fp32":
        for name, value in stored.items():
            if not value.isfinite().all():
                raise ValueError(f"dtype={dtype}: {name} has values beyond its range; use bf16")
    return stored


@torch.no_grad()
def rounding_difference(encoder: Encoder, rounded: Mapping[str, Tensor]) -> Rounding:
    """Features of a random clip with the rounded weights, against those with the encoder's own."""
    clips = probe_clips(encoder)
    other = copy.deepcopy(encoder)
    other.load_state_dict(rounded)
    exact, coarse = encoder(clips), other(clips)
    difference = coarse - exact
    return Rounding(float(difference.abs().max()), float(difference.norm() / exact.norm()))


def probe_clips(encoder: Encoder, *, patches: int = 4) -> Tensor:
    """A random normalised clip of two time steps for comparisons: [1, C, T, H, W], on the encoder's device."""
    size = patches * encoder.patch_size
    shape = (1, encoder.config.in_chans, 2 * encoder.tubelet_size, size, size)
    clips = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return clips.to(next(encoder.parameters()).device)


def _save(weights: Mapping[str, Tensor], path: Path) -> str:
    """Write weights; the file's SHA-256."""
    write_atomically(path, lambda temporary: save_file(dict(weights), temporary))
    return file_digest(path)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))
