"""What is kept of a step that was not sound: its numbers, its samples, and the batch itself, to be replayed.

RUN/incidents/step_00000123/  incident.json  rank_3.pt  (python -m launch.replay RUN/incidents/step_00000123)
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjepa.batch import Batch, Mask, MicroBatch, Modality
from vjepa.train.distributed import World
from vjepa.train.health import NonFiniteError, SpikeError, Trouble, UnsoundStepError

log = logging.getLogger(__name__)
CPU = torch.device("cpu")
MOST_KEYS_NAMED = 12
MOST_CAPTURED = 5  # incidents of a run whose batches are kept
REMEDIES = {
    "non_finite": "look at these samples, lower train.optim.lr.peak or set train.optim.clip_grad, and --resume",
    "spike": "look at these samples, lower train.optim.lr.peak, raise train.health.spike_std, and --resume",
}


def incident_folder(run: Path, step: int) -> Path:
    return run / "incidents" / f"step_{step:08d}"


def note_incident(
    run: Path,
    trouble: Trouble,
    micro_batches: Sequence[MicroBatch],
    loss: float,
    values: Mapping[str, float],
    world: World,
) -> UnsoundStepError:
    """Write down a step that was not sound, collectively; the error that says so.

    `loss` is this rank's own. The ranks to blame, whose batches are kept, are those whose loss is not finite; where
    all are, because the gradient alone is not or the loss has jumped, the one with the largest.
    """
    folder = incident_folder(run, trouble.step)
    keys = [f"{batch.modality}:{key}" for micro in micro_batches for batch in micro.values() for key in batch.keys]
    everyone = world.gather_objects((loss, keys))
    blamed = {rank: keys for rank, (value, keys) in enumerate(everyone) if not math.isfinite(value)}
    if not blamed:
        worst = max(range(len(everyone)), key=lambda rank: everyone[rank][0])
        blamed = {worst: everyone[worst][1]}
    told = asdict(trouble) | {"keys": blamed, "values": {name: repr(value) for name, value in values.items()}}
    kept = len(list(folder.parent.glob("*/rank_*.pt"))) if folder.parent.is_dir() else 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if world.is_main:
            (folder / "incident.json").write_text(json.dumps(told, indent=2) + "\n")
        if world.rank in blamed and kept < MOST_CAPTURED:
            write_micro_batches(folder / f"rank_{world.rank}.pt", micro_batches, world.device)
    except (OSError, RuntimeError) as error:  # the step is what counts; a full disk must not hide it
        log.warning("%s could not be written: %s", folder, error)
    named = ", ".join(key for keys in blamed.values() for key in keys[:MOST_KEYS_NAMED])
    kind = NonFiniteError if trouble.kind == "non_finite" else SpikeError
    return kind(
        f"step {trouble.step}: {trouble.what}, on rank(s) {sorted(blamed)}, with samples {named} (all of them, and the "
        f"batch, in {folder}; look into it with `python -m launch.replay {folder}`). The last checkpoint is from "
        f"before; {REMEDIES[trouble.kind]}"
    )


def write_micro_batches(path: Path, micro_batches: Sequence[MicroBatch], device: torch.device = CPU) -> None:
    """Pixels, masks and names of micro-batches, as plain tensors and numbers; views made on `device` are made there."""
    torch.save(
        [{modality: _plain(batch, device) for modality, batch in micro.items()} for micro in micro_batches], path
    )


def read_micro_batches(path: Path) -> list[MicroBatch]:
    """What `write_micro_batches` wrote."""
    stored = torch.load(path, weights_only=True)
    return [{modality: _batch(modality, fields) for modality, fields in micro.items()} for micro in stored]


def _plain(batch: Batch, device: torch.device) -> dict[str, Any]:
    return {
        "step": batch.step,
        "ordinals": list(batch.ordinals),
        "keys": list(batch.keys),
        "views": [view if isinstance(view, Tensor) else view.to(device).cpu() for view in batch.views],
        "masks": [(mask.context, mask.masked, mask.context_of) for mask in batch.masks],
        "grid": list(batch.grid),
        "num_global": batch.num_global,
        "view_contexts": list(batch.view_contexts),
    }


def _batch(modality: Modality, fields: Mapping[str, Any]) -> Batch:
    t, h, w = fields["grid"]
    return Batch(
        modality=modality,
        step=fields["step"],
        ordinals=tuple(fields["ordinals"]),
        keys=tuple(fields["keys"]),
        views=tuple(fields["views"]),
        masks=tuple(Mask(*mask) for mask in fields["masks"]),
        grid=(t, h, w),
        num_global=fields.get("num_global", 0),  # older files have neither
        view_contexts=tuple(fields.get("view_contexts", ())),
    )
