"""What each of two ranks does when things go wrong; run by torchrun, see test_two_ranks.py.

Every scenario is a whole run; they share one process group, which shows that the ranks stay in step when they stop.
The outcomes of a rank go to OUT/rankN.json.
"""

import contextlib
import io
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from launch.config import load_config
from launch.train import run
from vjepa.objectives.terms import MaskedPrediction
from vjepa.train import run_dir
from vjepa.train.distributed import leave_process


def attempt(folder: Path, *overrides: str, resume: bool = False) -> tuple[int, str]:
    """Exit status and what was said on stderr."""
    shards = [f"data.{modality}.sources.debug.path={sys.argv[2]}" for modality in ("video", "image")]
    config = load_config(
        "debug", "primary", ["data.workers=0", "train.steps=20", f"run_dir={folder}", *shards, *overrides]
    )
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        status = run(config, resume=resume)
    return status, errors.getvalue()


def poison(rank: int, step: int) -> None:
    """Make the loss of one rank not finite from one step on."""
    term, calls = MaskedPrediction.__call__, 0

    def poisoned(self: MaskedPrediction, outputs):
        nonlocal calls
        calls += outputs.modality == "video"
        is_hit = int(os.environ["RANK"]) == rank and calls >= step
        return term(self, outputs) * (torch.nan if is_hit else 1.0)

    MaskedPrediction.__call__ = poisoned


def main() -> None:
    out, rank = Path(sys.argv[1]), os.environ["RANK"]
    run_dir.LOCK_PATIENCE_S = 0.5
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    leave = dist.destroy_process_group
    dist.init_process_group = dist.destroy_process_group = lambda *arguments, **keywords: None
    outcomes = {
        "resumed": attempt(out / "one_process", resume=True),
        "existing": attempt(out / "one_process"),
        "held": attempt(out / "held", resume=True),
        "uneven": attempt(out / "uneven", "train.batch.video=13", "mask.group.video=13"),
    }
    poison(rank=1, step=3)
    outcomes["poisoned"] = attempt(out / "poisoned")
    (out / f"rank{rank}.json").write_text(json.dumps(outcomes))
    leave()
    leave_process(0)


if __name__ == "__main__":
    main()
