"""Masks carried through a video by frozen features alone: nothing is trained (reference evaluation.md 1.5).

Every patch of a frame looks for the most similar patches nearby in frames whose maps are known, and takes over what
they are, weighted by similarity. The soft map, not the decision, is what later frames look at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.transforms import make_full_view
from evals.features import FeatureSource
from evals.videos import AnnotatedVideo, read_frame


@dataclass(frozen=True)
class PropagationConfig:
    """How masks are propagated. The defaults are those of V-JEPA 2.1 (paper appendix C, evaluation.md 1.5)."""

    short_side: int | None = None
    """Pixels; None is 480, and 420 for patches of 14, as in the paper. Both sides are rounded to the nearest multiple
    of the patch size."""
    context: int = 15
    """Last frames that are looked at, besides those in which objects were given."""
    neighbourhood: Literal["circle", "square"] = "circle"
    radius: int = 12
    """How far away, in patches, the patches that are looked at may lie."""
    top_k: int = 5
    """Patches that count, of all that are looked at in all frames."""
    temperature: float = 0.2
    """Their weights are softmax(cosine / temperature), which is exp(cosine / temperature) made to sum to 1."""
    stretch: bool = False
    """Stretch the map of every object over a frame to 0..1 before the largest one is chosen, as DINO does."""
    given_masks: Literal["nearest", "area"] = "nearest"
    """How given masks come down to patches: the pixel in the middle, as DINO does, or the share of pixels."""

    def __post_init__(self) -> None:
        for name in ("short_side", "top_k", "temperature"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")
        for name in ("context", "radius"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")

    def side(self, patch_size: int) -> int:
        """The short side of a frame for a model of this patch size."""
        return self.short_side or (420 if patch_size == 14 else 480)


PRESETS = {
    "vjepa21": PropagationConfig(),
    "dino": PropagationConfig(context=7, temperature=0.1, neighbourhood="square", stretch=True),
    "dinov3": PropagationConfig(context=7, stretch=True),
}
"""V-JEPA 2.1 (paper), DINO (its script), DINOv3 (its notebook); DINO's larger input of the notebook is short_side."""


# ------------------------------------------------------------------------------------------------------- whole videos


@torch.no_grad()
def propagate(
    video: AnnotatedVideo,
    source: FeatureSource,
    patch_size: int,
    config: PropagationConfig,
    *,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, np.ndarray]]:
    """Every frame and its predicted ids, uint8 [H, W] at the original size; features of context frames are in memory.

    Where the masks of objects are given they are predicted as they are, and these objects exist from there on.
    """
    ids = sorted(each for entering in video.entries.values() for each in entering)
    memory: Memory | None = None
    for frame, path in video.frames.items():
        picture = read_frame(path)
        size = picture.shape[-2], picture.shape[-1]
        entering = video.entries.get(frame, ())
        if memory is None and not entering:
            yield frame, np.zeros(size, dtype=np.uint8)
            continue
        view = make_full_view(picture, input_size(size, config.side(patch_size), patch_size))
        features = F.normalize(source.tokens(view[None])[0, 0].to(device), dim=-1)  # [h, w, D]
        memory = memory or Memory(features.shape[:2], 1 + len(ids), config)
        maps = memory.look_up(features)  # [O, h, w]
        labels = decide(maps, size, stretch=config.stretch)
        if entering:
            given = torch.from_numpy(_given(video.mask(frame), entering, ids)).to(device)
            labels = torch.where(given > 0, given, labels)
            maps = enter(maps, given, config.given_masks)
        memory.remember(features, maps, keep=bool(entering))
        yield frame, np.array([0, *ids], dtype=np.uint8)[labels.cpu().numpy()]


def hold(video: AnnotatedVideo) -> Iterator[tuple[str, np.ndarray]]:
    """The baseline without features: given masks stay where they are."""
    labels: np.ndarray | None = None
    for frame, path in video.frames.items():
        if entering := video.entries.get(frame, ()):
            truth = video.mask(frame)
            is_given = np.isin(truth, entering)
            labels = np.where(is_given, truth, 0 if labels is None else labels).astype(np.uint8)
        yield frame, np.zeros(read_frame(path).shape[-2:], dtype=np.uint8) if labels is None else labels


def input_size(size: tuple[int, int], short_side: int, patch_size: int) -> tuple[int, int]:
    """Height and width in pixels with this short side, both to the nearest multiple of the patch size."""
    scale = short_side / min(size)
    height, width = (max(1, round(side * scale / patch_size)) * patch_size for side in size)
    return height, width


def _given(truth: np.ndarray, entering: Sequence[int], ids: Sequence[int]) -> np.ndarray:
    """The channel of every pixel's object, int64 [H, W]: 1 + its place among `ids`; 0 where no object enters."""
    channel = np.zeros(256, dtype=np.int64)
    for each in entering:
        channel[each] = 1 + ids.index(each)
    return channel[truth]


# --------------------------------------------------------------------------------------------------------------- maps


