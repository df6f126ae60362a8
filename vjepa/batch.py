"""The records that travel from the loader to the loss, and the alphabet of their shapes.

Shapes everywhere in this package: `B` clips, `C` channels, `T H W` frames and pixels; token grid `(t, h, w)` with
`N = t*h*w` tokens in (t, h, w) row-major order; `K` context tokens, `M` masked tokens; `D` encoder width, `P` predictor
width, `L` supervised levels, `A` attention heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Modality = Literal["video", "image"]
Grid = tuple[int, int, int]
MODALITIES: tuple[Modality, ...] = ("video", "image")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(clips: Tensor) -> Tensor:
    """uint8 clips [B, C, T, H, W] -> float32, with the ImageNet mean and standard deviation, on the clips' device."""
    if clips.dtype != torch.uint8:
        raise ValueError(f"normalise takes uint8 clips, got {clips.dtype}: floats are taken as normalised already")
    mean = torch.tensor(IMAGENET_MEAN, device=clips.device).view(3, 1, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=clips.device).view(3, 1, 1, 1)
    return (clips.float() / 255 - mean) / std


@dataclass(frozen=True)
class Mask:
    """One mask for every clip of a batch: disjoint token indices, ascending within a clip."""

    context: Tensor  # [B, K] int64, visible to the context encoder
    masked: Tensor  # [B, M] int64, to be predicted
    context_of: int | None = None  # number in the batch's masks of an earlier one with this very context

    def take(self, clips: slice) -> Mask:
        return replace(self, context=self.context[clips], masked=self.masked[clips])

    def to(self, device: torch.device) -> Mask:
        context, masked = (x.to(device, non_blocking=True) for x in (self.context, self.masked))
        return replace(self, context=context, masked=masked)

    def pin_memory(self) -> Mask:
        return replace(self, context=self.context.pin_memory(), masked=self.masked.pin_memory())


class ViewsLater(Protocol):
    """Stands for views [B, C, T, H, W] in a batch whose loader leaves the last step of making them to the device."""

    @property
    def shape(self) -> torch.Size: ...
    def __getitem__(self, clips: slice, /) -> ViewsLater: ...
    def pin_memory(self) -> ViewsLater: ...
    def to(self, device: torch.device, *, non_blocking: bool = False) -> Tensor:
        """The views, uint8 and contiguous; the same ones each time."""
        ...


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one modality.

    Masks and grid are those of the first view. The first `num_global` views show most of a frame at full size, the
    others are local: smaller crops, maybe of fewer frames, each with a grid of its own.
    Until `to`, a ViewsLater may stand for a view; it has the tensor's shape.
    """

    modality: Modality
    step: int
    ordinals: tuple[int, ...]  # places in the run's global order, one per clip
    keys: tuple[str, ...]  # "source/key" of each clip
    views: tuple[Tensor, ...]  # each [B, C, T, H, W] uint8, global ones first
    masks: tuple[Mask, ...]
    grid: Grid
    extra: dict[str, Any] = field(default_factory=dict)
    rejected: tuple[Any, ...] = ()  # records that could not be decoded and were replaced
    num_global: int = 0  # global views; 0: all
    view_contexts: tuple[Tensor | None, ...] = ()  # of each view the tokens kept, [B, K] ascending; None, or (): all

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_global", self.num_global or len(self.views))
        object.__setattr__(self, "view_contexts", self.view_contexts or (None,) * len(self.views))
        if self.num_global > len(self.views) or len(self.view_contexts) != len(self.views):
            raise ValueError(
                f"a batch of {len(self.views)} views cannot have num_global={self.num_global} of them and "
                f"{len(self.view_contexts)} view_contexts, one for each"
            )

    @property
    def clips(self) -> Tensor:
        """The first view, [B, C, T, H, W]."""
        return self.views[0]

    def __len__(self) -> int:
        return len(self.ordinals)

    def take(self, clips: slice) -> Batch:
        """Some of the clips, with their masks; what is not per clip stays."""
        return replace(
            self,
            ordinals=self.ordinals[clips],
            keys=self.keys[clips],
            views=tuple(view[clips] for view in self.views),
            masks=tuple(mask.take(clips) for mask in self.masks),
            view_contexts=tuple(context if context is None else context[clips] for context in self.view_contexts),
            extra={name: values[clips] for name, values in self.extra.items()},
        )

    def to(self, device: torch.device) -> Batch:
        return replace(
            self,
            views=tuple(view.to(device, non_blocking=True) for view in self.views),
            masks=tuple(mask.to(device) for mask in self.masks),
            view_contexts=tuple(x if x is None else x.to(device, non_blocking=True) for x in self.view_contexts),
        )

    def pin_memory(self) -> Batch:
        return replace(
            self,
            views=tuple(view.pin_memory() for view in self.views),
            masks=tuple(mask.pin_memory() for mask in self.masks),
            view_contexts=tuple(x if x is None else x.pin_memory() for x in self.view_contexts),
        )


MicroBatch = Mapping[Modality, Batch]
