"""Kill a debug run at random moments, resume it each time, and compare its numbers with an uninterrupted run's.

python -m tests.benchmarks.kill_and_resume [--kills 10] [--seed 0] [--command submit|train] [--folder DIR]

The moments: during start-up, between two steps, in the middle of a checkpoint's save, and after the last save. Each
second kill is of the started process alone (its children must die with it), the others of the whole process group.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.campaign import (
    CampaignError,
    changed,
    check_resume,
    compare,
    complete,
    kill,
    last_logged,
    newest_checkpoint,
    poll,
    rows_of,
    start,
)

COMMANDS = {
    "submit": (sys.executable, "launch/submit.py", "--stage", "primary", "--recipe", "debug"),
    "train": (sys.executable, "-m", "launch.train", "--recipe", "debug"),
}
MOMENTS = ("start-up", "step", "save")
START_UP_S = 4.0  # no run is that soon at its end


@dataclass(frozen=True)
class Kill:
    """One life of the run and the kill that ended it."""

    resumed_from: int | None  # step it said it resumed from; None where it was killed before it could say
    moment: str
    whole_group: bool
    logged: int  # last step in metrics.jsonl when all processes were dead
    newest: int  # newest complete checkpoint then, 0 for none
    was_saving: bool  # an unfinished checkpoint was left
    seconds_to_die: float  # until the last process was gone

    def __str__(self) -> str:
        begun = "not begun" if self.resumed_from is None else f"from step {self.resumed_from:2d}"
        target = "group  " if self.whole_group else "process"
        saving = ", a save cut short" if self.was_saving else ""
        return (
            f"{begun}; {target} killed at {self.moment:<8}: all gone after {self.seconds_to_die:.2f} s, logged to step "
            f"{self.logged:2d}, newest checkpoint {self.newest:2d}{saving}"
        )


def kill_and_resume(
    run_dir: Path,
    kills: int,
    seed: int,
    command: Sequence[str] = COMMANDS["submit"],
    *,
    reference: Path | None = None,
    overrides: Sequence[str] = ("train.steps=40",),
    moments: Sequence[str] = MOMENTS,
    say: Callable[[str], None] = print,
) -> list[Kill]:
    """Run in `run_dir` with `kills` kills, compare with the run in `reference` (made here if None); the kills.

    Raises CampaignError on a survivor, a resume from another than the newest complete checkpoint, a step missing or
    logged twice, any number that differs, or weights that differ.
    """
    if reference is None:
        reference = run_dir.with_name(run_dir.name + "_uninterrupted")
        complete(start(command, reference, overrides))
    rng = random.Random(seed)
    done: list[Kill] = []
    newest = 0
    for number in range(kills):
        started = time.time()
        process = start(command, run_dir, [*overrides, *(["--resume"] if done else [])])
        is_last = number == kills - 1 and kills > len(moments)
        moment = "end" if is_last else moments[number % len(moments)]
        _wait_for(moment, run_dir, process, started, newest + rng.randint(3, 11), rng)
        output, seconds = kill(process, whole_group=bool(number % 2))
        output += _job_logs(run_dir, started)
        resumed = check_resume(output, newest, may_be_silent=moment == "start-up") if done else 0
        newest = newest_checkpoint(run_dir)
        was_saving = any((run_dir / "checkpoints").glob("*.partial"))
        done.append(Kill(resumed, moment, bool(number % 2), last_logged(run_dir), newest, was_saving, seconds))
        say(f"{number + 1:2d}. {done[-1]}")
    output = complete(start(command, run_dir, [*overrides, "--resume"]))
    check_resume(output, newest)
    compare(run_dir, reference)
    return done


def _job_logs(run_dir: Path, since: float) -> str:
    """What jobs have written since: submit.py may have been killed before it relayed it."""
    return "".join(log.read_text() for log in run_dir.glob("job/**/*_log.out") if log.stat().st_mtime > since)


def _wait_for(
    moment: str, run_dir: Path, process: subprocess.Popen[str], started: float, step: int, rng: random.Random
) -> None:
    """Return at a random time in the moment; what was written before `started` is of an earlier life."""
    if moment == "start-up":
        time.sleep(rng.uniform(0.2, START_UP_S))
    elif moment == "step":
        metrics = run_dir / "metrics.jsonl"
        poll(process, lambda: changed(metrics) > started and last_logged(run_dir) >= step)
        time.sleep(rng.uniform(0, 0.05))
    elif moment == "save":
        saves = run_dir / "checkpoints"
        poll(process, lambda: max(map(changed, saves.glob("*.partial")), default=0.0) > started)
        time.sleep(rng.uniform(0, 0.03))
    else:
        poll(process, lambda: newest_checkpoint(run_dir) == 40)
        time.sleep(rng.uniform(0, 0.05))
    if process.poll() is not None:
        raise CampaignError(f"the run ended by itself before the kill at {moment}:\n{complete(process)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", choices=COMMANDS, default="submit")
    parser.add_argument("--folder", type=Path, help="where the two runs go; a temporary folder by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        started = time.monotonic()
        kill_and_resume(folder / "killed", arguments.kills, arguments.seed, COMMANDS[arguments.command])
        count = len(rows_of(folder / "killed"))
        print(
            f"{arguments.kills} kills of `{' '.join(COMMANDS[arguments.command][1:])}`: {count} steps, each logged "
            "once, every number and the weights bit for bit those of the uninterrupted run "
            f"({time.monotonic() - started:.0f} s)"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
