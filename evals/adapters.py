"""Other people's encoders as feature sources, so that models can be compared under one protocol.

Any vision or video encoder of `transformers` in a local folder, and any callable of a user's own. Each brings its own
normalisation and patch size; `transformers` is imported only when it is asked for.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evals.cache import file_digest, module_identity
from evals.features import bf16_on_gpus, finite
from evals.protocol import DoesNotFit
from vjepa.batch import IMAGENET_MEAN, IMAGENET_STD, Grid

UNREAD = {"pooler", "predictor", "mask_token"}  # parts of a model that its last patch tokens do not depend on
PREPROCESSORS = ("video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of each channel, of pixels in 0..1."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, clips: Tensor) -> Tensor:
        """uint8 [B, C, T, H, W] -> float32."""
        if clips.dtype != torch.uint8:
            raise ValueError(f"a feature source takes uint8 clips, got {clips.dtype}")
        mean, std = (torch.tensor(v, device=clips.device).view(-1, 1, 1, 1) for v in (self.mean, self.std))
        return (clips.float() / 255 - mean) / std


def token_grid(clips: Tensor, patch_size: int, tubelet_size: int) -> Grid:
    """The grid (t, h, w) of clips [B, C, T, H, W]; sizes that leave a rest are refused, one frame is a tubelet."""
    frames, height, width = clips.shape[2:]
    if height % patch_size or width % patch_size or (frames > 1 and frames % tubelet_size):
        raise ValueError(
            f"clips of {frames} frames, {height}x{width}, do not divide into tubelets of {tubelet_size} frames and "
            f"patches of {patch_size} pixels: set clips.size and clips.frames for this model"
        )
    return max(1, frames // tubelet_size), height // patch_size, width // patch_size


# ------------------------------------------------------------------------------------------------- a callable's tokens


@dataclass(frozen=True)
class CallableFeatures:
    """A user's own function: normalised float clips [B, C, T, H, W] -> tokens [B, t*h*w, D] or [B, t, h, w, D].

    Tokens are in the order of time, rows, columns. A module must be in evaluation mode already, and is given tensors on
    `device`.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    patch_size: int
    tubelet_size: int = 1
    normalisation: Normalisation = Normalisation()
    device: str = "cpu"
    identity: str | None = None  # what the numbers depend on, such as a digest of the weights: caches go by it
    bf16: bool = False  # compute under bf16 autocast, on CUDA only

    @torch.no_grad()
    def tokens(self, clips: Tensor) -> Tensor:
        grid = token_grid(clips, self.patch_size, self.tubelet_size)
        pixels = self.normalisation(clips.to(self.device))
        with bf16_on_gpus(pixels.device, enabled=self.bf16):
            tokens = finite(self.function(pixels).float().cpu(), self.name)
        if tokens.ndim == 3 and tokens.shape[:2] == (len(clips), grid[0] * grid[1] * grid[2]):
            return tokens.unflatten(1, grid)
        if tokens.ndim == 5 and tokens.shape[:4] == (len(clips), *grid):
            return tokens
        raise ValueError(
            f"{self.name} gave {list(tokens.shape)} for clips {list(clips.shape)}: expected [B, t*h*w, D] or "
            f"[B, t, h, w, D] with (t, h, w) = {grid}. Class tokens and registers must be left out"
        )


def load_user(spec: str, *, device: str = "cpu") -> CallableFeatures:
    """What FUNCTION(device) of a user's file gives, for `spec` FILE.py:FUNCTION.

    Its identity is the one it gives and what else decides the numbers: how pixels are made, and the file itself.
    """
    file, _, function = spec.rpartition(":")
    hint = "write py:FILE.py:FUNCTION, where FUNCTION(device) returns an evals.adapters.CallableFeatures"
    if not Path(file).is_file():
        raise ValueError(f"--model py:{spec}: there is no file {file or spec}; {hint}")
    found = importlib.util.spec_from_file_location(Path(file).stem, file)
    if found is None or found.loader is None:
        raise ValueError(f"--model py:{spec}: {file} is no Python file; {hint}")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    if not callable(make := getattr(module, function, None)):
        raise ValueError(f"--model py:{spec}: {file} has no function {function}; {hint}")
    source = make(device)
    if not isinstance(source, CallableFeatures):
        raise ValueError(f"--model py:{spec}: {function} gave {type(source).__name__}; {hint}")
    if source.identity is None:
        raise ValueError(
            f"--model py:{spec}: give its CallableFeatures an identity, by which results are known again, such as "
            "evals.cache.module_identity(model, {})"
        )
    read_as = (source.patch_size, source.tubelet_size, source.normalisation, file_digest(Path(file)))
    return replace(source, identity=f"{source.identity} {read_as}")


# ------------------------------------------------------------------------------------------------- transformers' models


