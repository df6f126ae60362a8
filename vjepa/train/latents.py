"""Does the predictor use its latent, and does it still use the context? Measured with another clip's in their place.

A latent that is ignored limits nothing and helps nothing; one that copies the target leaves nothing to predict, so that
the encoder learns nothing (latent bypass). The loss tells neither: it is lowest in bypass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from vjepa.batch import Modality
from vjepa.nn.predictor import Query
from vjepa.objectives.jepa import JEPA
from vjepa.objectives.outputs import Outputs
from vjepa.objectives.terms import Distance

LEAST = 0.01  # share of the loss that both must cost; where they cost less, nothing depends on the clip


@torch.no_grad()
def latent_diagnostics(objective: JEPA, outputs: Mapping[Modality, Outputs]) -> dict[str, Tensor]:
    """diag/<modality>/latent/<measure>; {} without a latent. All ranks call it, under the autocast of the step.

    nats                mean price of a clip's latent, over masks
    reliance            share of the loss that another clip's z alone costs: 0 where the latent is ignored
    context_reliance    share of the loss that another clip's context alone costs: 0 where z tells all (bypass)

    Shares are of what both cost together, (L(one of them) - L) / (L(both) - L), with L1 at the first mask's places. The
    ratio 1 - L / L(one of them) would be large where L is small, be z a copy of the target or not (README). They need
    another clip in the micro-batch and are left out without.
    """
    told = {modality: output for modality, output in outputs.items() if output.latents}
    measures = {f"diag/{m}/latent/nats": _mean_nats(output) for m, output in told.items()}
    paired = {modality: output for modality, output in told.items() if len(output.latents[0].nats) > 1}
    swapped = [query for output in paired.values() for query in _swapped(output)]
    distances = iter(_predict(objective, swapped))
    for modality, output in paired.items():
        own = _distance(output, output.predicted[0])
        both = _distance(
            output, output.predicted[0], output.wanted.roll(1, dims=0)
        )  # of the other clip, seen from here
        for name in ("reliance", "context_reliance"):
            lost = _distance(output, next(distances)) - own
            measures[f"diag/{modality}/latent/{name}"] = lost / (both - own).clamp_min(LEAST * both)
    return measures


def _mean_nats(output: Outputs) -> Tensor:
    return torch.stack([latent.nats.mean() for latent in output.latents]).mean()


def _swapped(output: Outputs) -> tuple[Query, Query]:
    """The first mask's query with another clip's latent, and with another clip's context."""
    mask, latent = output.masks[0], output.latents[0].value
    own = Query(output.context[0], mask.context, mask.masked, output.grid, output.modality, latent)
    other_context = replace(own, tokens=own.tokens.roll(1, dims=0), context=own.context.roll(1, dims=0))
    return replace(own, latent=latent.roll(1, dims=0)), other_context


def _predict(objective: JEPA, queries: list[Query]) -> list[Tensor]:
    """Predictions at the masked places, in one pass."""
    predictor = objective.predictor
    if predictor is None or not queries:
        return []
    predicted = [masked for masked, _ in predictor.forward_queries(queries)]
    if isinstance(predictor, FSDPModule):
        predictor.reshard()  # no backward pass follows that would: the next step would see weights of before the update
    return predicted


def _distance(output: Outputs, predicted: Tensor, target: Tensor | None = None) -> Tensor:
    target = output.wanted if target is None else target
    return Distance()(predicted, target, output.masks[0].masked, output.num_target_levels).mean()
