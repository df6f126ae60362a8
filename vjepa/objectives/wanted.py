"""What the encoder sees in a step: the visible tokens of each mask, whole clips, further crops, as an objective asks.

Everything goes through the encoder in one pass; here it is asked for, and what comes back is sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vjepa.batch import Batch, Grid
from vjepa.nn.encoder import View

Contexts = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Encoded:
    """The tokens of one modality's clips."""

    contexts: list[Tensor] = field(default_factory=list)  # of each mask, [B, K, L*D]; masks may share theirs
    whole: Tensor | None = None  # all tokens of the first view, [B, N, L*D]
    crops: list[Tensor] = field(default_factory=list)  # of each view, as many tokens as it keeps, [B, K, L*D]


@dataclass(frozen=True)
class Wanted:
    """Which of them an objective uses."""

    masks: bool
    whole: bool
    crops: bool

    def clips(self, batch: Batch) -> tuple[Tensor, ...]:
        """The views that are looked at at all: uint8 [B, C, T, H, W] each."""
        return batch.views if self.crops else batch.views[:1]

    def contexts(self, batch: Batch) -> list[Contexts]:
        """The token subsets of each of these views."""
        masks = tuple(mask.context for mask in batch.masks if mask.context_of is None) if self.masks else ()
        crops = batch.view_contexts if self.crops else ()
        is_whole = self.whole or (len(crops) > 0 and crops[0] is None)
        first = (*masks, *([None] if is_whole else []), *(x for x in crops[:1] if x is not None))
        return [first, *((x,) for x in crops[1:])]

    def views(self, batch: Batch, clips: Sequence[Tensor]) -> list[View]:
        """What the encoder is asked for; `clips` are the normalised views."""
        return [View(x, contexts) for x, contexts in zip(clips, self.contexts(batch), strict=True)]

    def sort(self, batch: Batch, encoded: Sequence[Sequence[Tensor]]) -> Encoded:
        """The encoder's answer to `views`, by what it is."""
        first = list(encoded[0])
        contexts: list[Tensor] = []
        if self.masks:
            for mask in batch.masks:
                contexts.append(first.pop(0) if mask.context_of is None else contexts[mask.context_of])
        if not self.crops:
            return Encoded(contexts, first[0] if self.whole else None)
        others = [tokens[0] for tokens in encoded[1:]]
        whole = first[0] if self.whole else None
        return Encoded(contexts, whole, [first[-1], *others])

    def lengths(self, batch: Batch, patch_size: int, tubelet_size: int) -> list[tuple[Grid, list[int | None]]]:
        """The grid of each view and how many tokens of it are encoded each time (None: all), to count operations."""
        found = []
        for view, contexts in zip(self.clips(batch), self.contexts(batch), strict=True):
            frames, height, width = view.shape[2:]
            grid = (max(1, frames // tubelet_size), height // patch_size, width // patch_size)
            found.append((grid, [None if x is None else x.shape[1] for x in contexts]))
        return found
