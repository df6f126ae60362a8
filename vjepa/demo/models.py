"""The toy networks: an encoder of single frames, and a predictor of the next frame's embedding."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

EMBED_DIM = 32
CHANNELS = (1, 16, 32, 32)
HIDDEN = 128
CONTEXT = 2  # frames the predictor sees


class FrameEncoder(nn.Module):
    """Three strided convolutions and an MLP, 95k parameters. No batch statistics: nothing in it prevents collapse."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise(CHANNELS):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.GroupNorm(4, after), nn.GELU()]
        self.stages = nn.Sequential(*layers)  # 32 x 32 -> 4 x 4
        self.head = nn.Sequential(nn.Linear(CHANNELS[-1] * 4 * 4, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, EMBED_DIM))

    def forward(self, clips: Tensor) -> Tensor:
        """Clips [B, T, 1, 32, 32] -> embeddings [T, B, D], so that a time step is a batch of samples."""
        maps = self.stages(clips.transpose(0, 1).flatten(0, 1))  # [T * B, C, 4, 4]
        return self.head(maps.flatten(1)).unflatten(0, (clips.shape[1], clips.shape[0]))


class NextPredictor(nn.Module):
    """An MLP on two successive embeddings, 29k parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(CONTEXT * EMBED_DIM, HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, EMBED_DIM),
        )

    def forward(self, z: Tensor) -> Tensor:
        """Embeddings [T, B, D] -> predictions [T - 2, B, D] of those at times 2, 3, ..., T - 1."""
        return self.layers(torch.cat([z[:-2], z[1:-1]], dim=-1))


def build_models(seed: int) -> tuple[FrameEncoder, NextPredictor]:
    """Encoder and predictor, freshly initialised; a function of `seed` that leaves the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FrameEncoder(), NextPredictor()
