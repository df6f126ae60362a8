"""What a forward pass hands to the terms of an objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from vjepa.batch import Grid, Mask, Modality
from vjepa.nn.latent import Latent

if TYPE_CHECKING:
    from vjepa.objectives.embeddings import StepEmbeddings


@dataclass(frozen=True)
class Outputs:
    """All that one modality's forward pass gave; lists have one entry per mask unless they say otherwise."""

    modality: Modality
    grid: Grid
    num_levels: int  # of the encoder that is trained: L of context, whole and views
    masks: tuple[Mask, ...]
    context: list[Tensor]  # context encoder's tokens, [B, K, L*D]
    predicted: list[Tensor]  # predictions at masked places, [B, M, L'*D']; none without a predictor
    visible: list[Tensor | None]  # predictions at context places, [B, K, L'*D']
    target: Tensor | None  # [B, N, L'*D'] fp32, layer-normed by level; no gradient but from an online target
    target_levels: tuple[int, ...] = ()  # 0-based blocks of a teacher that are its L' levels; (): the encoder's own
    latents: list[Latent] = field(default_factory=list)  # what the predictor was told of the target; none without one
    whole: Tensor | None = None  # the encoder's own tokens of the whole clip, [B, N, L*D], where they were asked for
    views: list[Tensor] = field(default_factory=list)  # of each crop of the clips, [B, K, L*D], where asked for
    num_global: int = 0  # how many of the views are global ones, the first
    embedded: dict[str, list[list[Tensor]]] = field(default_factory=dict)  # objective.embeddings by name: level, view
    of_step: StepEmbeddings | None = None  # all embeddings of a step whose batch comes in parts; null: this is all
    notes: dict[str, Tensor] = field(default_factory=dict)  # detached scalars that terms want logged
    step: int = 0  # of training, from 0

    @property
    def num_target_levels(self) -> int:
        """L' of target and predictions."""
        return len(self.target_levels) or self.num_levels

    @property
    def wanted(self) -> Tensor:
        """The target, for terms that compare predictions with it."""
        if self.target is None:
            raise ValueError(
                "objective.target=none has no predictions: set objective.terms.masked_prediction and "
                "context_prediction to null, or choose another target"
            )
        return self.target
