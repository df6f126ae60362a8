"""Sources of features for dense tasks: several levels of an encoder side by side, and patches that know their place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from evals.cache import encoder_identity
from evals.features import bf16_on_gpus, finite, position_features
from evals.protocol import RGB
from evals.references import RgbPatches
from vjepa.batch import normalise
from vjepa.nn.encoder import Encoder

Tokenizer = Literal["image", "video"]


@dataclass(frozen=True)
class LevelFeatures:
    """Levels of a frozen encoder, each through its norm, side by side: [B, t, h, w, L * D], or [B, L * t, h, w, D].

    An encoder with one norm, as V-JEPA 2 is, has it behind whichever block is read, as in its authors' code.

    For dense tasks the papers take the last level alone and the image tokenizer (reference evaluation.md 1.3); `video`
    repeats an image to a tubelet. As tokens the levels are what the probes of Diving48 and Jester read (1.1).
    """

    name: str
    encoder: Encoder
    levels: tuple[int, ...] = ()
    """0-based blocks that have a norm, see `readable_blocks`; () is the last one."""
    tokenizer: Tokenizer = "image"
    bf16: bool = False
    """Compute under bf16 autocast, on CUDA only; recipes say it as encoder_bf16."""
    join: Literal["channels", "tokens"] = "channels"
    """Where several levels lie beside each other."""

    def __post_init__(self) -> None:
        if unknown := set(self.levels) - set(readable_blocks(self.encoder)):
            raise ValueError(
                f"levels={list(self.levels)}: blocks {sorted(unknown)} have no level norm, choose among "
                f"{list(readable_blocks(self.encoder))} (0-based; recipes count from 1)"
            )

    @cached_property
    def identity(self) -> str:
        """What its features depend on, see `evals.cache.source_identity`."""
        levels = self.levels or self.encoder.levels[-1:]
        return json.dumps([encoder_identity(self.encoder), list(levels), self.tokenizer, self._is_bf16, self.join])

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
            with bf16_on_gpus(device, enabled=self.bf16):
                levels = self.levels or self.encoder.levels[-1:]
                parts = self._read(normalise(clips.to(device)), levels)
        finally:
            self.encoder.train(was_training)
        grid = self.encoder.grid(clips)
        maps = [part.float().cpu().unflatten(1, grid) for part in parts]  # each [B, t, h, w, D]
        return finite(torch.cat(maps, dim=-1 if self.join == "channels" else 1), self.name)

    def _read(self, clips: Tensor, levels: Sequence[int]) -> list[Tensor]:
        """Each level [B, N, D] through its norm, or through the only one."""
        if set(levels) <= set(self.encoder.levels):
            return self.encoder.forward_intermediates(clips, indices=levels)
        (norm,) = self.encoder.norms
        return [norm(state) for state in self.encoder.forward_intermediates(clips, indices=levels, norm=False)]


def readable_blocks(encoder: Encoder) -> tuple[int, ...]:
    """The 0-based blocks whose outputs can be read: its levels, or all of an encoder with one."""
    return encoder.levels if len(encoder.levels) > 1 else tuple(range(encoder.config.depth))


@dataclass(frozen=True)
class RgbPosition:
    """No model: the colours of each patch of an image on a coarse grid (RgbPatches), and where the patch lies.

    3 * cells * cells numbers, and 24 sines and cosines: the floor that a frozen encoder must beat clearly (reference
    evaluation.md 5.1).
    """

    patch_size: int = 16
    cells: int = 8
    """Along each side of a patch."""
    name: str = RGB

    def tokens(self, clips: Tensor) -> Tensor:
        """uint8 [B, 3, T, H, W] -> float32 [B, 1, h, w, D] of the first frame; see FeatureSource."""
        colours = RgbPatches(self.patch_size, self.cells).tokens(clips[:, :, :1])
        place = position_features((1, colours.shape[2], colours.shape[3]))
        return torch.cat([colours, place.expand(len(clips), -1, -1, -1, -1)], dim=-1)