def enter(maps: Tensor, given: Tensor, how: str) -> Tensor:
    """Maps [O, h, w] in which given objects, channels int64 [H, W] (0: none), take the place of what was there."""
    one_hot = F.one_hot(given, len(maps)).permute(2, 0, 1)[None].to(maps.dtype)  # [1, O, H, W]
    mode = "nearest-exact" if how == "nearest" else "area"
    entering = F.interpolate(one_hot, size=maps.shape[1:], mode=mode)[0]
    free = entering[0].clone()  # share of each patch that no entering object covers
    entering[0] = 0
    return entering + free * maps


def decide(maps: Tensor, size: tuple[int, int], *, stretch: bool) -> Tensor:
    """The channel of every pixel, int64 [H, W]: maps [O, h, w] are enlarged bilinearly, the largest value wins."""
    large = F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]
    if stretch:
        low, high = large.amin(dim=(1, 2), keepdim=True), large.amax(dim=(1, 2), keepdim=True)
        large = torch.where(high > low, (large - low) / (high - low).clamp_min(1e-12), large)
    return large.max(dim=0).indices  # argmax takes ten times as long on a CPU


class Memory:
    """Features and maps of the frames that are looked at: those with given masks, and the last ones."""

    def __init__(self, grid: Sequence[int], num_maps: int, config: PropagationConfig) -> None:
        self.height, self.width = grid
        self.num_maps, self.config = num_maps, config
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._last: deque[tuple[Tensor, Tensor]] = deque(maxlen=config.context)

    def remember(self, features: Tensor, maps: Tensor, *, keep: bool) -> None:
        """A frame's unit features [h, w, D] and maps [O, h, w]; for good, or until enough later ones have come."""
        frames = self._kept if keep else self._last
        frames.append((features.flatten(0, 1), maps.flatten(1).T.contiguous()))

    def look_up(self, features: Tensor) -> Tensor:
        """Maps [O, h, w] of a frame with these unit features [h, w, D]; of the first frame, background everywhere."""
        frames = [*self._kept, *self._last]
        if not frames:
            maps = features.new_zeros(self.num_maps, self.height, self.width)
            maps[0] = 1
            return maps
        queries = features.flatten(0, 1)
        settings = self.config.neighbourhood, self.config.radius, str(features.device)
        bands = [
            self._look_up_band(queries, frames, band) for band in neighbour_bands(self.height, self.width, *settings)
        ]
        return torch.cat(bands).T.unflatten(1, (self.height, self.width))

    def _look_up_band(self, queries: Tensor, frames: Sequence[tuple[Tensor, Tensor]], band: Band) -> Tensor:
        """Maps [n, O] of the band's patches: the best of each frame first, then the best of these."""
        cosines, labels = [], []
        for features, maps in frames:
            similar = queries[band.queries] @ features[band.keys].T  # [n, keys]
            nearby = similar.gather(1, band.index).masked_fill_(band.is_outside, -torch.inf)
            best, place = nearby.topk(min(self.config.top_k, nearby.shape[1]), dim=1)
            cosines.append(best)
            labels.append(maps[band.keys][band.index.gather(1, place)])  # [n, k, O]
        candidates = torch.cat(cosines, dim=1)  # [n, frames * k]
        best, place = candidates.topk(min(self.config.top_k, candidates.shape[1]), dim=1)
        weights = (best / self.config.temperature).softmax(dim=1)
        chosen = torch.cat(labels, dim=1).gather(1, place[..., None].expand(-1, -1, self.num_maps))
        return (weights[..., None] * chosen).sum(dim=1)


@dataclass(frozen=True)
class Band:
    """Some rows of patches, the rows that they can see, and each patch's neighbours among the patches of these rows."""

    queries: slice
    keys: slice
    index: Tensor  # int64 [n, K]
    is_outside: Tensor  # bool [n, K]: beyond the edge of the frame, index is 0


@lru_cache(maxsize=8)
def neighbour_bands(height: int, width: int, neighbourhood: str, radius: int, device: str) -> tuple[Band, ...]:
    """The grid in bands of about `radius` rows, so that what a band cannot see is hardly computed."""
    offsets = torch.cartesian_prod(*[torch.arange(-radius, radius + 1)] * 2).view(-1, 2)
    if neighbourhood == "circle":
        offsets = offsets[offsets.square().sum(dim=1) <= radius**2]
    bands = []
    for top in range(0, height, max(radius, 1)):
        bottom = min(top + max(radius, 1), height)
        first, last = max(top - radius, 0), min(bottom + radius, height)
        places = torch.cartesian_prod(torch.arange(top, bottom), torch.arange(width)).view(-1, 1, 2)
        rows, columns = (places + offsets).unbind(-1)  # [n, K]
        is_outside = (rows < 0) | (rows >= height) | (columns < 0) | (columns >= width)
        index = ((rows - first) * width + columns).masked_fill(is_outside, 0)
        slices = slice(top * width, bottom * width), slice(first * width, last * width)
        bands.append(Band(*slices, index.to(device), is_outside.to(device)))
    return tuple(bands)
