"""Terms on the statistics of embeddings: what keeps an encoder from a constant without a teacher, and what holds views
of a clip together.

Each holds the configuration of its recipe and, unless it shares one of `objective.embeddings`, a projector of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from vjepa.batch import Modality
from vjepa.nn.encoder import EncoderConfig
from vjepa.nn.init import WEIGHT_STD
from vjepa.objectives.collectives import num_ranks
from vjepa.objectives.embeddings import EmbeddingConfig, Embeddings
from vjepa.objectives.outputs import Outputs
from vjepa.objectives.sigreg import NODES, Scale, sigreg
from vjepa.objectives.terms import register_term
from vjepa.objectives.vicreg import Normalise, covariance, variance, view_spread
from vjepa.objectives.visreg import visreg

log = logging.getLogger(__name__)
Embedded = Sequence[Sequence[Tensor]]  # [..., N, D]; for each level, one for each mask or view


class EmbeddingTerm(Protocol):
    """The configuration of a term on embeddings."""

    weight: float  # factor in the loss
    shared: str | None  # an entry of objective.embeddings to look at; null: `embedding`
    embedding: EmbeddingConfig  # this term's own

    def value(self, embedded: Embedded, outputs: Outputs, name: str) -> Tensor:
        """The unweighted loss, a scalar in fp32."""
        ...


@register_term("sigreg")
@dataclass
class SigRegConfig:
    """SIGReg (LeJEPA, arXiv 2511.08544; LeWorldModel, arXiv 2603.19312): one weight to tune, in 0.01 to 0.2."""

    weight: float = 0.1  # factor in the loss; with scale=n it acts as weight x global samples
    num_directions: int = 1024  # drawn anew in every step
    nodes: Literal["default", "code", "paper", "lewm"] = "default"  # points of integration
    scale: Scale = "n"  # n: times the number of samples, as published; none: not
    seed: int = 0  # of the directions
    shared: str | None = None  # an entry of objective.embeddings to look at; null: `embedding`
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)  # this term's own

    def build(self, encoder: EncoderConfig, name: str) -> Regulariser:
        return Regulariser(self, encoder, name)

    def value(self, embedded: Embedded, outputs: Outputs, name: str) -> Tensor:
        first = embedded[0][0]
        samples = first.shape[-2] * num_ranks() if self.scale == "n" else 1
        outputs.notes[f"effective_weight/{name}"] = torch.tensor(self.weight * samples, device=first.device)
        return _mean(embedded, lambda z: self._of(z, outputs, name))

    def _of(self, z: Tensor, outputs: Outputs, name: str) -> Tensor:
        return sigreg(
            z,
            num_directions=self.num_directions,
            seed=self.seed,
            step=outputs.step,
            name=f"{name}/{outputs.modality}",
            nodes=NODES[self.nodes],
            scale=self.scale,
        )


@register_term("vicreg")
@dataclass
class VicRegConfig:
    """Variance and covariance of VICReg (arXiv 2105.04906); its invariance is a prediction, or `invariance`."""

    weight: float = 1.0  # factor in the loss
    variance: float = 25.0  # factor of the hinge on standard deviations
    covariance: float = 1.0  # factor of the squared off-diagonal covariances
    normalise: Normalise = "dimensions"  # covariances over D (VICReg), or pairs: over D(D - 1) (eb_jepa)
    target_std: float = 1.0  # below which a dimension is pushed apart
    shared: str | None = None  # an entry of objective.embeddings to look at; null: `embedding`
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)  # this term's own

    def build(self, encoder: EncoderConfig, name: str) -> Regulariser:
        return Regulariser(self, encoder, name)

    def value(self, embedded: Embedded, outputs: Outputs, name: str) -> Tensor:
        spread = _mean(embedded, lambda z: variance(z, target=self.target_std))
        return self.variance * spread + self.covariance * _mean(
            embedded, lambda z: covariance(z, normalise=self.normalise)
        )


@register_term("visreg")
@dataclass
class VisRegConfig:
    """VISReg (arXiv 2606.02572): centre, scale and shape. It can itself collapse from a small initial scale: visreg.py.

    Without a projector, whose outputs begin at unit scale, it warns.
    """

    weight: float = 1.0  # factor in the loss
    num_directions: int = 256  # drawn anew in every step
    center: float = 1.0  # factor of the squared mean
    scale: float = 1.0  # factor of the deviations' distance to 1
    shape: float = 1.0  # factor of the sorted projections' distance to a Gaussian's
    seed: int = 0  # of the directions
    shared: str | None = None  # an entry of objective.embeddings to look at; null: `embedding`
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)  # this term's own

    def build(self, encoder: EncoderConfig, name: str) -> Regulariser:
        if self.shared is None and self.embedding.projector is None:
            log.warning(
                "objective.terms.%s: VISReg without a projector collapses where embeddings begin below unit scale; set "
                "objective.terms.%s.embedding.projector=64 and watch the context's scale",
                *(name, name),
            )
        return Regulariser(self, encoder, name)

    def value(self, embedded: Embedded, outputs: Outputs, name: str) -> Tensor:
        return _mean(embedded, lambda z: self._of(z, outputs, name))

    def _of(self, z: Tensor, outputs: Outputs, name: str) -> Tensor:
        return visreg(
            z,
            num_directions=self.num_directions,
            seed=self.seed,
            step=outputs.step,
            name=f"{name}/{outputs.modality}",
            center=self.center,
            scale=self.scale,
            shape=self.shape,
        )


@register_term("invariance")
@dataclass
class InvarianceConfig:
    """How far the views of a clip lie from the mean of its global ones (LeJEPA, arXiv 2511.08544, algorithm 2).

    With two global views and no others this is a quarter of VICReg's invariance, the squared distance of the two.
    """

    weight: float = 1.0  # factor in the loss; LeJEPA: 1 - lambda beside lambda times SIGReg
    reduce: Literal["mean", "sum"] = "mean"  # over dimensions: mean as in the algorithm, sum as in the formula
    shared: str | None = None  # an entry of objective.embeddings to look at; null: `embedding`
    embedding: EmbeddingConfig = field(default_factory=lambda: EmbeddingConfig(of="views"))  # this term's own

    def build(self, encoder: EncoderConfig, name: str) -> Regulariser:
        return Regulariser(self, encoder, name)

    def value(self, embedded: Embedded, outputs: Outputs, name: str) -> Tensor:
        losses = []
        for views in embedded:
            if len(views) < 2:
                raise ValueError(
                    f"objective.terms.{name} compares views of a clip, and there is one: set data.{outputs.modality}"
                    ".clip.views or clip.local.views, and embedding.of=views"
                )
            losses.append(view_spread(views, outputs.num_global, reduce=self.reduce))
        return torch.stack(losses).mean()


class Regulariser(nn.Module):
    """A term on embeddings, with its projector."""

    def __init__(self, config: EmbeddingTerm, encoder: EncoderConfig, name: str) -> None:
        super().__init__()
        self.config, self.name = config, name
        self.embeddings = Embeddings(config.embedding, encoder, name) if config.shared is None else None

    def initialise(self, *, scope: str, seed: int, weight_std: float = WEIGHT_STD) -> None:
        if self.embeddings is not None:
            self.embeddings.initialise(scope=scope, seed=seed, weight_std=weight_std)

    def weight_at(self, modality: Modality, step: int) -> float:
        return self.config.weight

    def forward(self, outputs: Outputs) -> Tensor:
        if self.embeddings is not None:
            embedded = self.embeddings(outputs)
        else:
            assert self.config.shared is not None
            embedded = outputs.embedded[self.config.shared]
        return self.config.value(embedded, outputs, self.name)


def _mean(embedded: Embedded, of: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean of a statistic over all levels, masks and views, each a batch of its own."""
    return torch.stack([of(z) for views in embedded for z in views]).mean()
