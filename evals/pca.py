"""Principal components of patch features as colours: of a clip in memory, or of a video's features on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROBUST_RANGE = (0.01, 0.99)  # quantiles that become black and full colour: single odd patches would grey out the rest
CHUNK_BYTES = 32 * 2**20  # of features that are looked at together
SAMPLE = 100_000  # tokens from which the range of colours is taken


def pca_images(tokens: Tensor) -> Tensor:
    """The first three principal components of all tokens of a clip as colours: [T, h, w, D] -> [T, h, w, 3] in 0..1.

    The sign of a component is that of its largest loading, so the same features always give the same picture.
    """
    projected, _ = _principal_components(tokens)
    return _as_colours(_robust_range(projected), tokens)


def whitened_pca(tokens: Tensor) -> tuple[Tensor, float]:
    """DINOv3's picture of a clip: [T, h, w, D] -> [T, h, w, 3] in 0..1, and the share of variance that it shows.

    Three components of all tokens, each whitened to variance 1, then sigmoid(2x) (reference evaluation.md 1.6). One
    basis holds for all frames; signs are those of `pca_images`. A direction without variance is grey.
    """
    projected, share = _principal_components(tokens)
    std = projected.std(dim=0, correction=0)
    is_flat = std <= 1e-7 * tokens.abs().amax().double().clamp_min(1e-12)  # rounding of float32
    return _as_colours((2 * projected / torch.where(is_flat, torch.inf, std)).sigmoid(), tokens), share


def _principal_components(tokens: Tensor) -> tuple[Tensor, float]:
    """Tokens [T, h, w, D] along their three main axes: float64 [T * h * w, <=3], the strongest first, and the share of
    their variance; the sign is that of an axis' largest loading."""
    if tokens.dim() != 4 or not tokens.isfinite().all():
        raise ValueError(f"tokens must be finite and [T, h, w, D], got {list(tokens.shape)}")
    flat = tokens.reshape(-1, tokens.shape[-1]).double()
    centred = flat - flat.mean(dim=0)
    axes, share = _main_axes(centred.T @ centred)
    return centred @ axes, share


def _main_axes(scatter: Tensor) -> tuple[Tensor, float]:
    """The three main axes [D, <=3] of a scatter matrix [D, D], the strongest first, and their share of the variance."""
    values, vectors = torch.linalg.eigh(scatter)
    axes = vectors[:, -3:].flip(1)
    signs = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    share = values[-3:].sum() / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return axes * signs, share.item()


def _as_colours(components: Tensor, tokens: Tensor) -> Tensor:
    """[N, <=3] in 0..1 as pictures [T, h, w, 3]; what is missing is 0.5."""
    missing = components.new_full((len(components), 3 - components.shape[1]), 0.5)
    return torch.cat([components, missing], dim=1).reshape(*tokens.shape[:3], 3).float()


def _robust_range(values: Tensor) -> Tensor:
    """Each column stretched to 0..1 between its quantiles [N, k]; a constant column becomes 0.5."""
    low, high = torch.quantile(values, torch.tensor(ROBUST_RANGE, dtype=values.dtype), dim=0)
    return _stretched(values, low, high)


