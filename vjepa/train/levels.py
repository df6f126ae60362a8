"""The collapse measures, taken per modality and level from one micro-batch's outputs.

diag/<modality>/level<k>/<measure>, k the encoder's block from 1, by the four criteria of LeCun's position paper ("A
path towards autonomous machine intelligence", section 4.5):

1. information in the context representation: context_<measure>, of the trained encoder's own features;
2. information in the target representation: <measure>, of the targets after their LayerNorm;
3. predictability: nmse, cross_sample_gap, target_prediction_cosine, and position_decodability of the targets;
4. information in the latent: see latents.py, where the objective has one.

Beside them lidar, where a batch has several views of a clip, and once per run diag/ema_distance. Levels of a frozen
teacher's targets bear the teacher's numbers; pixels as targets are level 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vjepa.batch import Modality
from vjepa.nn.gather import take_tokens
from vjepa.nn.rope import grid_positions
from vjepa.objectives.jepa import JEPA
from vjepa.objectives.outputs import Outputs
from vjepa.objectives.targets import EmaTarget
from vjepa.train import diagnostics, representation
from vjepa.train.diagnostics import CONTEXT
from vjepa.train.distributed import World

MAX_ROWS = 2048  # token features over all ranks that enter the statistics of a level; of one rank's for the nMSE
MOST_PLACES, PLACED_ROWS = 512, 4096  # tokens of a clip, and of all clips of a rank, from which places are told
LIDAR_CLIPS = 256  # over all ranks


@torch.no_grad()
def diagnose(objective: JEPA, outputs: Mapping[Modality, Outputs], world: World) -> dict[str, Tensor]:
    """All diagnostics of a step, by the names under which they are logged; collective."""
    return level_diagnostics(outputs, objective.encoder.levels, world) | ema_distance(objective)


@torch.no_grad()
def level_diagnostics(outputs: Mapping[Modality, Outputs], levels: Sequence[int], world: World) -> dict[str, Tensor]:
    """The measures of every modality and level, on the device; `levels` are the encoder's 0-based blocks. Collective.

    Information is that of at most MAX_ROWS token features of all ranks, LiDAR's of LIDAR_CLIPS clips. Predictability is
    that of the first mask, of one rank; the gap and places need two clips in the micro-batch and are left out with one.
    """
    matrices: dict[str, Tensor] = {}  # "<modality>/level<k>/<prefix>" -> [n, D]
    measures: dict[str, Tensor] = {}
    for modality, output in outputs.items():
        if output.target is not None:
            numbers = output.target_levels or levels
            matrices |= _by_level(f"{modality}", "", _rows(output.target, world), numbers)
            found = _predictability(output, len(numbers))
            for number, values in zip(numbers, found, strict=True):
                measures |= {f"{modality}/level{number + 1}/{name}": value for name, value in values.items()}
        if (tokens := own_tokens(output)) is not None:
            matrices |= _by_level(f"{modality}", CONTEXT, _rows(tokens, world), levels)
        for number, value in zip(levels, _lidar(output, world), strict=False):  # none where there is one view
            measures[f"{modality}/level{number + 1}/lidar"] = value
    measures |= _information(matrices, world)
    return {f"diag/{name}": value for name, value in measures.items()}


def ema_distance(objective: JEPA) -> dict[str, Tensor]:
    """How far the EMA target is from the encoder, once per run; nothing where no target follows the encoder."""
    if not isinstance(objective.target, EmaTarget):
        return {}
    student, target = objective.encoder.parameters(), objective.target.encoder.parameters()
    return {"diag/ema_distance": representation.parameter_distance(list(student), list(target))}


def own_tokens(output: Outputs) -> Tensor | None:
    """The trained encoder's tokens [B, K, L*D]: of whole clips where it saw them, else of the first mask, or view."""
    if output.whole is not None:
        return output.whole
    return next(iter([*output.context, *output.views]), None)


# ------------------------------------------------------------------------------------------------------- information


