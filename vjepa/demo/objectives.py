"""Six ways to train the same networks on the same task, which differ in what keeps the embeddings from collapsing.

The loss is that of LeWorldModel and eb_jepa, mean squared error of the predicted next embedding, plus a regulariser of
the embeddings of each time step. With neither a fixed or slow target nor a regulariser, a constant is a perfect
solution.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from vjepa.demo.models import FrameEncoder, build_models
from vjepa.objectives.sigreg import sigreg
from vjepa.objectives.vicreg import covariance, invariance, variance

EMA_MOMENTUM = 0.99
SIGREG_WEIGHT = 0.1
SIGREG_DIRECTIONS = 256
VICREG_COVARIANCE = 1 / 25  # published 25 / 25 / 1 for invariance, variance, covariance; here over 25
TEACHER_SEED = 1_000_003  # added to the run's: the frozen teacher is not the student's own start


class Draw(NamedTuple):
    """What the random numbers of one step depend on."""

    seed: int
    step: int


@dataclass(frozen=True)
class Objective:
    """Where the target embeddings come from, and what else is asked of the online ones."""

    target: Literal["own", "stopped", "ema", "frozen"]
    regulariser: Callable[[Tensor, Draw], Tensor] | None
    about: str


def sigreg_penalty(z: Tensor, draw: Draw) -> Tensor:
    """SIGReg over the batch of each time step, z: [T, B, D]."""
    return SIGREG_WEIGHT * sigreg(z, num_directions=SIGREG_DIRECTIONS, seed=draw.seed, step=draw.step, name="demo")


def vicreg_penalty(z: Tensor, draw: Draw) -> Tensor:
    """Variance and covariance over the batch of each time step, z: [T, B, D]."""
    return variance(z) + VICREG_COVARIANCE * covariance(z)


OBJECTIVES = {
    "none": Objective("own", None, "gradient through the target, no prevention"),
    "sg": Objective("stopped", None, "stop-gradient on the target, nothing else"),
    "ema": Objective("ema", None, f"target of an EMA encoder, momentum {EMA_MOMENTUM}"),
    "sigreg": Objective("own", sigreg_penalty, f"gradient through the target + {SIGREG_WEIGHT} SIGReg per time step"),
    "vicreg": Objective("own", vicreg_penalty, "gradient through the target + VICReg 25/25/1 per time step"),
    "frozen": Objective("frozen", None, "target of a frozen random encoder"),
}


class Learner(nn.Module):
    """Encoder, predictor and, where the objective has one, a target encoder that receives no gradient."""

    def __init__(self, objective: Objective, seed: int) -> None:
        super().__init__()
        self.objective, self.seed = objective, seed
        self.encoder, self.predictor = build_models(seed)
        self.target_encoder = _target_encoder(objective, self.encoder, seed)

    def forward(self, clips: Tensor, step: int) -> Tensor:
        """The training loss of a batch of clips [B, T, 1, H, W]."""
        z, predicted, target = self.embed(clips)
        loss = invariance(predicted, target)
        if self.objective.regulariser is not None:
            loss = loss + self.objective.regulariser(z, Draw(self.seed, step))
        return loss

    def embed(self, clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [T, B, D]; predictions and their targets, both [T - 2, B, D]."""
        z = self.encoder(clips)
        return z, self.predictor(z), self._targets(clips, z)[2:]

    @torch.no_grad()
    def update_target(self) -> None:
        """After the optimiser's step: the EMA encoder follows."""
        if self.objective.target == "ema" and self.target_encoder is not None:
            for mine, theirs in zip(self.target_encoder.parameters(), self.encoder.parameters(), strict=True):
                mine.lerp_(theirs, 1 - EMA_MOMENTUM)

    def trained(self) -> list[nn.Parameter]:
        """The parameters an optimiser moves."""
        return [*self.encoder.parameters(), *self.predictor.parameters()]

    def _targets(self, clips: Tensor, z: Tensor) -> Tensor:
        if self.target_encoder is not None:
            with torch.no_grad():
                return self.target_encoder(clips)
        return z.detach() if self.objective.target == "stopped" else z


def _target_encoder(objective: Objective, encoder: FrameEncoder, seed: int) -> FrameEncoder | None:
    if objective.target == "ema":
        return copy.deepcopy(encoder).requires_grad_(False)
    if objective.target == "frozen":
        return build_models(seed + TEACHER_SEED)[0].requires_grad_(False)
    return None
