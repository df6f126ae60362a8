"""The collapse measures of `diagnostics`, taken per modality and level from one micro-batch's outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vjepa.batch import Modality
from vjepa.nn.gather import take_tokens
from vjepa.objectives.terms import Outputs
from vjepa.train import diagnostics
from vjepa.train.distributed import World

MAX_ROWS = 2048  # token features over all ranks that enter the statistics of a level


@torch.no_grad()
def level_diagnostics(outputs: Mapping[Modality, Outputs], levels: Sequence[int], world: World) -> dict[str, Tensor]:
    """diag/<modality>/level<k>/<measure>, k the block's number from 1; features are the target's, after its LayerNorm.

    Spread and rank are of token features of all ranks. Cosine and gap compare predictions of the first mask with the
    target; the gap needs another clip in the same micro-batch and is left out when there is none.
    """
    measures: dict[str, Tensor] = {}
    for modality, output in outputs.items():
        if output.target is None:
            continue
        targets = output.target.chunk(len(levels), dim=-1)
        predictions = output.predicted[0].chunk(len(levels), dim=-1)
        for level, target, predicted in zip(levels, targets, predictions, strict=True):
            prefix = f"diag/{modality}/level{level + 1}"
            found = _spread(target, world) | _agreement(predicted, target, output.masks[0].masked)
            measures |= {f"{prefix}/{name}": value for name, value in found.items()}
    return measures


def _spread(target: Tensor, world: World) -> dict[str, Tensor]:
    rows = target.flatten(0, 1)  # [B * N, D]
    count = min(len(rows), max(2, MAX_ROWS // world.size))
    chosen = torch.linspace(0, len(rows) - 1, count, device=rows.device).long()
    rows = world.gather_rows(rows[chosen])
    return {
        "feature_std": diagnostics.feature_std(rows),
        "mean_cosine": diagnostics.mean_cosine(rows),
        "rankme": diagnostics.rankme(rows),
    }


def _agreement(predicted: Tensor, target: Tensor, masked: Tensor) -> dict[str, Tensor]:
    own = take_tokens(target, masked)  # [B, M, D]
    found = {"target_prediction_cosine": diagnostics.target_prediction_cosine(predicted, own)}
    if len(target) > 1:
        other = take_tokens(target.roll(1, dims=0), masked)
        found["cross_sample_gap"] = diagnostics.cross_sample_gap(predicted, own, other)
    return found
