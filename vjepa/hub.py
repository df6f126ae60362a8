"""The door out: weights that travel, as `model.safetensors` beside a `config.json`, and the released checkpoints in.

Loading is always strict: what is missing, unexpected or wrongly shaped is listed by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vjepa.batch import MODALITIES
from vjepa.nn.attention import BackendName
from vjepa.nn.encoder import Encoder, EncoderConfig, default_levels
from vjepa.nn.init import assign
from vjepa.nn.predictor import Predictor, PredictorConfig

FORMAT_VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
ENCODER_KEYS = ("ema_encoder", "target_encoder", "encoder")  # the order in which the weights to evaluate are looked for
RELEASED_LEVELS = {12: (2, 5, 8, 11), 24: (5, 11, 17, 23), 40: (9, 19, 29, 39), 48: (11, 23, 37, 47)}
HEAD_DIM = 64  # of every released encoder


class WeightsError(ValueError):
    """Weights that do not fit: the message lists missing, unexpected and wrongly shaped keys."""


# ---------------------------------------------------------------------------------------------------- our own format


def save_pretrained(encoder: Encoder, folder: Path | str, *, extra: Mapping[str, Any] | None = None) -> Path:
    """Write an encoder's weights and configuration to `folder`; `extra` is kept in config.json for the reader."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    _write_atomically(folder / WEIGHTS, lambda path: save_file(state, path))
    save_config(encoder.config, folder, extra=extra)
    return folder


def save_config(config: EncoderConfig, folder: Path | str, *, extra: Mapping[str, Any] | None = None) -> None:
    """Write what `encoder_config` reads; a folder with nothing else says what shape its weights will have."""
    content = {"format_version": FORMAT_VERSION, "encoder": asdict(config), **(extra or {})}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_atomically(folder / CONFIG, lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))


def from_pretrained(
    path: Path | str, *, attention: BackendName = "auto", device: torch.device | str | None = None
) -> Encoder:
    """The encoder in a folder of ours or in a released V-JEPA 2.1 .pt file, in evaluation mode, on `device`.

    Hugging Face folders are not read yet; nothing is ever downloaded.
    """
    path = Path(path)
    if path.is_file():
        encoder, _ = import_official(path, attention=attention)
    else:
        encoder = Encoder(_read_config(_config_file(path)), attention=attention)
        load_strict(encoder, load_file(path / WEIGHTS), source=str(path / WEIGHTS))
    return encoder.to(device or "cpu").eval()


def encoder_config(path: Path | str) -> EncoderConfig:
    """The configuration of what `from_pretrained` would give, without its weights."""
    path = Path(path)
    if path.is_file():
        checkpoint = _read_checkpoint(path)
        encoder = checkpoint[_choose_key(checkpoint, None, path)]
        return _Official(_clean(encoder), {}, str(path)).encoder_config(None)
    return _read_config(_config_file(path))


