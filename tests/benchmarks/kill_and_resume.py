"""Kill a debug run at random moments, resume it each time, and compare its numbers with an uninterrupted run's.

python tests/benchmarks/kill_and_resume.py [--kills 10] [--seed 0] [--command submit|train] [--folder DIR]

The moments: during start-up, between two steps, in the middle of a checkpoint's save, and after the last save. Each
second kill is of the started process alone (its children must die with it), the others of the whole process group.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
COMMANDS = {
    "submit": (sys.executable, "launch/submit.py", "--stage", "primary", "--recipe", "debug"),
    "train": (sys.executable, "-m", "launch.train", "--recipe", "debug"),
}
# The only numbers that may differ.
TIMINGS = {"step_seconds", "data_wait", "clips_per_second", "tokens_per_second", "tflops_per_second"}
MOMENTS = ("start-up", "step", "save")
DEATH_PATIENCE_S = 10.0
RUN_PATIENCE_S = 240.0
START_UP_S = 4.0  # no run is that soon at its end


class CampaignError(AssertionError):
    """The run did not do what a killed run must do; the message says what and shows its output."""


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
        resumed = _check_resume(output, newest, may_be_silent=moment == "start-up") if done else 0
        newest = newest_checkpoint(run_dir)
        was_saving = any((run_dir / "checkpoints").glob("*.partial"))
        done.append(Kill(resumed, moment, bool(number % 2), last_logged(run_dir), newest, was_saving, seconds))
        say(f"{number + 1:2d}. {done[-1]}")
    output = complete(start(command, run_dir, [*overrides, "--resume"]))
    _check_resume(output, newest)
    compare(run_dir, reference)
    return done


def _job_logs(run_dir: Path, since: float) -> str:
    """What jobs have written since: submit.py may have been killed before it relayed it."""
    return "".join(log.read_text() for log in run_dir.glob("job/**/*_log.out") if log.stat().st_mtime > since)


def _check_resume(output: str, newest: int, *, may_be_silent: bool = False) -> int | None:
    match = re.search(r"resumed from step (\d+)", output)
    if match is None and may_be_silent:
        return None
    if match is None or int(match[1]) != newest:
        raise CampaignError(f"the newest complete checkpoint is of step {newest}, but the run said:\n{output}")
    return newest


def start(command: Sequence[str], run_dir: Path, arguments: Sequence[str]) -> subprocess.Popen[str]:
    """The command in a session of its own, so that its processes can be counted; its output goes to a pipe."""
    return subprocess.Popen(
        [*command, f"run_dir={run_dir}", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def complete(process: subprocess.Popen[str], *, status: int = 0) -> str:
    """The output of a process that must end with `status`."""
    try:
        output, _ = process.communicate(timeout=RUN_PATIENCE_S)
    except subprocess.TimeoutExpired as error:
        kill(process, whole_group=True)
        raise CampaignError(f"{process.args} did not end in {RUN_PATIENCE_S:.0f} s") from error
    if process.returncode != status:
        raise CampaignError(f"{process.args} ended with {process.returncode}, not {status}:\n{output}")
    return output


def kill(process: subprocess.Popen[str], *, whole_group: bool) -> tuple[str, float]:
    """SIGKILL; what was printed, and the seconds until no process of its session lived. CampaignError on a survivor."""
    if whole_group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    killed = time.monotonic()
    while survivors := session_members(process.pid):
        if time.monotonic() - killed > DEATH_PATIENCE_S:
            os.killpg(process.pid, signal.SIGKILL)
            raise CampaignError(f"{survivors} outlived the process the user started by {DEATH_PATIENCE_S:.0f} s")
        time.sleep(0.01)
    seconds = time.monotonic() - killed
    return process.communicate()[0], seconds


def session_members(session: int) -> list[str]:
    """Living processes of a session, as `pid command`; zombies are dead."""
    members = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                _, _, rest = (folder / "stat").read_text().rpartition(") ")
                state, _, _, found = rest.split()[:4]
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it has gone since
            if int(found) == session and state not in "ZX":
                members.append(f"{folder.name} {command}")
    return members


def _wait_for(
    moment: str, run_dir: Path, process: subprocess.Popen[str], started: float, step: int, rng: random.Random
) -> None:
    """Return at a random time in the moment; what was written before `started` is of an earlier life."""
    if moment == "start-up":
        time.sleep(rng.uniform(0.2, START_UP_S))
    elif moment == "step":
        metrics = run_dir / "metrics.jsonl"
        _poll(process, lambda: _changed(metrics) > started and last_logged(run_dir) >= step)
        time.sleep(rng.uniform(0, 0.05))
    elif moment == "save":
        saves = run_dir / "checkpoints"
        _poll(process, lambda: max(map(_changed, saves.glob("*.partial")), default=0.0) > started)
        time.sleep(rng.uniform(0, 0.03))
    else:
        _poll(process, lambda: newest_checkpoint(run_dir) == 40)
        time.sleep(rng.uniform(0, 0.05))
    if process.poll() is not None:
        raise CampaignError(f"the run ended by itself before the kill at {moment}:\n{complete(process)}")


def _changed(path: Path) -> float:
    """When a file or folder was last changed; 0 where there is none."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _poll(process: subprocess.Popen[str], is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + RUN_PATIENCE_S
    while not is_so():
        if process.poll() is not None or time.monotonic() > deadline:
            output = process.stdout.read() if process.poll() is not None and process.stdout else ""
            raise CampaignError(f"the moment to kill never came; status {process.returncode}\n{output}")
        time.sleep(0.0005)


def rows_of(run_dir: Path) -> list[dict[str, float]]:
    """All whole rows of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def last_logged(run_dir: Path) -> int:
    rows = rows_of(run_dir)
    return int(rows[-1]["step"]) if rows else 0


def newest_checkpoint(run_dir: Path) -> int:
    """The newest complete checkpoint's step, 0 for none: by the format (DESIGN 6), not by the code under test."""
    found = [int(path.parent.name[5:]) for path in run_dir.glob("checkpoints/step_*/COMMITTED") if is_final(path)]
    return max(found, default=0)


def is_final(committed: Path) -> bool:
    return committed.parent.name[5:].isdigit()


def numbers(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name not in TIMINGS}


def compare(run_dir: Path, reference: Path) -> None:
    """Raises CampaignError unless both runs logged the same steps once each, the same numbers, and the same weights."""
    found, wanted = rows_of(run_dir), rows_of(reference)
    steps = [row["step"] for row in found]
    if steps != [row["step"] for row in wanted] or steps != list(range(1, len(steps) + 1)):
        raise CampaignError(f"steps logged: {steps}")
    for mine, theirs in zip(found, wanted, strict=True):
        if numbers(mine) != numbers(theirs):
            different = {k: (mine.get(k), theirs.get(k)) for k in mine | theirs if mine.get(k) != theirs.get(k)}
            raise CampaignError(f"step {mine['step']} differs: {different}")
    weights = "exports/primary/model.safetensors"
    if (run_dir / weights).read_bytes() != (reference / weights).read_bytes():
        raise CampaignError("the exported weights differ")
    if left := list(run_dir.glob("**/*.partial")):
        raise CampaignError(f"left behind: {left}")


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
