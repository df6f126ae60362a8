"""What campaigns of kills and faults share: processes, what a run left on the disk, and the comparison of two runs.

Runs are seen from outside only: the command line, the process table and the documented format (DESIGN 6).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# The only numbers that may differ.
TIMINGS = {"step_seconds", "data_wait", "clips_per_second", "tokens_per_second", "tflops_per_second"}
TIMED = "data/"  # what the data cost, counted from where a process began or went on
DEATH_PATIENCE_S = 60.0  # on a busy machine
RUN_PATIENCE_S = 600.0


class CampaignError(AssertionError):
    """The run did not do what it must do after a fault; the message says what and shows its output."""


# ------------------------------------------------------------------------------------------------------- its processes


@dataclass(frozen=True)
class Entry:
    """A living process in the process table."""

    pid: int
    parent: int
    session: int
    command: str

    def __str__(self) -> str:
        return f"{self.pid} {self.command}"


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
    """SIGKILL; what was printed, and the seconds until none of its processes lived. CampaignError on a survivor."""
    sessions = sessions_of(process.pid)
    if whole_group:
        kill_sessions(sessions)
    else:
        process.kill()
    return await_death(process, sessions, DEATH_PATIENCE_S)


def await_death(process: subprocess.Popen[str], sessions: set[int], patience: float) -> tuple[str, float]:
    """Wait until no process of the sessions lives; what was printed, and the seconds. CampaignError on a survivor."""
    begun = time.monotonic()
    while survivors := session_members(*sessions):
        if time.monotonic() - begun > patience:
            kill_sessions(sessions)
            output = process.communicate()[0]
            raise CampaignError(f"{list(map(str, survivors))} still lived after {patience:.0f} s:\n{output}")
        time.sleep(0.01)
    seconds = time.monotonic() - begun
    return process.communicate()[0], seconds


def kill_sessions(sessions: set[int]) -> None:
    """SIGKILL to every process of the sessions; each is led by the process whose number it bears."""
    for session in sessions:
        try:
            os.killpg(session, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it has gone since


def sessions_of(pid: int) -> set[int]:
    """The session of a process and those of its descendants: torchrun gives each of its ranks one of its own."""
    entries = list(_process_table())
    family, size = {pid}, 0
    while len(family) > size:
        size = len(family)
        family |= {entry.pid for entry in entries if entry.parent in family}
    return {pid} | {entry.session for entry in entries if entry.pid in family}


def session_members(*sessions: int) -> list[Entry]:
    """Living processes of these sessions."""
    return [entry for entry in _process_table() if entry.session in sessions]


def _process_table() -> Iterator[Entry]:
    """All living processes; zombies are dead."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                _, _, rest = (folder / "stat").read_text().rpartition(") ")
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it has gone since
            state, parent, _, session = rest.split()[:4]
            if state not in "ZX":
                yield Entry(int(folder.name), int(parent), int(session), command)


def poll(process: subprocess.Popen[str], is_so: Callable[[], bool]) -> None:
    """Return as soon as `is_so`; CampaignError where the process ends first or it never is."""
    deadline = time.monotonic() + RUN_PATIENCE_S
    while not is_so():
        if process.poll() is not None or time.monotonic() > deadline:
            output = process.stdout.read() if process.poll() is not None and process.stdout else ""
            raise CampaignError(f"the moment for the fault never came; status {process.returncode}\n{output}")
        time.sleep(0.0005)


# ------------------------------------------------------------------------------------------------------ what it leaves


def changed(path: Path) -> float:
    """When a file or folder was last changed; 0 where there is none."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def rows_of(run_dir: Path) -> list[dict[str, float]]:
    """All whole rows of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def last_logged(run_dir: Path) -> int:
    rows = rows_of(run_dir)
    return int(rows[-1]["step"]) if rows else 0


def checkpoints_of(run_dir: Path) -> dict[int, Path]:
    """Complete checkpoints by step, oldest first: by the format (DESIGN 6), not by the code under test."""
    found = (path.parent for path in run_dir.glob("checkpoints/step_*/COMMITTED"))
    return dict(sorted((int(path.name[5:]), path) for path in found if path.name[5:].isdigit()))


def newest_checkpoint(run_dir: Path) -> int:
    """The newest complete checkpoint's step, 0 for none."""
    return max(checkpoints_of(run_dir), default=0)


def is_intact(path: Path) -> bool:
    """Whether every file of a checkpoint has the content that its manifest names."""
    lines = [line.split("  ", 1) for line in (path / "manifest.sha256").read_text().splitlines()]
    return bool(lines) and all((path / name).is_file() and sha256(path / name) == digest for digest, name in lines)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_resume(output: str, newest: int, *, may_be_silent: bool = False) -> int | None:
    """The step the run says it resumed from, which must be `newest`; None where it was killed before it could say."""
    match = re.search(r"resumed from step (\d+)", output)
    if match is None and may_be_silent:
        return None
    if match is None or int(match[1]) != newest:
        raise CampaignError(f"the newest intact checkpoint is of step {newest}, but the run said:\n{output}")
    return newest


def numbers(row: dict[str, float]) -> dict[str, float]:
    """All that is logged but what may differ."""
    return {name: value for name, value in row.items() if name not in TIMINGS and not name.startswith(TIMED)}


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
