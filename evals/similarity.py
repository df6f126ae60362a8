"""Similarity maps: how alike every place and time of a video is to one patch, as heat over the frames."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import colormaps
from torch import Tensor

HEAT = 0.55  # share of the heat in a picture
LOW_QUANTILE, SAMPLED_STEPS = 0.05, 256  # of the video's similarities, what is black; steps it is taken from


@dataclass(frozen=True)
class SimilarityMap:
    """Cosine similarity with one token of a video."""

    query: Tensor  # [D], of length 1
    place: tuple[int, int, int]
    """Step, row, column of the token that was asked for."""
    low: float
    """Similarity that is shown black; 1 is the brightest."""

    @classmethod
    def of(cls, features: np.ndarray, place: tuple[int, int, int]) -> SimilarityMap:
        """Of features [T, h, w, D], perhaps mapped; ValueError for a place outside."""
        if features.ndim != 4 or not all(0 <= at < size for at, size in zip(place, features.shape[:3], strict=True)):
            raise ValueError(f"patch {place} (step, row, column) lies outside the tokens {list(features.shape[:3])}")
        query = torch.nn.functional.normalize(torch.from_numpy(np.array(features[place])).float(), dim=0)
        every = -(-len(features) // SAMPLED_STEPS)
        seen = torch.cat([_cosine(features[step], query).flatten() for step in range(0, len(features), every)])
        return cls(query, place, min(0.999, torch.quantile(seen, LOW_QUANTILE).item()))

    def values(self, tokens: np.ndarray) -> Tensor:
        """Tokens [h, w, D] -> similarities [h, w] in -1..1."""
        return _cosine(tokens, self.query)

    def overlay(self, frame: np.ndarray, tokens: np.ndarray, *, step: int) -> np.ndarray:
        """A frame uint8 [H, W, 3] under the heat of its tokens; the patch itself has a white rim."""
        share = ((self.values(tokens) - self.low) / (1 - self.low)).clamp(0, 1)
        heat = 255 * colormaps["inferno"](enlarged(share.numpy(), frame.shape))[..., :3]
        mixed = ((1 - HEAT) * frame + HEAT * heat).round().astype(np.uint8)
        if step == self.place[0]:
            _rim(mixed, self.place[1:], tokens.shape[:2])
        return mixed


def enlarged(tokens: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A grid [h, w, ...] at the size of a picture [H, W, ...], without smoothing."""
    rows, columns = shape[0] // tokens.shape[0], shape[1] // tokens.shape[1]
    return tokens.repeat(rows, axis=0).repeat(columns, axis=1)


def _cosine(tokens: np.ndarray, query: Tensor) -> Tensor:
    flat = torch.from_numpy(np.array(tokens)).float()
    return torch.nn.functional.normalize(flat, dim=-1) @ query


def _rim(picture: np.ndarray, place: tuple[int, ...], grid: tuple[int, ...]) -> None:
    """A white rim around a token's place, drawn into the picture."""
    height, width = picture.shape[0] // grid[0], picture.shape[1] // grid[1]
    box = picture[place[0] * height : (place[0] + 1) * height, place[1] * width : (place[1] + 1) * width]
    box[[0, -1]] = 255
    box[:, [0, -1]] = 255
