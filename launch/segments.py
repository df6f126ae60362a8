"""How the starts of a job end: what its ranks leave, what is written down, and what follows from it.

A segment is one start of a job. Its ranks leave notes (outcomes), its supervisor (after_job.py) a line in
ROOT/job/segments.jsonl. The policy is two functions of these: `judge` says how a segment ended, `decide` what to do.
The standard library alone: the supervisor has a second.
"""

from __future__ import annotations

import json
import math
import re
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from launch.job_order import write_whole

NoteKind = Literal["done", "interrupted", "refused", "error", "preflight"]
SegmentKind = Literal["done", "interrupted", "refused", "error", "preflight", "hung", "crashed", "lost"]
Action = Literal["finish", "requeue", "stop", "leave"]
FAILURES = ("error", "preflight", "hung", "crashed", "lost")
"""Kinds of segments that may have no end: so many in a row without a newer checkpoint, and the job stops."""
BAD_NODE_AFTER = 2  # segments that a node has ended; then the job avoids it
# What a rank says when it was another one that failed: gloo's, NCCL's and our own words.
ECHOES = re.compile(
    r"connection (closed|reset)|connection was reset|broken pipe|timed out waiting|remote process exited|"
    r"socket (closed|timeout)|main rank stopped|rank \d+ stopped|ncclremoteerror|ncclsystemerror",
    re.IGNORECASE,
)
STEP = re.compile(r"step_(\d{8,})$")
HUNG = re.compile(r"^=== (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) rank (\d+) on \S+: (no progress for .*)$", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """What a rank says at its end; one that was killed, or that hung, says nothing."""

    job: str
    restart: int
    rank: int
    node: str
    kind: NoteKind
    text: str
    step: int | None
    time: float
    signum: int = 0  # of `interrupted`
    culprit: str | None = None  # the node at fault, of `preflight`


@dataclass(frozen=True)
class Segment:
    """One start of a job, over: a line of segments.jsonl. A later line for the same start takes its place."""

    job: str
    restart: int
    stage: str
    nodes: list[str]
    begin: float | None
    end: float | None
    status: int | None  # of srun: the largest of its ranks'
    kind: SegmentKind
    reason: str
    first_step: int | None  # of the checkpoint it began from; null: a stage that saves nothing
    last_step: int | None  # of the newest checkpoint at its end
    decision: str
    excluded: list[str]
    culprit: str | None = None


@dataclass(frozen=True)
class Ended:
    """How a segment ended."""

    kind: SegmentKind
    reason: str
    culprit: str | None = None


@dataclass(frozen=True)
class Decision:
    """What follows: the job's status where it ends, the nodes to avoid where it begins again."""

    action: Action
    reason: str
    status: int = 0
    excluded: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------------------- records


def outcome_file(folder: Path, job: str, restart: int, rank: int | str) -> Path:
    """Of a rank; `rank` is "begin" for what the job's script wrote before the ranks started."""
    return folder / "outcomes" / f"{job}_{restart}_{rank}.json"


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """`folder` is ROOT/job."""
    file = outcome_file(folder, outcome.job, outcome.restart, outcome.rank)
    write_whole(file, json.dumps(asdict(outcome)) + "\n")


def read_outcomes(folder: Path, job: str, restart: int, world: int) -> list[Outcome]:
    """The notes that are there. Asked for by name: a network file system may list a folder as it was seconds ago."""
    found = [_read(outcome_file(folder, job, restart, rank)) for rank in range(world)]
    return [Outcome(**row) for row in found if row is not None]


def write_begin(folder: Path, job: str, restart: int, first_step: int) -> None:
    """What is known before the ranks start."""
    write_whole(
        outcome_file(folder, job, restart, "begin"), json.dumps({"begin": time.time(), "first_step": first_step}) + "\n"
    )


def read_begin(folder: Path, job: str, restart: int) -> tuple[float | None, int | None]:
    """When the segment began, and from which checkpoint."""
    row = _read(outcome_file(folder, job, restart, "begin")) or {}
    return row.get("begin"), row.get("first_step")


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def append_segment(folder: Path, segment: Segment) -> None:
    """One write, so that the jobs of a chain or an array do not mix their lines."""
    with (folder / "segments.jsonl").open("a") as file:
        file.write(json.dumps(asdict(segment)) + "\n")


def read_segments(folder: Path, job: str | None = None) -> list[Segment]:
    """Of all jobs of a run, or of one, in order; fields of a later version are left out."""
    path, known = folder / "segments.jsonl", {field.name for field in fields(Segment)}
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    segments = [Segment(**{name: value for name, value in row.items() if name in known}) for row in rows]
    last = {(segment.job, segment.restart): segment for segment in segments}
    return [segment for segment in last.values() if job in (None, segment.job)]


def newest_checkpoint(run_dir: Path) -> int:
    """Step of the newest complete checkpoint, 0 without one; as vjepa.train.checkpoint has it, without torch."""
    steps = [
        int(match[1])
        for path in _entries(run_dir / "checkpoints")
        if (match := STEP.match(path.name)) and (path / "COMMITTED").is_file()
    ]
    return max(steps, default=0)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def hung_ranks(run_dir: Path, since: float) -> dict[int, str]:
    """What the watchdogs of ranks first said of hanging since then: rank -> "no progress for 5 s in forward of ...".

    A rank that was suspended says it when SLURM wakes it up to end it: only those are heard that spoke before the
    first one gave up, whose line is its second.
    """
    lines: dict[int, list[tuple[float, str]]] = {}
    for path in _entries(run_dir / "stacks"):
        for when, rank, text in HUNG.findall(path.read_text(errors="replace")):
            at = time.mktime(time.strptime(when, "%Y-%m-%d %H:%M:%S"))
            if at >= since - 1:
                lines.setdefault(int(rank), []).append((at, text))
    given_up = min((of_rank[1][0] for of_rank in lines.values() if len(of_rank) > 1), default=math.inf)
    return {rank: of_rank[0][1] for rank, of_rank in lines.items() if of_rank[0][0] < given_up}


# -------------------------------------------------------------------------------------------------------------- policy


def judge(
    status: int,
    outcomes: Sequence[Outcome],
    places: Mapping[int, str],
    *,
    hung: Mapping[int, str],
    is_preempted: bool = False,
    down: Sequence[str] = (),
) -> Ended:
    """How a segment ended: from srun's status, the ranks' notes, where every rank was, and who reported a hang.

    `down` are the job's nodes that SLURM cannot reach any more; preempted is what SLURM is known to have ended itself.
    That srun says 0 is not enough: a rank that is done has left a note, and a run that was cut short must go on.
    srun ends the other ranks with SIGTERM when one has failed: being interrupted by it says nothing while there is a
    failure. SIGUSR2 comes from SLURM alone.
    """
    silent = [rank for rank in places if rank not in {outcome.rank for outcome in outcomes}]
    of_kind = {kind: [o for o in outcomes if o.kind == kind] for kind in ("refused", "preflight", "error")}
    if of_kind["refused"]:
        return Ended("refused", _words(of_kind["refused"][0]))
    if not silent and (status == 0 or all(outcome.kind == "done" for outcome in outcomes)):
        return Ended("done", "all ranks are done")
    if down:
        return Ended("lost", f"{', '.join(down)} went down", down[0] if len(down) == 1 else None)
    if of_kind["preflight"]:
        return _of_preflight(of_kind["preflight"], places)
    if by_slurm := _interruption(status, outcomes, silent, of_kind["error"], is_preempted=is_preempted):
        return by_slurm
    if any(rank in hung for rank in silent):
        return _of_hang(hung, places)
    return _of_failure(status, of_kind["error"], silent, places)


def _interruption(
    status: int, outcomes: Sequence[Outcome], silent: Sequence[int], errors: Sequence[Outcome], *, is_preempted: bool
) -> Ended | None:
    """SLURM asked the ranks to leave."""
    noted = [outcome for outcome in outcomes if outcome.kind == "interrupted"]
    by_user_signal = [outcome for outcome in noted if outcome.signum == signal.SIGUSR2]
    if by_user_signal or noted:
        outcome = (by_user_signal or noted)[0]
        at = "" if outcome.step is None else f" at step {outcome.step}"
        reason = f"{outcome.text}{at}"
        has_failure = bool(silent) or any(not ECHOES.search(error.text) for error in errors)
        if by_user_signal or is_preempted or not (has_failure or errors):
            return Ended("interrupted", reason)
    if is_preempted:
        return Ended("interrupted", "by SLURM, before the ranks could take signals")
    if not errors and status == 128 + signal.SIGUSR2:
        return Ended("interrupted", "SIGUSR2 before the ranks could take signals")
    return None


def _of_preflight(notes: Sequence[Outcome], places: Mapping[int, str]) -> Ended:
    """What every node has is no fault of one."""
    culprits = sorted({note.culprit for note in notes if note.culprit})
    is_one = len(culprits) == 1 and len(set(places.values())) > 1
    return Ended("preflight", _words(notes[0]), culprits[0] if is_one else None)


def _of_hang(said: Mapping[int, str], places: Mapping[int, str]) -> Ended:
    """The others wait for the rank that did not even say that it hangs."""
    rank, text = min(said.items())
    stopped = [rank for rank in places if rank not in said]
    nodes = {places[rank] for rank in stopped}
    who = f"; nothing was heard of rank {', '.join(map(str, stopped))} on {', '.join(sorted(nodes))}" if stopped else ""
    return Ended("hung", f"rank {rank} on {places[rank]}: {text}{who}", nodes.pop() if len(nodes) == 1 else None)


def _of_failure(status: int, errors: Sequence[Outcome], silent: Sequence[int], places: Mapping[int, str]) -> Ended:
    """The first rank to fail, or the one that went without a word while the others only lost their connection.

    What ranks of several nodes say alike is no fault of a node.
    """
    own = sorted((error for error in errors if not ECHOES.search(error.text)), key=lambda error: error.time)
    if own:
        alike = {error.node for error in own if error.text == own[0].text}
        return Ended("error", _words(own[0]), own[0].node if len(alike) == 1 else None)
    nodes = {places[rank] for rank in silent}
    culprit = nodes.pop() if len(nodes) == 1 else None
    if silent:
        ranks = ", ".join(f"{rank} on {places[rank]}" for rank in silent[:4]) + (" ..." if len(silent) > 4 else "")
        return Ended("crashed", f"rank {ranks} ended without a word; srun's status is {_status(status)}", culprit)
    if errors:
        return Ended("error", _words(errors[0]))
    return Ended("crashed", f"srun's status is {_status(status)}")


def _words(outcome: Outcome) -> str:
    return f"rank {outcome.rank} on {outcome.node}: {outcome.text}"


def _status(status: int) -> str:
    try:
        return f"{status} ({signal.Signals(status - 128).name})"
    except ValueError:
        return str(status)


def decide(
    ended: Ended, segment: Segment, history: Sequence[Segment], *, max_restarts: int, max_crashes: int
) -> Decision:
    """What follows from a segment's end, given the segments of the same job before it.

    Of `segment` the steps and the number of the restart are read.
    """
    if ended.kind == "done":
        return Decision("finish", "finished")
    if ended.kind == "refused":
        return Decision("stop", "no restart would change it", status=segment.status or 1)
    if segment.restart >= max_restarts:
        return Decision("stop", f"restarted {segment.restart} times, max_restarts={max_restarts}", status=1)
    if ended.kind == "interrupted":
        return Decision("requeue", "asked to by SLURM", excluded=bad_nodes(history, None))
    since = [other for other in history if other.kind in FAILURES and other.last_step == segment.last_step]
    count = len(since) + 1
    if count >= max_crashes:
        where = "" if segment.last_step is None else f", newest checkpoint step {segment.last_step}"
        text = f"{count} failures without a newer checkpoint (max_crashes={max_crashes}{where}); last: {ended.reason}"
        return Decision("stop", text, status=1)
    text = f"failure {count} of at most {max_crashes} without a newer checkpoint"
    return Decision("requeue", text, excluded=bad_nodes(history, ended.culprit))


def bad_nodes(history: Sequence[Segment], culprit: str | None) -> tuple[str, ...]:
    """Nodes that have ended BAD_NODE_AFTER segments of the job, the present one's culprit counted."""
    named = [segment.culprit for segment in history if segment.culprit] + ([culprit] if culprit else [])
    return tuple(sorted({node for node in named if named.count(node) >= BAD_NODE_AFTER}))
