"""Terms that keep the encoder from a constant by the statistics of its embeddings: no teacher needed beside them.

Each holds the configuration of its recipe and, where it asks for a projector, parameters of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from vjepa.batch import Modality
from vjepa.nn.encoder import EncoderConfig
from vjepa.nn.init import WEIGHT_STD
from vjepa.objectives.embeddings import EmbeddingConfig, Embeddings
from vjepa.objectives.sigreg import NODES, Scale, sigreg
from vjepa.objectives.terms import Outputs, register_term
from vjepa.objectives.vicreg import Normalise, covariance, variance


@register_term("sigreg")
@dataclass
class SigRegConfig:
    """SIGReg (LeJEPA, arXiv 2511.08544; LeWorldModel, arXiv 2603.19312): one weight to tune, in 0.01 to 0.2."""

    weight: float = 0.1  # factor in the loss; with scale=n it acts as weight x global samples
    num_directions: int = 1024  # drawn anew in every step
    nodes: Literal["default", "code", "paper", "lewm"] = "default"  # points of integration
    scale: Scale = "n"  # n: times the number of samples, as published; none: not
    seed: int = 0  # of the directions
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)

    def build(self, encoder: EncoderConfig) -> Regulariser:
        return Regulariser(self, encoder)

    def value(self, z: Tensor, outputs: Outputs) -> Tensor:
        return sigreg(
            z,
            num_directions=self.num_directions,
            seed=self.seed,
            step=outputs.step,
            name=f"sigreg/{outputs.modality}",
            nodes=NODES[self.nodes],
            scale=self.scale,
        )


@register_term("vicreg")
@dataclass
class VicRegConfig:
    """Variance and covariance of VICReg (arXiv 2105.04906); its invariance is the prediction term beside it."""

    weight: float = 1.0  # factor in the loss
    variance: float = 25.0  # factor of the hinge on standard deviations
    covariance: float = 1.0  # factor of the squared off-diagonal covariances
    normalise: Normalise = "dimensions"  # covariances over D (VICReg), or pairs: over D(D - 1) (eb_jepa)
    target_std: float = 1.0  # below which a dimension is pushed apart
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)

    def build(self, encoder: EncoderConfig) -> Regulariser:
        return Regulariser(self, encoder)

    def value(self, z: Tensor, outputs: Outputs) -> Tensor:
        spread = variance(z, target=self.target_std)
        return self.variance * spread + self.covariance * covariance(z, normalise=self.normalise)


class Regulariser(nn.Module):
    """A term on the statistics of embeddings: the mean over its levels and masks."""

    def __init__(self, config: SigRegConfig | VicRegConfig, encoder: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config.embedding, encoder)

    def initialise(self, *, scope: str, seed: int, weight_std: float = WEIGHT_STD) -> None:
        self.embeddings.initialise(scope=scope, seed=seed, weight_std=weight_std)

    def weight_at(self, modality: Modality, step: int) -> float:
        return self.config.weight

    def forward(self, outputs: Outputs) -> Tensor:
        return torch.stack([self.config.value(z, outputs) for z in self.embeddings(outputs)]).mean()
