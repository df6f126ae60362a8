"""What does not go together in an objective is refused before any step, and what no step can reach is not trained."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vjepa.batch import MODALITIES, Modality
from vjepa.objectives.targets import FrozenTarget
from vjepa.objectives.terms import ContextPrediction, LatentInformation, MaskedPrediction

if TYPE_CHECKING:
    from vjepa.objectives.jepa import JEPA

log = logging.getLogger(__name__)


def check_together(objective: JEPA) -> None:
    """Raise ValueError where target, networks, terms and embeddings do not fit."""
    target = objective.config.target
    if (target == "none") is not (objective.predictor is None):
        raise ValueError("a predictor is given where something is predicted: see vjepa.objectives.build_objective")
    if (target == "frozen") is not isinstance(objective.target, FrozenTarget):
        raise ValueError(f"objective.target={target}: only a frozen target is given a teacher, and always")
    predicting = [n for n, t in objective.terms.items() if isinstance(t, MaskedPrediction | ContextPrediction)]
    if target == "none" and predicting:
        raise ValueError(
            f"objective.target=none has no predictions: set objective.terms.{predicting[0]} to null, or choose "
            "another target"
        )
    if not objective.wanted.whole and any(e.config.of == "whole" for e in objective.embeddings()):
        raise ValueError("embedding.of=whole needs objective.target=online: a target's tokens have no gradient")
    _check_latent(objective)


def _check_latent(objective: JEPA) -> None:
    asked = objective.config.latent
    found = 0 if objective.predictor is None else objective.predictor.config.latent_dim
    if found != asked.width:
        raise ValueError(
            f"objective.latent has {asked.width} channels, the predictor's latent_dim={found}: see build_objective"
        )
    limits = [name for name, term in objective.terms.items() if isinstance(term, LatentInformation)]
    if asked.kind == "none" and limits:
        raise ValueError(f"objective.terms.{limits[0]} needs objective.latent.kind=gaussian or discrete")
    if asked.kind == "gaussian" and not limits:
        log.warning(
            "objective.latent.kind=gaussian without objective.terms.latent_information: nothing limits what the "
            "latent tells, it may copy the target (watch diag/*/latent/context_reliance)"
        )


def freeze_unused(objective: JEPA, modalities: list[Modality]) -> list[str]:
    """Switch off gradients of parameters that no step can reach (an absent modality's, an unused head's); their names.

    Every parameter that stays trainable gets a gradient in every step on every rank: nothing waits for it.
    """
    unused = {
        f"{owner}.{modality}"
        for modality in MODALITIES
        if modality not in modalities
        for owner in ("encoder.tokenizer", "predictor.mask_tokens", "predictor.modality_embeds")
    } | {f"encoder.tokenizer.{modality}_embed" for modality in MODALITIES if modality not in modalities}
    if not any(isinstance(term, ContextPrediction) for term in objective.terms.values()):
        unused.add("predictor.context_head")
    if objective.predictor is None:  # a predictor reads all levels
        unused |= {f"encoder.norms.{level}" for level in _levels_not_embedded(objective)}
    frozen = []
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad and any(name == prefix or name.startswith(prefix + ".") for prefix in unused):
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen


def _levels_not_embedded(objective: JEPA) -> set[int]:
    embedded = {level for embeddings in objective.embeddings() for level in embeddings.levels}
    return set(range(len(objective.encoder.levels))) - embedded
