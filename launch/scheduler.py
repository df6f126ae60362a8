"""SLURM's own commands as functions. What a job's state is, only SLURM says: nothing here is cached.

The standard library alone: the supervisor of a job runs this within a second.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

FINISHED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "TIMEOUT")
"""States that a job does not leave; after NODE_FAIL and PREEMPTED it may be requeued."""
NO_ANSWER = ("Unable to contact", "Could not establish a configuration source", "Socket timed out", "not responding")
TIMEOUT_S = 60.0  # of one command; a busy controller answers late


class SchedulerError(RuntimeError):
    """A command of SLURM's that failed or did not answer; the message has its own words."""


class NoAnswerError(SchedulerError):
    """The controller does not answer now: it is busy, or is being restarted."""


@dataclass(frozen=True)
class JobState:
    """A job, or one element of an array, as squeue shows it now."""

    job: str  # 17, or 17_3 for an element
    name: str
    state: str  # PENDING, RUNNING, COMPLETED, ...
    reason: str  # why it is pending, or how it ended
    nodes: str  # as SLURM writes them: tn[1-2]
    start: str  # of the running segment, or expected; N/A
    time_left: str  # until the time limit


@dataclass(frozen=True)
class Segment:
    """One start of a job, from SLURM's accounting."""

    job: str
    state: str  # REQUEUED, PREEMPTED, COMPLETED, CANCELLED by 0, ...
    elapsed_s: int
    resources: dict[str, str]  # of what was allocated: cpu, mem, node, gres/gpu
    start: str
    end: str
    nodes: str
    exit_code: str  # STATUS:SIGNAL

    @property
    def gpu_seconds(self) -> int:
        return self.elapsed_s * int(self.resources.get("gres/gpu", "0"))


def is_there() -> bool:
    return shutil.which("sbatch") is not None


def queue(jobs: Sequence[str]) -> list[JobState]:
    """Every job, or array element, that the controller still remembers; none for the others."""
    rows = []
    for job in jobs:  # one by one: a single id that is forgotten makes squeue refuse a list
        command = ["squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%i|%j|%T|%r|%N|%S|%L"]
        done = _run(command)
        if done.returncode and "Invalid job id" not in done.stderr:
            raise _error(command, done)
        rows += [JobState(*line.split("|")) for line in done.stdout.splitlines()]
    return rows


def accounting(jobs: Sequence[str]) -> list[Segment]:
    """One row for every start of the jobs, requeued ones included; a second or more behind the queue."""
    if not jobs:
        return []
    fields = "JobID,State,ElapsedRaw,AllocTRES,Start,End,NodeList,ExitCode"
    text = ask("sacct", "-D", "-X", "-P", "-n", "-j", ",".join(jobs), "-o", fields)
    return [_segment(line) for line in text.splitlines()]


def _segment(line: str) -> Segment:
    job, state, elapsed, resources, start, end, nodes, exit_code = line.split("|")
    amounts = dict(entry.split("=", 1) for entry in resources.split(",") if "=" in entry)
    return Segment(job, state, int(elapsed or 0), amounts, start, end, nodes, exit_code)


def describe(job: str, *, outside: bool = False) -> dict[str, str]:
    """All that `scontrol show job` says, by SLURM's own names; `outside` as in `ask`."""
    words = ask("scontrol", "-o", "show", "job", _alone(job), outside=outside).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def host_names(nodes: str, *, outside: bool = False) -> list[str]:
    """tn[1-2] -> tn1, tn2; `outside` as in `ask`."""
    return ask("scontrol", "show", "hostnames", nodes, outside=outside).split()


def down_nodes(nodes: Sequence[str]) -> list[str]:
    """Those that SLURM cannot reach now."""
    if not nodes:
        return []
    states = "down,no_respond,fail"
    return sorted(set(ask("sinfo", "-h", "-N", "-n", ",".join(nodes), "-t", states, "-o", "%N").split()))


def cancel(jobs: Sequence[str]) -> None:
    if jobs:
        ask("scancel", *jobs)


def requeue(job: str) -> None:
    """Put a running job back into the queue; safe inside that very job, whose end SLURM begins at once."""
    ask("scontrol", "requeue", _alone(job), outside=True)


def _alone(job: str) -> str:
    """An element of an array by the name that means it alone: one element's plain number is that of the whole array."""
    return os.environ.get("VJEPA_ELEMENT", job) if job == os.environ.get("SLURM_JOB_ID") else job


def exclude(job: str, nodes: Sequence[str]) -> None:
    """Never again on `nodes`, for a job that was requeued: SLURM refuses it for a running one.

    The job keeps its id, and so its dependants. Holding it first would be safer against a start in between, but a
    supervisor that is killed then would leave it held for ever; and while the supervisor lives the job cannot start.
    SLURM is ending the supervisor's processes by now, the commands that it runs among them.
    """
    excluded = describe(job, outside=True).get("ExcNodeList", "(null)")
    before = [] if excluded == "(null)" else host_names(excluded, outside=True)
    names = ",".join(dict.fromkeys([*before, *nodes]))
    ask("scontrol", "update", f"JobId={_alone(job)}", f"ExcNodeList={names}", outside=True)


def test_only(script: Path | str, *options: str) -> tuple[bool | None, str]:
    """Whether the request of a job script can start on this cluster, and SLURM's own words; None: nobody answered."""
    done = _run(["sbatch", "--test-only", *options, str(script)])
    words = [line.removeprefix("sbatch: ") for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    text = "; ".join(words)
    if done.returncode == 0:
        return True, text
    return None if any(sign in text for sign in NO_ANSWER) else False, text


def ask(*command: str, environment: Mapping[str, str] | None = None, outside: bool = False) -> str:
    """What one of SLURM's commands prints; SchedulerError where it fails.

    `outside`: by a process that outlives what SLURM does to the one that asks.
    """
    options = {"start_new_session": True, "preexec_fn": _ignore_end} if outside else {}
    done = _run(command, environment=environment, **options)
    if done.returncode:
        raise _error(command, done)
    return done.stdout.strip()


def _ignore_end() -> None:
    for signum in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)


def _run(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None, **options: object
) -> subprocess.CompletedProcess[str]:
    """Run a command with an empty stdin and in plain English; SchedulerError where it is not there or hangs."""
    try:
        return subprocess.run(  # pyright: ignore[reportCallIssue]
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=dict(os.environ if environment is None else environment) | {"LC_ALL": "C"},
            **options,  # pyright: ignore[reportArgumentType]
        )
    except FileNotFoundError as error:
        raise SchedulerError(f"{command[0]} is not on PATH: is this a machine of the SLURM cluster?") from error
    except subprocess.TimeoutExpired as error:
        raise NoAnswerError(f"{' '.join(command)}: no answer within {TIMEOUT_S:g} s") from error


def _error(command: Sequence[str], done: subprocess.CompletedProcess[str]) -> SchedulerError:
    words = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
    kind = NoAnswerError if any(sign in words for sign in NO_ANSWER) else SchedulerError
    return kind(f"{' '.join(command)}: {words}")
