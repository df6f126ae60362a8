"""Frozen features: where they come from and how a clip's tokens are read out.

A source turns uint8 clips into tokens. An encoder is one, trained or not, and so are the pixels themselves: every
evaluation runs on all of them alike.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from evals.datasets import LabelledClips
from evals.protocol import RGB, RGB_DIFFERENCE, Readout
from vjepa.batch import Grid, normalise
from vjepa.nn.encoder import Encoder

POSITION_BANDS = 4  # sine and cosine of 1, 2, 4 and 8 half turns along each axis


def bf16_on_gpus(device: torch.device, *, enabled: bool = True) -> torch.autocast:
    """bf16 autocast on CUDA where it is enabled; otherwise fp32, whatever surrounds."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled and device.type == "cuda")


def finite(tokens: Tensor, name: str) -> Tensor:
    """The tokens themselves. Raises ValueError where one is no number: every metric would still give one."""
    if not tokens.sum(dtype=torch.float32).isfinite():  # cheaper than a look at each, and no number hides from a sum
        raise ValueError(
            f"the features of {name} are not finite: its weights are broken (did the training diverge?), or overflow "
            f"as {tokens.dtype}"
        )
    return tokens


class FeatureSource(Protocol):
    """Whatever gives every clip a grid of tokens."""

    @property
    def name(self) -> str:
        """Its name in the results: the `model` of a row."""
        ...

    def tokens(self, clips: Tensor) -> Tensor:
        """uint8 [B, C, T, H, W] -> float32 [B, t, h, w, D] on the CPU."""
        ...


@dataclass(frozen=True)
class EncoderFeatures:
    """The last level of an encoder, frozen."""

    name: str
    encoder: Encoder

    def tokens(self, clips: Tensor) -> Tensor:
        return finite(extract(self.encoder, clips, batch_size=len(clips)), self.name)


@dataclass(frozen=True)
class PixelFeatures:
    """No model: the pixels of each token's tubelet, and where the token lies.

    With `difference`, the absolute change from frame to frame inside the tubelet as well: the reference made by hand.
    Features are the normalised pixels [C * tubelet * patch * patch], the changes [C * (tubelet - 1) * patch * patch],
    the position [3 * 2 * POSITION_BANDS], in this order.
    """

    patch_size: int
    tubelet_size: int
    difference: bool = False

    def __post_init__(self) -> None:
        if self.difference and self.tubelet_size < 2:
            raise ValueError("difference=True needs tubelets of at least 2 frames: there is no change inside one frame")

    @property
    def name(self) -> str:
        return RGB_DIFFERENCE if self.difference else RGB

    def tokens(self, clips: Tensor) -> Tensor:
        pixels = self._tubelets(normalise(clips))  # [B, t, h, w, C, tubelet, patch, patch]
        parts = [pixels.flatten(4)]
        if self.difference:
            parts.append(pixels.diff(dim=5).abs().flatten(4))
        batch, grid = pixels.shape[0], (pixels.shape[1], pixels.shape[2], pixels.shape[3])
        parts.append(position_features(grid).expand(batch, -1, -1, -1, -1))
        return torch.cat(parts, dim=-1)

    def _tubelets(self, clips: Tensor) -> Tensor:
        if clips.shape[2] == 1:  # an image is a clip that stands still
            clips = clips.expand(-1, -1, self.tubelet_size, -1, -1)
        frames, height, width = clips.shape[2:]
        if frames % self.tubelet_size or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"clips of {frames} frames, {height}x{width}, do not divide into tubelets of {self.tubelet_size} "
                f"frames and patches of {self.patch_size} pixels"
            )
        cut = clips.unflatten(4, (-1, self.patch_size)).unflatten(3, (-1, self.patch_size))
        cut = cut.unflatten(2, (-1, self.tubelet_size))  # [B, C, t, tubelet, h, patch, w, patch]
        return cut.permute(0, 2, 4, 6, 1, 3, 5, 7)


def position_features(grid: Grid) -> Tensor:
    """Sines and cosines of every token's place along t, h and w: [t, h, w, 3 * 2 * POSITION_BANDS]."""
    axes = []
    for axis, length in enumerate(grid):
        place = (torch.arange(length) + 0.5) / length  # centres, the axis running from 0 to 1
        angles = place[:, None] * math.pi * 2.0 ** torch.arange(POSITION_BANDS)
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [length, 2 * POSITION_BANDS]
        shape = [1, 1, 1, waves.shape[1]]
        shape[axis] = length
        axes.append(waves.view(shape).expand(*grid, -1))
    return torch.cat(axes, dim=-1)


@torch.no_grad()
def extract(encoder: Encoder, clips: Tensor, *, batch_size: int = 64) -> Tensor:
    """Tokens of the last level for uint8 clips [N, C, T, H, W]: float32 [N, t, h, w, D] on the CPU.

    fp32 whatever the surrounding autocast, on the encoder's device, in evaluation mode (restored afterwards).
    """
    device = next(encoder.parameters()).device
    was_training = encoder.training
    encoder.eval()
    try:
        with torch.autocast(device.type, enabled=False):
            batches = [encoder(normalise(part.to(device))).float().cpu() for part in clips.split(batch_size)]
    finally:
        encoder.train(was_training)
    return torch.cat(batches).unflatten(1, encoder.grid(clips))


def read_out(tokens: Tensor, readout: Readout) -> Tensor:
    """Tokens [N, t, h, w, D] -> `mean` [N, D], `msm` [N, 3 * D] (mean, std, max over tokens), `tokens` as they are."""
    if readout == "tokens":
        return tokens
    flat = tokens.flatten(1, 3)  # [N, t * h * w, D]
    if readout == "mean":
        return flat.mean(dim=1)
    std, mean = torch.std_mean(flat, dim=1, correction=0)
    return torch.cat([mean, std, flat.amax(dim=1)], dim=1)


@dataclass(frozen=True)
class FeatureSet:
    """A labelled set as one source sees it."""

    features: Mapping[Readout, Tensor]  # [N, D], [N, 3 * D], [N, t, h, w, D]
    labels: Mapping[str, Tensor]


@torch.no_grad()
def read_features(
    source: FeatureSource, data: LabelledClips, readouts: Collection[Readout], *, batch_size: int = 64
) -> FeatureSet:
    """The wanted readouts of all clips, in one pass over them; memory holds the readouts and one batch of tokens."""
    found: dict[Readout, list[Tensor]] = {readout: [] for readout in readouts}
    for clips in data.clips.split(batch_size):
        tokens = source.tokens(clips)
        for readout, parts in found.items():
            parts.append(read_out(tokens, readout))
    return FeatureSet({readout: torch.cat(parts) for readout, parts in found.items()}, data.labels)
