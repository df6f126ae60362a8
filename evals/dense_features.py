"""Sources of features for dense tasks: several levels of an encoder side by side, and patches that know their place."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from evals.cache import encoder_identity
from evals.features import position_features
from evals.protocol import RGB
from vjepa.batch import normalise
from vjepa.nn.encoder import Encoder

Tokenizer = Literal["image", "video"]


@dataclass(frozen=True)
class LevelFeatures:
    """Levels of a frozen encoder, each through its norm, side by side: [B, t, h, w, L * D].

    The papers' protocol is the last level alone and the image tokenizer (reference evaluation.md 1.3); `video` repeats
    an image to a tubelet.
    """

    name: str
    encoder: Encoder
    levels: tuple[int, ...] = ()
    """0-based blocks that have a level norm; () is the last one."""
    tokenizer: Tokenizer = "image"
    bf16: bool = False
    """Compute under bf16 autocast, on CUDA only."""

    def __post_init__(self) -> None:
        if unknown := set(self.levels) - set(self.encoder.levels):
            raise ValueError(
                f"levels={list(self.levels)}: blocks {sorted(unknown)} have no level norm, choose among "
                f"{list(self.encoder.levels)} (0-based; recipes count from 1)"
            )

    @cached_property
    def identity(self) -> str:
        """What its features depend on, see `evals.cache.source_identity`."""
        levels = self.levels or self.encoder.levels[-1:]
        return json.dumps([encoder_identity(self.encoder), list(levels), self.tokenizer, self._is_bf16])

    @property
    def _is_bf16(self) -> bool:
        return self.bf16 and next(self.encoder.parameters()).device.type == "cuda"

    @torch.no_grad()
    def tokens(self, clips: Tensor) -> Tensor:
        """uint8 [B, C, T, H, W] -> float32 on the CPU; see FeatureSource."""
        if self.tokenizer == "video" and clips.shape[2] == 1:
            clips = clips.expand(-1, -1, self.encoder.tubelet_size, -1, -1)
        device = next(self.encoder.parameters()).device
        was_training = self.encoder.training
        self.encoder.eval()
        try:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._is_bf16):
                levels = self.levels or self.encoder.levels[-1:]
                parts = self.encoder.forward_intermediates(normalise(clips.to(device)), indices=levels)
        finally:
            self.encoder.train(was_training)
        return torch.cat(parts, dim=-1).float().cpu().unflatten(1, self.encoder.grid(clips))


@dataclass(frozen=True)
class RgbPosition:
    """No model: the colours of each patch of an image on a coarse grid, and where the patch lies.

    3 * cells * cells numbers and, with `position`, 24 sines and cosines: the floor that a frozen encoder must beat
    clearly (reference evaluation.md 5.1).
    """

    patch_size: int = 16
    cells: int = 8
    """Along each side of a patch."""
    position: bool = True

    @property
    def name(self) -> str:
        return RGB if self.position else "rgb_patches"

    def tokens(self, clips: Tensor) -> Tensor:
        """uint8 [B, 3, T, H, W] -> float32 [B, 1, h, w, D] of the first frame; see FeatureSource."""
        frames = normalise(clips[:, :, :1])[:, :, 0]
        height, width = (side // self.patch_size for side in frames.shape[-2:])
        small = F.interpolate(frames, size=(height * self.cells, width * self.cells), mode="area")
        cut = small.unflatten(3, (-1, self.cells)).unflatten(2, (-1, self.cells))  # [B, C, h, cells, w, cells]
        colours = cut.permute(0, 2, 4, 1, 3, 5).flatten(3)[:, None]
        if not self.position:
            return colours
        place = position_features((1, height, width)).expand(len(clips), -1, -1, -1, -1)
        return torch.cat([colours, place], dim=-1)
