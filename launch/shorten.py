"""A recipe at another length: what it counts in steps keeps its share of the run."""

from __future__ import annotations

from launch.config import RunConfig
from vjepa.objectives.terms import build_terms

RAMPS = ("warmup_start", "warmup_end")  # settings of terms that are steps


def at_length(config: RunConfig, steps: int) -> list[str]:
    """Overrides that give a configuration `steps` steps and scale what it counts in them.

    Scaled: warm-up of the learning rate, ramps of terms, warm-up of alarms, intervals of diagnostics and checkpoints.
    Not scaled: what has a time scale of its own, such as the momentum of the target.
    """
    train = config.train
    counts = {
        "train.optim.lr.warmup_steps": train.optim.lr.warmup_steps,
        "train.alarms.warmup_steps": train.alarms.warmup_steps,
        "train.diagnostics_every": train.diagnostics_every,
        "train.checkpoint.every": train.checkpoint.every,
    }
    for name, term in build_terms(config.objective.terms).items():
        counts |= {f"objective.terms.{name}.{ramp}": getattr(term, ramp) for ramp in RAMPS if hasattr(term, ramp)}
    scaled = {key: round(count * steps / train.steps) for key, count in counts.items()}
    for key in ("train.diagnostics_every", "train.checkpoint.every"):
        scaled[key] = max(1, scaled[key])
    return [f"train.steps={steps}", *(f"{key}={count}" for key, count in scaled.items())]