def _stretched(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Each column [N, k] from low..high to 0..1; one without extent becomes 0.5."""
    span = high - low
    is_flat = span <= 1e-9 * torch.maximum(low.abs(), high.abs()).clamp_min(1e-12)
    scaled = ((values - low) / torch.where(is_flat, 1, span)).clamp(0, 1)
    return torch.where(is_flat, 0.5, scaled)


# ------------------------------------------------------------------------------------- features that lie on the disk


@dataclass(frozen=True)
class PcaBasis:
    """One basis and one range of colours for all of a video: colours mean the same from its start to its end."""

    mean: Tensor  # [D]
    axes: Tensor  # [D, <=3]
    low: Tensor
    high: Tensor  # of each component, black and full colour
    split: FirstAxis | None = None
    """Where only the foreground is coloured: what tells it apart; the rest is black."""

    @classmethod
    def fit(cls, features: np.ndarray, *, foreground: bool = False) -> PcaBasis:
        """Of features [T, h, w, D], perhaps mapped from a file; memory holds CHUNK_BYTES of them and D x D numbers."""
        split = FirstAxis.fit(features) if foreground else None
        mean, scatter = _scatter(features, split)
        axes = _main_axes(scatter)[0]
        sample = _sample(features, split)
        bounds = torch.quantile((sample - mean) @ axes, torch.tensor(ROBUST_RANGE, dtype=torch.float64), dim=0)
        return cls(mean, axes, bounds[0], bounds[1], split)

    def colours(self, tokens: np.ndarray) -> Tensor:
        """Tokens [T, h, w, D] as colours [T, h, w, 3] in 0..1."""
        whole = torch.from_numpy(np.array(tokens)).double()
        flat = whole.flatten(0, 2)
        rgb = _as_colours(_stretched((flat - self.mean) @ self.axes, self.low, self.high), whole)
        if self.split is not None:
            rgb[~self.split.is_foreground(flat).view(rgb.shape[:3])] = 0
        return rgb


@dataclass(frozen=True)
class FirstAxis:
    """Foreground and background as the sides of the first component: the one with less of the rim is in front.

    A rule of thumb (DINOv2 takes a threshold on the first component too), not a segmentation.
    """

    mean: Tensor
    axis: Tensor  # [D], pointing to the front

    @classmethod
    def fit(cls, features: np.ndarray) -> FirstAxis:
        mean, scatter = _scatter(features, None)
        axis = _main_axes(scatter)[0][:, 0]
        rim, inside = 0.0, 0.0
        for part in _chunks(features):
            side = ((part - mean) @ axis > 0).double()  # [t, h, w]
            edge = torch.ones(part.shape[1:3], dtype=torch.bool)
            edge[1:-1, 1:-1] = False
            rim += side[:, edge].mean().item() * len(part)
            inside += side.mean().item() * len(part)
        return cls(mean, axis if rim <= inside else -axis)

    def is_foreground(self, flat: Tensor) -> Tensor:
        """Tokens [N, D] -> bool [N]."""
        return (flat - self.mean) @ self.axis > 0


def _chunks(features: np.ndarray) -> Iterator[Tensor]:
    """Float64 [t, h, w, D]; ValueError for numbers that are none."""
    if features.ndim != 4:
        raise ValueError(f"features must be [T, h, w, D], got {list(features.shape)}: embed them with pool=none")
    step = max(1, CHUNK_BYTES // (8 * features[0].size))
    for first in range(0, len(features), step):
        part = torch.from_numpy(np.array(features[first : first + step])).double()
        if not part.isfinite().all():
            raise ValueError("features must be finite")
        yield part


def _scatter(features: np.ndarray, split: FirstAxis | None) -> tuple[Tensor, Tensor]:
    """Mean [D] and scatter matrix [D, D] of all tokens, or of those in front; two readings."""
    dim = features.shape[-1]
    total, count = torch.zeros(dim, dtype=torch.float64), 0
    for flat in _tokens(features, split):
        total, count = total + flat.sum(dim=0), count + len(flat)
    mean, scatter = total / max(1, count), torch.zeros(dim, dim, dtype=torch.float64)
    for flat in _tokens(features, split):
        scatter += (flat - mean).T @ (flat - mean)
    return mean, scatter


def _tokens(features: np.ndarray, split: FirstAxis | None) -> Iterator[Tensor]:
    """Float64 [N, D] of each chunk, of all tokens or of those in front."""
    for part in _chunks(features):
        flat = part.flatten(0, 2)
        yield flat if split is None else flat[split.is_foreground(flat)]


def _sample(features: np.ndarray, split: FirstAxis | None) -> Tensor:
    """Every so many tokens, SAMPLE at most; a row of zeros where none is in front."""
    every = -(-features[..., 0].size // SAMPLE)
    found = torch.cat([flat[::every] for flat in _tokens(features, split)])
    return found if len(found) else torch.zeros(1, features.shape[-1], dtype=torch.float64)