def load_strict(module: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load `state` into `module`; any difference in keys or shapes is a WeightsError that lists it."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in state]
    problems += [f"unexpected: {name} {tuple(value.shape)}" for name, value in state.items() if name not in expected]
    problems += [
        f"wrong shape: {name} is {tuple(state[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        raise WeightsError(_listing(f"{source} does not fit {type(module).__name__}", problems))
    for name, tensor in module.state_dict().items():
        assign(tensor, state[name])


def _config_file(folder: Path) -> Path:
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {CONFIG}: give a folder written by vjepa.hub.save_pretrained (RUN/exports/STAGE) or a "
            "released .pt file. Nothing is downloaded by name."
        )
    return folder / CONFIG


def _read_config(path: Path) -> EncoderConfig:
    stored = json.loads(path.read_text())
    if stored.get("format_version") != FORMAT_VERSION:
        raise WeightsError(
            f"{path}: format_version is {stored.get('format_version')!r}, this code reads {FORMAT_VERSION}. "
            "A Hugging Face folder is not read yet."
        )
    try:
        return EncoderConfig(**stored["encoder"])
    except TypeError as error:
        raise WeightsError(f"{path}: the encoder's configuration does not fit this version: {error}") from error


def _write_atomically(path: Path, write: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    temporary.replace(path)


def _listing(title: str, problems: list[str], most: int = 20) -> str:
    shown = problems[:most] + ([f"and {len(problems) - most} more"] if len(problems) > most else [])
    return f"{title}: {len(problems)} problems\n" + "\n".join(f"  {line}" for line in shown)


# --------------------------------------------------------------------------------- released V-JEPA 2.1 checkpoints


def import_official(
    path: Path | str,
    *,
    num_heads: int | None = None,
    predictor_num_heads: int = 12,
    crop_size: int | None = None,
    num_frames: int | None = None,
    key: str | None = None,
    attention: BackendName = "auto",
) -> tuple[Encoder, Predictor]:
    """Encoder and predictor of a V-JEPA 2.1 training checkpoint (g/G, or the distilled B/L layout), loaded strictly.

    Widths, depths and the predictor's layout are read off the weights; levels follow the depth as in the reference
    (the released ViT-G was trained with 11, 23, 37, 47). Head counts cannot be read off: the encoder's default is one
    head per 64 channels. `key` names the encoder's entry; by default ema_encoder, target_encoder, encoder are tried.
    All mask tokens but the first are untrained in the released files (reference 1.5), so the first serves both
    modalities. `crop_size` and `num_frames`, where given, are checked to be multiples of patch and tubelet.
    """
    checkpoint = _read_checkpoint(Path(path))
    encoder_key = _choose_key(checkpoint, key, Path(path))
    layout = _Official(_clean(checkpoint[encoder_key]), _clean(checkpoint["predictor"]), str(path))
    encoder = Encoder(layout.encoder_config(num_heads), attention=attention)
    load_strict(encoder, layout.encoder_state(), source=f"{path}[{encoder_key}]")
    predictor = Predictor(layout.predictor_config(encoder.config, predictor_num_heads), attention=attention)
    load_strict(predictor, layout.predictor_state(), source=f"{path}[predictor]")
    for name, value, unit in (
        ("crop_size", crop_size, encoder.patch_size),
        ("num_frames", num_frames, encoder.tubelet_size),
    ):
        if value is not None and value % unit:
            raise ValueError(f"{name}={value} is not a multiple of {unit}, the size of a token in {path}")
    return encoder, predictor


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise WeightsError(f"{path} cannot be read as a torch checkpoint: {error}") from error
    if not isinstance(checkpoint, dict) or "predictor" not in checkpoint:
        found = sorted(checkpoint)[:10] if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise WeightsError(f"{path} is no V-JEPA training checkpoint: no 'predictor' entry, found {found}")
    return checkpoint


def _choose_key(checkpoint: Mapping[str, Any], key: str | None, path: Path) -> str:
    candidates = ENCODER_KEYS if key is None else (key,)
    for candidate in candidates:
        if candidate in checkpoint:
            return candidate
    raise WeightsError(f"{path} has no entry {' or '.join(candidates)}; it has {sorted(checkpoint)}")


def _clean(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the wrappers' `module.` and `backbone.`; fp32 values."""
    return {re.sub(r"(module|backbone)\.", "", name): value.float() for name, value in state.items()}


@dataclass(frozen=True)
class _Official:
    """The official names and shapes, read into ours."""

    encoder: Mapping[str, Tensor]
    predictor: Mapping[str, Tensor]
    source: str

    def encoder_config(self, num_heads: int | None) -> EncoderConfig:
        projection = self._need(self.encoder, "patch_embed.proj.weight")
        if "norms_block.0.weight" not in self.encoder:
            raise WeightsError(
                f"{self.source}: the encoder has no norms_block: these are not V-JEPA 2.1 weights (V-JEPA 2 uses the "
                "tiled RoPE and one final norm; its importer does not exist yet)"
            )
        dim, in_chans, tubelet_size, patch_size = projection.shape[:4]
        depth = _count(self.encoder, r"blocks\.(\d+)\.")
        return EncoderConfig(
            embed_dim=dim,
            depth=depth,
            num_heads=num_heads or dim // HEAD_DIM,
            mlp_ratio=self._need(self.encoder, "blocks.0.mlp.fc1.weight").shape[0] / dim,
            qkv_bias="blocks.0.attn.qkv.bias" in self.encoder,
            levels=RELEASED_LEVELS.get(depth, default_levels(depth)),
            patch_size=patch_size,
            tubelet_size=tubelet_size,
            in_chans=in_chans,
            image_tokenizer="patch_embed_img.proj.weight" in self.encoder,
            modality_embed="video_mod_embed" in self.encoder,
        )

    def predictor_config(self, encoder: EncoderConfig, num_heads: int) -> PredictorConfig:
        first, last = ("0.", "2.") if "predictor_embed.0.weight" in self.predictor else ("", "")
        width = self._need(self.predictor, f"predictor_embed.{last}weight").shape[0]
        fan_in = self._need(self.predictor, f"predictor_embed.{first}weight").shape[1]
        return PredictorConfig(
            encoder_dim=encoder.embed_dim,
            num_levels=fan_in // encoder.embed_dim,
            target_dim=self._need(self.predictor, "predictor_proj.weight").shape[0],
            embed_dim=width,
            depth=_count(self.predictor, r"predictor_blocks\.(\d+)\."),
            num_heads=num_heads,
            mlp_ratio=self._need(self.predictor, "predictor_blocks.0.mlp.fc1.weight").shape[0] / width,
            qkv_bias="predictor_blocks.0.attn.qkv.bias" in self.predictor,
            modality_embed="video_mod_embed" in self.predictor,
            context_head="predictor_proj_context.weight" in self.predictor,
        )

    def encoder_state(self) -> dict[str, Tensor]:
        renames = (
            (r"^patch_embed\.proj\.", "tokenizer.video."),
            (r"^patch_embed_img\.proj\.", "tokenizer.image."),
            (r"^video_mod_embed$", "tokenizer.video_embed"),
            (r"^img_mod_embed$", "tokenizer.image_embed"),
            (r"^norms_block\.", "norms."),
        )
        return {_rename(name, renames): _flat_embed(name, value) for name, value in self.encoder.items()}

    def predictor_state(self) -> dict[str, Tensor]:
        renames = (
            (r"^predictor_embed\.", "embed."),
            (r"^predictor_blocks\.", "blocks."),
            (r"^predictor_norm\.", "norm."),
            (r"^predictor_proj\.", "masked_head."),
            (r"^predictor_proj_context\.", "context_head."),
            (r"^video_mod_embed$", "modality_embeds.video"),
            (r"^img_mod_embed$", "modality_embeds.image"),
        )
        state = {
            _rename(name, renames): _flat_embed(name, value)
            for name, value in self.predictor.items()
            if not name.startswith("mask_tokens.")
        }
        trained = self._need(self.predictor, "mask_tokens.0").flatten()
        return state | {f"mask_tokens.{name}": trained.clone() for name in MODALITIES}

    def _need(self, state: Mapping[str, Tensor], name: str) -> Tensor:
        if name not in state:
            raise WeightsError(f"{self.source}: missing {name}; the file is not in the layout of V-JEPA 2.1")
        return state[name]


def _rename(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def _flat_embed(name: str, value: Tensor) -> Tensor:
    """Modality embeddings are (1, 1, D) in the released files, (D,) here."""
    return value.flatten() if name.endswith("_mod_embed") else value


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    numbers = [int(match[1]) for name in state if (match := re.match(pattern, name))]
    return max(numbers, default=-1) + 1