def _rows(tokens: Tensor, world: World) -> Tensor:
    """Some of the tokens [B, K, L*D] of all ranks, evenly: [n, L*D]. As many from every rank, whose K may differ."""
    rows = tokens.detach().flatten(0, 1)
    count = min([max(2, MAX_ROWS // world.size), *world.gather_objects(len(rows))])
    chosen = torch.linspace(0, len(rows) - 1, count, device=rows.device).long()
    return world.gather_rows(rows[chosen])


def _by_level(modality: str, prefix: str, rows: Tensor, numbers: Sequence[int]) -> dict[str, Tensor]:
    parts = rows.chunk(len(numbers), dim=-1)
    return {f"{modality}/level{number + 1}/{prefix}": part for number, part in zip(numbers, parts, strict=True)}


def _information(matrices: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """`representation.information` of every matrix, which is the same on all ranks: each is taken by one of them."""
    names = representation.INFORMATION
    device = next(iter(matrices.values())).device if matrices else world.device
    table = torch.zeros(len(matrices), len(names), dtype=torch.float64, device=device)
    for index, rows in enumerate(matrices.values()):
        if index % world.size == world.rank:
            found = representation.information(rows)
            table[index] = torch.stack([found[name].double() for name in names])
    world.sum(table)
    return {f"{where}{name}": table[i, j] for i, where in enumerate(matrices) for j, name in enumerate(names)}


def _lidar(output: Outputs, world: World) -> list[Tensor]:
    """LiDAR by level, of the clips' mean tokens in each view; nothing where a clip has one view, or with one clip."""
    seen = output.views
    if len(seen) < 2:
        return []
    count = min(len(seen[0]), max(1, LIDAR_CLIPS // world.size))
    pooled = torch.stack([tokens[:count].detach().float().mean(dim=1) for tokens in seen], dim=1)  # [n, q, L*D]
    pooled = world.gather_rows(pooled)
    if len(pooled) < 2:
        return []
    return [representation.lidar(level) for level in pooled.chunk(output.num_levels, dim=-1)]


# ---------------------------------------------------------------------------------------------------- predictability


def _predictability(output: Outputs, count: int) -> list[dict[str, Tensor]]:
    """By level of the target: how well it is told from the context, and what of it is mere place."""
    assert output.target is not None
    targets = output.target.detach().chunk(count, dim=-1)
    found = [_places(target, output) for target in targets]
    if output.predicted:
        predictions = output.predicted[0].detach().chunk(count, dim=-1)
        masked = output.masks[0].masked
        for values, predicted, target in zip(found, predictions, targets, strict=True):
            values |= _agreement(predicted, target, masked)
    return found


def _agreement(predicted: Tensor, target: Tensor, masked: Tensor) -> dict[str, Tensor]:
    own = take_tokens(target, masked)  # [B, M, D]
    count = own.shape[0] * own.shape[1]
    some = torch.linspace(0, count - 1, min(count, MAX_ROWS), device=own.device).long()
    found = {
        "target_prediction_cosine": diagnostics.target_prediction_cosine(predicted, own),
        "nmse": representation.prediction_nmse(predicted.flatten(0, 1)[some], own.flatten(0, 1)[some]),
    }
    if len(target) > 1:
        other = take_tokens(target.roll(1, dims=0), masked)
        found["cross_sample_gap"] = diagnostics.cross_sample_gap(predicted, own, other)
    return found


def _places(target: Tensor, output: Outputs) -> dict[str, Tensor]:
    tokens = math.prod(output.grid)
    if len(target) < 2 or tokens < 2 or target.shape[1] != tokens:
        return {}
    chosen = torch.linspace(0, tokens - 1, min(tokens, MOST_PLACES), device=target.device).long()
    positions = grid_positions(output.grid, interpolate=False, device=target.device)[chosen]
    some = target[: max(2, PLACED_ROWS // len(chosen)), chosen]
    return {"position_decodability": representation.position_decodability(some, positions)}
