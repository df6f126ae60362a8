"""What a new run takes from a checkpoint of another: what is trained, and the encoder that follows it.

A frozen teacher is not taken: it is the one that the new recipe names, whatever taught the run before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from vjepa.objectives.average import start
from vjepa.objectives.jepa import JEPA
from vjepa.train import checkpoint
from vjepa.train.distributed import ALONE, World

IN_WORDS = {"target.encoder": "target", "average": "average"}


def load_start(path: Path, objective: JEPA, world: World = ALONE) -> str:
    """Fill an objective, whole or in shards, from a checkpoint; what was taken, in words.

    An EMA target or an average goes on from that of the checkpoint, whichever of the two it has, and begins as the
    encoder where it has neither. Raises CheckpointError where the checkpoint is damaged or does not fit.
    """
    checkpoint.refuse_damaged(path, world)
    parts = {"encoder": objective.encoder, "predictor": objective.predictor, "heads": objective.heads}
    taken: dict[str, nn.Module] = {name: part for name, part in parts.items() if part is not None}
    said = [name for name in taken if name != "heads"]
    follower, wanted, stored = objective.follower, objective.config.exported, exported_of(path, objective)
    if follower is None or stored == "encoder":
        checkpoint.load_modules(path, taken)
    else:
        checkpoint.load_modules(path, taken | {stored: follower})
        said.append(IN_WORDS[stored] if stored == wanted else f"{IN_WORDS[stored]} (as {IN_WORDS[wanted]})")
    words = f"{listed(said)} of {path}"
    if follower is None or stored != "encoder":
        return words
    start(follower, objective.encoder)
    return f"{words}; its {IN_WORDS[wanted]}, which that has not, begins as the encoder"


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def exported_of(path: Path, objective: JEPA) -> str:
    """Which module the run of a checkpoint exports; older checkpoints do not say, and have no average."""
    named = checkpoint.read_meta(path).get("exported")
    if named is not None:
        return named
    return "target.encoder" if objective.config.target == "ema" else "encoder"
