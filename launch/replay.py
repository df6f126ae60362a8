"""Run the batch of a step that was not sound again, and say which clip and which layer it was.

python -m launch.replay RUN/incidents/step_00000123 [--checkpoint STEP] [--precision fp32]

The batch is the one that was kept; the weights are those of the newest checkpoint before the step (those of the step
itself are gone, unless it was skipped right behind a checkpoint). Where they do not show the trouble, the run itself
does: from that checkpoint it repeats the steps bit for bit.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launch.config import RunConfig, load_for_resume
from vjepa.batch import MicroBatch
from vjepa.config import ConfigError
from vjepa.objectives import JEPA, build_objective
from vjepa.objectives.checks import freeze_unused
from vjepa.train import checkpoint
from vjepa.train.incident import read_micro_batches
from vjepa.train.run_dir import RunDir

MOST_CLIPS = 12


@dataclass(frozen=True)
class Replay:
    """What one captured micro-batch gives."""

    loss: float
    grad_norms: dict[str, float]  # of encoder and predictor
    first_non_finite: str | None  # module of the forward pass
    clips: list[tuple[float, str]]  # loss of each clip alone, worst first


def load_objective(run: RunDir, config: RunConfig, step: int, asked: int | None) -> tuple[JEPA, str]:
    """The objective with the weights of the newest, or the asked, checkpoint before `step`; which, in words."""
    objective = build_objective(config.objective, config.model, config.predictor, seed=config.train.seed)
    freeze_unused(objective, list(config.train.batch.as_dict()))
    saved = {number: path for number, path in checkpoint.committed(run.checkpoints) if number < step}
    if asked is not None and asked not in saved:
        raise ConfigError(f"--checkpoint {asked}: {run.checkpoints} has {sorted(saved)} before step {step}")
    if not saved:
        return objective, "the initial weights: there is no checkpoint from before"
    number = max(saved) if asked is None else asked
    checkpoint.load_module(saved[number], objective, "")
    return objective, f"the weights of {saved[number]}, {step - 1 - number} steps before"


def replay(objective: JEPA, micro_batch: MicroBatch, step: int, precision: str) -> Replay:
    """One forward and backward pass of a captured micro-batch, then every clip alone."""
    found: list[str] = []
    with _watching(objective, found):
        loss = _loss(objective, micro_batch, step, precision)
    loss.backward()
    parts = {"encoder": objective.encoder, "predictor": objective.predictor}
    norms = {name: _grad_norm(part) for name, part in parts.items() if part is not None}
    objective.zero_grad(set_to_none=True)
    clips = []
    with torch.no_grad():
        for modality, batch in micro_batch.items():
            for index, key in enumerate(batch.keys):
                alone = _loss(objective, {modality: batch.take(slice(index, index + 1))}, step, precision)
                clips.append((float(alone), f"{modality}:{key}"))
    clips.sort(key=lambda clip: math.inf if math.isnan(clip[0]) else clip[0], reverse=True)
    return Replay(float(loss.detach()), norms, found[0] if found else None, clips)


def _loss(objective: JEPA, micro_batch: MicroBatch, step: int, precision: str) -> Tensor:
    device = next(objective.parameters()).device
    on_device = {modality: batch.to(device) for modality, batch in micro_batch.items()}
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        return objective(on_device, step).loss


def _grad_norm(module: nn.Module) -> float:
    return float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]))


@contextmanager
def _watching(objective: nn.Module, found: list[str]) -> Iterator[None]:
    """Collect the names of modules without parts whose output is not finite, in the order in which they run."""

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return hook

    leaves = [(name, part) for name, part in objective.named_modules() if not list(part.children())]
    handles = [part.register_forward_hook(look(name)) for name, part in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def describe(source: Path, result: Replay) -> str:
    """A replay in words: the loss, where it breaks, and the clips with the largest losses."""
    norms = ", ".join(f"{name} {norm:.4g}" for name, norm in result.grad_norms.items())
    lines = [f"{source.name}: loss {result.loss:.6g}; gradient norms: {norms}"]
    if result.first_non_finite is not None:
        lines.append(f"  first output that is not finite: {result.first_non_finite}")
    lines += [f"  {loss:10.6g}  {key}" for loss, key in result.clips[:MOST_CLIPS]]
    if len(result.clips) > MOST_CLIPS:
        lines.append(f"  and {len(result.clips) - MOST_CLIPS} clips with smaller losses")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.replay", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("incident", type=Path, help="RUN/incidents/step_N")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="take these weights; default: the newest before")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: the run's")
    arguments = parser.parse_args(argv)
    try:
        return _replay_all(arguments.incident, arguments.checkpoint, arguments.precision)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _replay_all(folder: Path, asked: int | None, precision: str | None) -> int:
    files = sorted(folder.glob("rank_*.pt"))
    if not (folder / "incident.json").is_file() or not files:
        raise ConfigError(
            f"{folder} is no incident with a kept batch (RUN/incidents/step_N with incident.json, rank_*.pt)"
        )
    told = json.loads((folder / "incident.json").read_text())
    run = RunDir(folder.resolve().parents[1])
    config = load_for_resume(run.config, [])
    precision = precision or config.train.precision
    objective, weights = load_objective(run, config, told["step"], asked)
    print(f"step {told['step']}: {told['what']}\nreplayed in {precision} with {weights}")
    is_seen = False
    for path in files:
        for micro_batch in read_micro_batches(path):
            result = replay(objective, micro_batch, told["step"] - 1, precision)
            is_seen |= not all(map(math.isfinite, (result.loss, *result.grad_norms.values())))
            print(describe(path, result))
    if told["kind"] == "non_finite":
        print("not finite again" if is_seen else "finite with these weights: the trouble lies in the steps between")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
