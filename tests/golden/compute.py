"""From weights and clips to every tensor that a golden file records, through the public API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import vjepa
from vjepa.batch import Mask, Modality
from vjepa.nn.encoder import Encoder, View
from vjepa.nn.predictor import Predictor, Query
from vjepa.objectives.targets import EmaTarget
from vjepa.objectives.terms import ContextPrediction, MaskedPrediction, Outputs, sqrt_distance_to_masked

LAMBDA = 0.5


def load_models(path: Path, num_heads: int = 1, predictor_num_heads: int = 1) -> tuple[Encoder, Predictor, Encoder]:
    """Student encoder, predictor and target encoder of a checkpoint in the released layout."""

    def load(key: str) -> tuple[Encoder, Predictor]:
        return vjepa.hub.import_official(path, key=key, num_heads=num_heads, predictor_num_heads=predictor_num_heads)

    return *load("encoder"), load("target_encoder")[0]


def forward(
    case: dict[str, Any], modality: Modality, encoder: Encoder, predictor: Predictor, target: Encoder
) -> Outputs:
    """One training forward pass over the case's masks, all in one call of each network."""
    masks = tuple(Mask(k, m) for k, m in zip(case["masks_context"], case["masks_target"], strict=True))
    [context] = encoder.forward_levels([View(case["clip"], tuple(mask.context for mask in masks))])
    grid = encoder.grid(case["clip"])
    queries = [Query(x, mask.context, mask.masked, grid, modality) for x, mask in zip(context, masks, strict=True)]
    predicted, visible = zip(*predictor.forward_queries(queries), strict=True)
    [targets] = EmaTarget(target)([case["clip"]])
    return Outputs(
        modality=modality,
        grid=grid,
        num_levels=len(encoder.levels),
        masks=masks,
        context=context,
        predicted=list(predicted),
        visible=list(visible),
        target=targets,
    )


def compute(
    case: dict[str, Any], modality: Modality, encoder: Encoder, predictor: Predictor, target: Encoder
) -> dict[str, Any]:
    """Everything the golden files record for one case."""
    outputs = forward(case, modality, encoder, predictor, target)
    loss_pred = MaskedPrediction()(outputs)
    loss_context = ContextPrediction()(outputs)
    loss_unweighted = ContextPrediction(distance_weighted=False)(outputs)
    loss = loss_pred + LAMBDA * loss_context
    encoder.zero_grad()
    predictor.zero_grad()
    loss.backward()
    with torch.no_grad():
        levels = encoder.forward_intermediates(case["clip"])
    return {
        "features": encoder(case["clip"]).detach(),
        "features_hierarchical": torch.cat(levels, dim=-1),
        "targets": outputs.target,
        "context": [x.detach() for x in outputs.context],
        "predicted_targets": [x.detach() for x in outputs.predicted],
        "predicted_context": [x.detach() for x in outputs.visible if x is not None],
        "distance_weights_sqrt_dmin": [sqrt_distance_to_masked(mask, outputs.grid) for mask in outputs.masks],
        "loss_pred": loss_pred.detach(),
        "loss_context": loss_context.detach(),
        "loss_context_unweighted": loss_unweighted.detach(),
        "loss": loss.detach(),
        "grad_norms": {
            part: {name: p.grad.norm() for name, p in module.named_parameters() if p.grad is not None}
            for part, module in (("encoder", encoder), ("predictor", predictor))
        },
    }
