"""What each of two ranks does when things go wrong; run by torchrun, see test_two_ranks.py.

Every scenario is a whole run; they share one process group, which shows that the ranks stay in step when they stop.
The outcomes of a rank go to OUT/rankN.json.
"""

import contextlib
import io
import json
import os
import sys
from collections.abc import Container, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from launch.config import load_config
from launch.train import run
from tests.train.elastic import digest
from vjepa.objectives.terms import MaskedPrediction, Outputs
from vjepa.train import run_dir
from vjepa.train.distributed import leave_process
from vjepa.train.signals import StopFlag
from vjepa.train.trainer import Trainer


def attempt(folder: Path, *overrides: str, resume: bool = False) -> tuple[int, str]:
    """Exit status and what was said on stderr."""
    shards = [f"data.{modality}.sources.debug.path={sys.argv[2]}" for modality in ("video", "image")]
    config = load_config(
        "debug", "primary", ["data.workers=0", "train.steps=20", f"run_dir={folder}", *shards, *overrides]
    )
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        status = run(config, resume=resume)
    return status, errors.getvalue()


@contextlib.contextmanager
def poisoned(rank: int, steps: Container[int]) -> Iterator[None]:
    """Make the loss of one rank not finite in some steps, counted from 1 within this context."""
    term, calls = MaskedPrediction.__call__, 0

    def poison(self: MaskedPrediction, outputs: Outputs) -> Tensor:
        nonlocal calls
        calls += outputs.modality == "video"
        is_hit = int(os.environ["RANK"]) == rank and calls in steps
        return term(self, outputs) * (torch.nan if is_hit else 1.0)

    MaskedPrediction.__call__ = poison
    yield
    MaskedPrediction.__call__ = term


@contextlib.contextmanager
def noting_weights(found: list[str]) -> Iterator[None]:
    """Note a digest of this rank's own copy of everything that was trained, at the end of each run."""
    fit = Trainer.fit

    def noted(self: Trainer, stop: StopFlag) -> None:
        fit(self, stop)
        found.append(digest(self.objective.state_dict()))

    Trainer.fit = noted
    yield
    Trainer.fit = fit


def main() -> None:
    out, rank = Path(sys.argv[1]), os.environ["RANK"]
    run_dir.LOCK_PATIENCE_S = 0.5
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    leave = dist.destroy_process_group
    dist.init_process_group = dist.destroy_process_group = lambda *arguments, **keywords: None
    outcomes = {
        "resumed": attempt(out / "one_process", resume=True),
        "existing": attempt(out / "one_process"),
        "held": attempt(out / "held", resume=True),
        "uneven": attempt(out / "uneven", "train.batch.video=13", "mask.group.video=13"),
    }
    with poisoned(rank=1, steps=range(3, 100)):
        outcomes["poisoned"] = attempt(out / "poisoned")
    digests: list[str] = []
    for policy in ("skip", "roll_back"):
        with poisoned(rank=1, steps=[8]), noting_weights(digests):
            outcomes[policy] = attempt(out / policy, f"train.health.non_finite={policy}")
    outcomes["weights"] = (0, " ".join(digests))
    (out / f"rank{rank}.json").write_text(json.dumps(outcomes))
    leave()
    leave_process(0)


if __name__ == "__main__":
    main()
