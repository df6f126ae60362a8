"""Which embeddings a term on batch statistics looks at, and the projector in front of them.

Such a term says nothing of single predictions: it holds up the distribution of embeddings over the global batch. That
is no sum over the parts of a batch (accumulation): a first pass without gradient keeps the embeddings of all parts, and
with each part the term sees the whole batch, of which that part is live.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vjepa.batch import Modality
from vjepa.nn.encoder import EncoderConfig
from vjepa.nn.init import WEIGHT_STD
from vjepa.objectives import vicreg
from vjepa.objectives.outputs import Outputs
from vjepa.objectives.projector import Projector

OF_WHOLE_GRIDS = ("place", "step", "first")
Nested = list[list[Tensor]]  # embeddings [..., N, D]: for each level, one for each mask or view


@dataclass
class EmbeddingConfig:
    """The embeddings of a term."""

    of: Literal["whole", "context", "views"] = "context"  # tokens of whole clips (target=online), visible, of all crops
    pool: Literal["clip", "token", "place", "step", "first"] = "clip"  # samples: see vjepa/objectives/vicreg.py
    levels: list[int] | None = None  # supervised levels from 1, each with statistics of its own; null: all
    projector: int | None = None  # width behind an MLP with batch normalisation; null: none
    hidden_dim: int = 2048  # of that MLP

    def __post_init__(self) -> None:
        if self.of != "whole" and self.pool in OF_WHOLE_GRIDS:
            what = "visible tokens fill no grid" if self.of == "context" else "crops differ in their grids"
            raise ValueError(f"embedding.pool={self.pool} needs embedding.of=whole: {what}")
        if self.projector is not None and min(self.projector, self.hidden_dim) < 1:
            raise ValueError(
                f"embedding.projector={self.projector} and hidden_dim={self.hidden_dim} must be at least 1"
            )


@dataclass(frozen=True)
class StepEmbeddings:
    """What a first pass kept of all micro-batches of a step on this rank, before projectors; one is trained on now."""

    parts: Sequence[Mapping[tuple[Modality, str], Nested]]  # by modality and name, for each micro-batch
    current: int

    def whole(self, modality: Modality, name: str, live: Nested) -> Nested:
        """The embeddings of the whole step, those of the current micro-batch with gradient.

        A trainer averages its micro-batches' losses, and each of them is the same loss of the whole step: the gradient
        of the live part is multiplied by their number, so that together they have it once. What comes behind it (a
        projector) sees every part each time, and has it once already.
        """
        kept = [part[modality, name] for part in self.parts]
        return [
            [
                torch.cat(
                    [
                        _amplified(mine, len(kept)) if number == self.current else part[level][view]
                        for number, part in enumerate(kept)
                    ],
                    dim=-2,
                )
                for view, mine in enumerate(views)
            ]
            for level, views in enumerate(live)
        ]


def _amplified(x: Tensor, factor: int) -> Tensor:
    """x, with `factor` times its gradient."""
    x = x.view_as(x)
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient * factor)
    return x


class Embeddings(nn.Module):
    """A modality's outputs -> embeddings [..., N, D]: for each level a list, one entry for each mask or view."""

    def __init__(self, config: EmbeddingConfig, encoder: EncoderConfig, name: str) -> None:
        super().__init__()
        self.config, self.name = config, name
        count = len(encoder.levels)
        chosen = list(range(1, count + 1)) if config.levels is None else config.levels
        if not chosen or not all(1 <= level <= count for level in chosen):
            raise ValueError(f"embedding.levels={chosen}: the encoder has {count} supervised levels, counted from 1")
        self.levels = [level - 1 for level in chosen]
        self.projectors = nn.ModuleList(
            Projector(encoder.embed_dim, config.hidden_dim, config.projector) for _ in self.levels if config.projector
        )

    def initialise(self, *, scope: str, seed: int, weight_std: float = WEIGHT_STD) -> None:
        """Fill the projectors, whole or in shards."""
        for index, projector in enumerate(self.projectors):
            assert isinstance(projector, Projector)
            projector.initialise(scope=f"{scope}.level{self.levels[index] + 1}", seed=seed, weight_std=weight_std)

    def forward(self, outputs: Outputs) -> Nested:
        found = self.pooled(outputs)
        if outputs.of_step is not None:
            found = outputs.of_step.whole(outputs.modality, self.name, found)
        if not self.projectors:
            return found
        return [_together(projector, views) for projector, views in zip(self.projectors, found, strict=True)]

    def pooled(self, outputs: Outputs) -> Nested:
        """The samples [..., N, D] of this micro-batch, before the projector."""
        return [
            [
                self._pool(tokens.unflatten(-1, (outputs.num_levels, -1))[..., level, :], outputs)
                for tokens in self._tokens(outputs)
            ]
            for level in self.levels
        ]

    def _tokens(self, outputs: Outputs) -> Sequence[Tensor]:
        """[B, K, L*D] each."""
        if self.config.of == "context":
            return outputs.context
        if self.config.of == "views":
            return outputs.views
        assert outputs.whole is not None, "refused by checks.py"
        return [outputs.whole]

    def _pool(self, tokens: Tensor, outputs: Outputs) -> Tensor:
        """Tokens [B, K, D] -> samples [..., N, D]."""
        match self.config.pool:
            case "clip":
                return vicreg.clip_means(tokens)
            case "token":
                return vicreg.pooled(tokens)
            case "place":
                return vicreg.per_place(tokens)
            case "step":
                return vicreg.per_time_step(tokens, outputs.grid)
            case "first":
                return vicreg.first_frame(tokens, outputs.grid)


def _together(projector: nn.Module, samples: Sequence[Tensor]) -> list[Tensor]:
    """All samples [..., N, D] through a projector at once: its batch normalisation sees views or masks as one batch."""
    sizes = [z.shape[-2] for z in samples]
    return list(projector(torch.cat(list(samples), dim=-2)).split(sizes, dim=-2))
