"""Weights of any format by their path: a folder of ours, a Hugging Face folder, a released .pt file."""

from __future__ import annotations

from pathlib import Path

import torch

from vjepa.hub import folder as own
from vjepa.hub import hugging_face
from vjepa.hub.released import import_encoder, import_official, read_checkpoint, released_encoder
from vjepa.hub.strict import WeightsError
from vjepa.nn.attention import BackendName
from vjepa.nn.encoder import Encoder, EncoderConfig
from vjepa.nn.predictor import Predictor, PredictorConfig


def from_pretrained(
    path: Path | str, *, attention: BackendName = "auto", device: torch.device | str | None = None
) -> Encoder:
    """The encoder in a folder of ours, a Hugging Face folder of VJEPA2Model or a released .pt, in evaluation mode.

    Loading is strict; nothing is ever downloaded. A Hugging Face folder needs no transformers. Its model takes rows and
    columns from its config's crop_size, this one from the clip: they agree on square clips of that size.
    """
    path = Path(path)
    if path.is_file():
        encoder = import_encoder(path, attention=attention)
    elif is_hugging_face(path):
        encoder = hugging_face.import_hf(path, attention=attention)[0]
    else:
        encoder = own.read_encoder(path, attention=attention)
    return encoder.to(device or "cpu").eval()


def predictor_from_pretrained(
    path: Path | str, *, attention: BackendName = "auto", device: torch.device | str | None = None
) -> Predictor | None:
    """The predictor that lies beside the encoder of `from_pretrained`, in evaluation mode; None where there is none."""
    path = Path(path)
    if path.is_file():
        predictor: Predictor | None = import_official(path, attention=attention)[1]
    elif is_hugging_face(path):
        predictor = hugging_face.import_hf(path, attention=attention)[1]
    else:
        predictor = own.read_predictor(path, attention=attention)
    return None if predictor is None else predictor.to(device or "cpu").eval()


def encoder_config(path: Path | str) -> EncoderConfig:
    """The configuration of what `from_pretrained` would give, without its weights."""
    path = Path(path)
    if path.is_file():
        return released_encoder(read_checkpoint(path), path).config()
    if is_hugging_face(path):
        return hugging_face.read_hf_configs(path)[0]
    return own.read_encoder_config(path)


def predictor_config(path: Path | str) -> PredictorConfig | None:
    """The configuration of what `predictor_from_pretrained` would give; of a folder of ours without its weights."""
    path = Path(path)
    if path.is_file() or is_hugging_face(path):
        predictor = predictor_from_pretrained(path)
        return None if predictor is None else predictor.config
    return own.read_predictor_config(path)


def is_hugging_face(path: Path) -> bool:
    """Whether a folder's config.json is one of transformers; WeightsError for a model that is not VJEPA2Model."""
    stored = own.read_config(path)
    if "format_version" in stored or "model_type" not in stored:
        return False
    if stored["model_type"] != hugging_face.MODEL_TYPE:
        raise WeightsError(
            f"{path / own.CONFIG}: model_type is {stored['model_type']!r}; of transformers' models only "
            f"{hugging_face.MODEL_TYPE!r} is read (for the others: evals, --model hf:FOLDER)"
        )
    return True