@dataclass(frozen=True)
class TransformersFeatures:
    """A model of `transformers`: the patch tokens of its last hidden state.

    A model whose configuration has a tubelet takes clips, any other takes frames one by one. What comes before the
    patches (class token, registers) is left out.
    """

    name: str
    model: nn.Module
    normalisation: Normalisation = Normalisation()
    max_images: int = 64  # frames in a pass of an image model
    bf16: bool = False  # compute under bf16 autocast, on CUDA only

    @cached_property
    def identity(self) -> str:
        """What its features depend on, see `evals.cache.source_identity`."""
        about = [type(self.model).__name__, self.config.to_dict(), str(self.normalisation)]
        is_bf16 = self.bf16 and next(self.model.parameters()).device.type == "cuda"
        return module_identity(self.model, [*about, "bf16"] if is_bf16 else about)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def patch_size(self) -> int:
        size = self.config.patch_size
        return int(size) if isinstance(size, int) else _square(self.name, size)

    @property
    def tubelet_size(self) -> int:
        return int(getattr(self.config, "tubelet_size", 1))

    @property
    def is_video(self) -> bool:
        return hasattr(self.config, "tubelet_size")

    @torch.no_grad()
    def tokens(self, clips: Tensor) -> Tensor:
        self._check(clips)
        device = next(self.model.parameters()).device
        self.model.eval()
        grid = token_grid(clips, self.patch_size, self.tubelet_size)
        if self.is_video:
            pixels = self.normalisation(clips.to(device))
            if pixels.shape[2] < self.tubelet_size:
                pixels = pixels.expand(-1, -1, self.tubelet_size, -1, -1)
            hidden = self._hidden(pixels.transpose(1, 2), grid)  # [B, N, D]
            return hidden.unflatten(1, grid)
        frames = clips.transpose(1, 2).flatten(0, 1)  # [B*T, C, H, W]
        parts = [
            self._hidden(self.normalisation(part.to(device)[:, :, None])[:, :, 0], (1, *grid[1:]))
            for part in frames.split(self.max_images)
        ]
        return torch.cat(parts).unflatten(1, grid[1:]).unflatten(0, (len(clips), -1))

    def _hidden(self, pixels: Tensor, grid: Grid) -> Tensor:
        """The last hidden state's patch tokens: [B, t*h*w, D] float32 on the CPU."""
        accepted = inspect.signature(self.model.forward).parameters
        options = {"skip_predictor": True, "interpolate_pos_encoding": True}
        chosen = {key: value for key, value in options.items() if key in accepted}
        with bf16_on_gpus(pixels.device, enabled=self.bf16):
            hidden = self.model(pixels.to(next(self.model.parameters()).dtype), **chosen).last_hidden_state
        wanted = grid[0] * grid[1] * grid[2]
        if hidden.ndim != 3 or hidden.shape[1] < wanted:
            raise ValueError(
                f"{self.name} gave {list(hidden.shape)} where {wanted} patch tokens were expected, {grid}: it is no "
                "plain ViT of this patch size"
            )
        return finite(hidden[:, hidden.shape[1] - wanted :].float().cpu(), self.name)

    def _check(self, clips: Tensor) -> None:
        """Sizes that the model would take and get wrong, or refuse without saying what to set."""
        frames, height, width = clips.shape[2:]
        crop = getattr(self.config, "crop_size", None)
        if crop is not None and (height, width) != (crop, crop):
            raise DoesNotFit(
                f"{self.name} derives its rows and columns from config.crop_size={crop}, whatever the clip: it takes "
                f"{crop}x{crop} alone (clips.size={crop}), not {height}x{width}. V-JEPA 2 takes any size as "
                "--model FOLDER, without hf:"
            )
        fixed = getattr(self.config, "num_frames", None)
        if self.is_video and fixed is not None and frames != fixed:
            raise DoesNotFit(f"{self.name} takes clips of {fixed} frames: set clips.frames={fixed} (is {frames})")


def _square(name: str, size: Sequence[int]) -> int:
    """The side of a square patch, given as (h, w) or (t, h, w)."""
    if size[-1] != size[-2]:
        raise ValueError(f"{name}: patches of {list(size)} are not square")
    return int(size[-1])


def load_transformers(
    folder: Path | str, *, name: str | None = None, device: str = "cpu", **config: Any
) -> TransformersFeatures:
    """The encoder in a local `transformers` folder, with the normalisation of its preprocessor file.

    `config` replaces fields of its configuration, such as crop_size. Of a model of images and text its vision part is
    taken. Weights are read to fp32, in which features are computed, whatever they are stored in. Nothing is downloaded:
    FileNotFoundError where the folder has no config.json. ValueError for files that cannot be read, and where weights
    are missing: `transformers` would draw them at random.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: give a folder that transformers has saved")
    try:
        import transformers
    except ImportError as error:
        raise ValueError("models of transformers need it installed: pip install 'transformers>=5'") from error
    options = {"local_files_only": True, "output_loading_info": True, **config}
    try:
        model, report = transformers.AutoModel.from_pretrained(str(folder), **options)
    except Exception as error:
        raise ValueError(f"transformers cannot read {folder} ({error}): save or copy the model anew") from error
    part = "vision_model." if hasattr(model, "vision_model") else ""
    _check_whole(folder, [key for key in report["missing_keys"] if key.startswith(part)])
    vision = getattr(model, "vision_model", model).float()
    return TransformersFeatures(name or folder.name, vision.to(device).eval(), read_normalisation(folder))


def _check_whole(folder: Path, missing: Sequence[str]) -> None:
    """Raise ValueError where weights that patch tokens depend on are not in the files."""
    if needed := sorted(key for key in missing if not UNREAD.intersection(key.split("."))):
        raise ValueError(
            f"{folder} lacks {len(needed)} weights of its model, such as {needed[0]}: they would be drawn at random. "
            "Save the model again with save_pretrained, or see whether config.json belongs to these weights"
        )


def read_normalisation(folder: Path) -> Normalisation:
    """Mean and standard deviation of a folder's preprocessor file, ImageNet's where there is none."""
    for file in PREPROCESSORS:
        if (folder / file).is_file():
            stored = json.loads((folder / file).read_text())
            for part in (stored, stored.get("video_processor") or {}, stored.get("image_processor") or {}):
                if "image_mean" in part and "image_std" in part:
                    return Normalisation(tuple(part["image_mean"]), tuple(part["image_std"]))
    return Normalisation()
