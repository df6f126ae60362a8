"""How videos become features: windows, size, what is kept; and what of it a folder of features depends on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch

from evals.adapters import CallableFeatures
from evals.cache import encoder_identity
from evals.dense_views import multiple_of, short_side_size
from evals.labelled_suite import read_pretraining
from evals.models import EncoderModel, ForeignModel

Fit = Literal["crop", "whole", "stretch"]
Pool = Literal["none", "frame", "clip"]
Format = Literal["npy", "parquet"]
Dtype = Literal["fp32", "fp16"]
GEOMETRY: dict[str, Any] = {"frames": 16, "fps": 4.0, "size": 256}  # where a model does not say what it was trained on


@dataclass(frozen=True)
class EmbedConfig:
    """What the features of a file depend on, beside the model and the file."""

    window: int = 16
    """Frames that the encoder sees at once; a multiple of the model's tubelet."""
    overlap: int = 8
    """Frames that a window shares with the next one; a multiple of the tubelet, less than `window`."""
    fps: float = 4.0
    """Frames a second at which a video is sampled, evenly in time whatever its own rate."""
    size: int = 256
    """Pixels of the short side; a multiple of the patch."""
    fit: Fit = "crop"
    """`crop`: the centred square. `whole`: all of the frame, the long side rounded to whole patches. `stretch`: all of
    it, made square."""
    pool: Pool = "none"
    """`none`: every token, [T, h, w, D]. `frame`: their mean at each time step, [T, D]. `clip`: their mean over each
    window, [windows, D]."""
    format: Format = "npy"
    """One .npy for a file, which is mapped when it is read, or one .parquet with a row for each time step."""
    dtype: Dtype = "fp32"
    """Of what is stored; the encoder computes in fp32."""
    batch: int = 4
    """Windows in one pass. In the key because sums of another batch may differ in their last bits."""
    level: int | None = None
    """0-based block with a level norm whose output is kept; None is the last."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name in ("fit", "pool", "format", "dtype"):
            if (value := getattr(self, name)) not in get_args(hints[name]):
                raise ValueError(f"{name}={value}: choose one of {', '.join(get_args(hints[name]))}")
        for name in ("window", "fps", "size", "batch"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not 0 <= self.overlap < self.window:
            raise ValueError(f"overlap={self.overlap} must be at least 0 and less than window={self.window}")

    @property
    def stride(self) -> int:
        """Frames from one window's start to the next one's."""
        return self.window - self.overlap

    def check(self, *, patch_size: int, tubelet_size: int) -> None:
        """ValueError where a model of these sizes cannot take such windows."""
        for name in ("window", "overlap"):
            if getattr(self, name) % tubelet_size:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be a multiple of the model's tubelet, {tubelet_size}"
                )
        if self.size % patch_size:
            raise ValueError(f"size={self.size} must be a multiple of the model's patch, {patch_size}")

    def picture_size(self, height: int, width: int, patch_size: int) -> tuple[int, int]:
        """Height and width in pixels of what the encoder sees of a frame of this size."""
        if self.fit != "whole":
            return self.size, self.size
        return multiple_of(short_side_size(height, width, self.size), patch_size)


def make_config(model: EncoderModel | ForeignModel, spec: str, **asked: Any) -> EmbedConfig:
    """The settings that were asked for (None is not), the rest as the model was trained, else GEOMETRY."""
    known = GEOMETRY | trained_geometry(model, spec)
    given = {name: value for name, value in asked.items() if value is not None}
    unknown = set(given) - {field.name for field in fields(EmbedConfig)}
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: there is no such setting")
    settings = {"window": known["frames"], "fps": known["fps"], "size": known["size"]} | given
    settings.setdefault("overlap", settings["window"] // 2 // model.tubelet_size * model.tubelet_size)
    config = EmbedConfig(**settings)
    config.check(patch_size=model.patch_size, tubelet_size=model.tubelet_size)
    return config


def trained_geometry(model: EncoderModel | ForeignModel, spec: str) -> dict[str, Any]:
    """Frames, fps and size that a model was trained on, as far as its files say so."""
    if isinstance(model, ForeignModel):
        if isinstance(model.source, CallableFeatures):
            return {}
        config = model.source.config
        names = {"frames": ("num_frames", "frames_per_clip"), "size": ("crop_size", "image_size")}
        found = {
            key: next((getattr(config, n) for n in each if hasattr(config, n)), None) for key, each in names.items()
        }
        return {key: value for key, value in found.items() if isinstance(value, int)}
    given = spec if Path(spec).exists() else spec.partition("=")[2]
    pretraining = read_pretraining(Path(given)) if given and Path(given).is_dir() else {}
    return {name: pretraining[name] for name in GEOMETRY if name in pretraining}


def model_sha256(model: EncoderModel | ForeignModel) -> str:
    """Of the encoder's configuration and weights, not of a file: a predictor beside it changes nothing."""
    return encoder_identity(model.encoder) if isinstance(model, EncoderModel) else model.identity


def embedding_key(model: EncoderModel | ForeignModel, config: EmbedConfig, device: str) -> dict[str, Any]:
    """All that the bytes of a folder of features depend on beside its inputs."""
    return {"version": 1, "model": model_sha256(model), "device": torch.device(device).type} | asdict(config)
