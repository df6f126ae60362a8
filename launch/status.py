"""What is going on with a run: its stages, their jobs as SLURM's own records have them, and how far each one is.

Nothing is remembered between two looks: jobs come from ROOT/job/jobs.jsonl, their states from squeue and sacct, steps
from the runs' files. Without jobs it is a local run. The standard library and OmegaConf alone: in a moment.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch import scheduler
from launch.job_order import read_jobs
from launch.job_words import duration, how_ended, why_pending
from launch.log_files import newest_log
from launch.own_notes import accounts
from launch.run_progress import Progress, checkpoints, is_held, read_progress

GONE = "NODE_FAIL", "PREEMPTED"  # states that a job may come back from
SHOWN_SEGMENTS = 3


class StatusError(ValueError):
    """A folder that is no run."""


@dataclass(frozen=True)
class StageStatus:
    """One stage, as a line and what is to be said about it."""

    stage: str
    job: str | None
    state: str
    """SLURM's word; of a local run running, finished, stopped or not started. Of an array: counts."""
    notes: list[str] = field(default_factory=list)
    """Why it waits, where it runs, how it ended, what to do."""
    progress: Progress = field(default_factory=Progress)
    restarts: int = 0
    gpu_hours: float = 0.0
    cpu_hours: float = 0.0
    is_live: bool = False
    """Whether it may still run by itself."""


@dataclass(frozen=True)
class RunStatus:
    """All stages of a run or chain, in order."""

    root: Path
    stages: list[StageStatus]
    notes: list[str] = field(default_factory=list)

    @property
    def is_live(self) -> bool:
        return any(stage.is_live for stage in self.stages)


def read_status(root: Path) -> RunStatus:
    """Look once. Raises StatusError for a folder that is no run, SchedulerError where SLURM does not answer."""
    rows = read_jobs(root)
    if not rows:
        return _local(root)
    jobs = {row["stage"]: row for row in rows}  # the newest of each stage
    queued = scheduler.queue([row["job"] for row in jobs.values()])
    states = _by_job(queued)
    starts, said = accounts(root, rows, lambda: {state.job for state in queued if state.state == "RUNNING"})
    segments = _by_job(starts)
    records = _records(root)
    stages: list[StageStatus] = []
    for row in jobs.values():
        earlier = [each["job"] for each in rows if each["stage"] == row["stage"]]
        of_stage = [segment for job in earlier for segment in segments.get(job, [])]
        found = _Job(root, row, states.get(row["job"], []), segments.get(row["job"], []), of_stage, records)
        stages.append(found.status(stages))
    return RunStatus(root, stages, [said] if said else [])


def live_jobs(root: Path) -> list[scheduler.JobState]:
    """What of a run is queued, runs, or may be requeued: jobs, and elements of arrays."""
    found = scheduler.queue([row["job"] for row in read_jobs(root)])
    return [state for state in found if state.state not in scheduler.FINISHED]


def _by_job(found: Sequence[Any]) -> dict[str, list[Any]]:
    """States or segments under the number of their job; an array's elements are together."""
    grouped: dict[str, list[Any]] = {}
    for entry in found:
        grouped.setdefault(entry.job.partition("_")[0], []).append(entry)
    return grouped


def _records(root: Path) -> list[dict[str, Any]]:
    """What the supervisors wrote of segments that have ended; a later line for the same start takes its place."""
    path = root / "job" / "segments.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return list({(row["job"], row["restart"]): row for row in rows}.values())


# ---------------------------------------------------------------------------------------------------------- one stage


@dataclass(frozen=True)
class _Job:
    """A stage's newest job and what is known of it."""

    root: Path
    row: Mapping[str, Any]
    states: list[scheduler.JobState]
    segments: list[scheduler.Segment]
    of_stage: list[scheduler.Segment]
    """Of earlier jobs of the stage too."""
    records: list[dict[str, Any]]

    def status(self, before: Sequence[StageStatus]) -> StageStatus:
        names = self._states()
        progress = self._progress()
        starts = Counter(segment.job for segment in self.of_stage if segment.start not in ("", "None", "Unknown"))
        cpu_seconds = sum(segment.elapsed_s * int(segment.resources.get("cpu", "0")) for segment in self.of_stage)
        return StageStatus(
            stage=self.row["stage"],
            job=self.row["job"],
            state=names[0] if len(names) == 1 else ", ".join(f"{n} {s}" for s, n in Counter(names).items()),
            notes=[*self._notes(names, before), *self._ends()],
            progress=progress,
            restarts=sum(starts.values()) - len(starts),
            gpu_hours=sum(segment.gpu_seconds for segment in self.of_stage) / 3600,
            cpu_hours=cpu_seconds / 3600,
            is_live=any(name not in (*scheduler.FINISHED, "UNKNOWN") for name in names),
        )

    def _states(self) -> list[str]:
        """Of the job or its elements: squeue's, or what accounting remembers."""
        if self.states:
            return [state.state for state in self.states]
        last = {segment.job: segment.state for segment in self.segments}
        return list(last.values()) or ["UNKNOWN"]

    def _progress(self) -> Progress:
        config = Path(self.row["script"]).with_suffix(".yaml")  # jobs that train nothing have none
        if not config.is_file():
            return Progress()
        return read_progress(Path(self.row["run_dir"]), config, newest_log(self.root, 0, self.row["stage"]))

    def _notes(self, names: Sequence[str], before: Sequence[StageStatus]) -> list[str]:
        if names == ["UNKNOWN"]:
            return ["SLURM knows nothing of this job (any more)"]
        if len(self.states) == 1:
            return _of_state(self.states[0], self.row, before, self.segments)
        pending = {state.reason for state in self.states if state.state == "PENDING"}
        if self.states:
            return [note for reason in sorted(pending) for note in _waiting(reason, self.row, before)]
        if any(not segment.elapsed_s and segment.state.startswith("CANCELLED") for segment in self.segments):
            return _never_started(self.row, before, self.segments[-1].state)
        return [_timed_out(self.row) if name == "TIMEOUT" else how_ended(name) for name in dict.fromkeys(names)]

    def _ends(self) -> list[str]:
        """How the last segments ended, as the supervisor has written it."""
        rows = [row for row in self.records if row["stage"] == self.row["stage"]]
        if self.row["array"] is not None:
            rows = []
        return [_end_line(row) for row in rows[-SHOWN_SEGMENTS:]]


def _of_state(
    state: scheduler.JobState,
    row: Mapping[str, Any],
    before: Sequence[StageStatus],
    segments: Sequence[scheduler.Segment],
) -> list[str]:
    if state.state == "PENDING":
        return _waiting(state.reason, row, before, start=state.start)
    if state.state in ("RUNNING", "COMPLETING", "CONFIGURING"):
        return [f"on {state.nodes} since {_clock(state.start)}, {state.time_left} left until its time limit"]
    # squeue gives the hour of the cancellation for a start that never was: nodes tell
    if state.state == "CANCELLED" and not state.nodes and not any(s.elapsed_s for s in segments):
        by = segments[-1].state if segments else "CANCELLED"
        return _never_started(row, before, by, reason=state.reason)
    if state.state in GONE:
        return [f"{how_ended(state.state)}; SLURM puts it back into the queue"]
    accounted = segments[-1] if segments and segments[-1].state.startswith(state.state) else None  # it may be late
    if state.state == "FAILED":
        exit_code = f", status {accounted.exit_code.partition(':')[0]}" if accounted is not None else ""
        return [f"failed{exit_code}; its words: `logs RUN --stage {row['stage']}`"]
    if state.state == "TIMEOUT":
        return [_timed_out(row)]
    return [] if state.state == "COMPLETED" else [how_ended(accounted.state if accounted is not None else state.state)]


def _timed_out(row: Mapping[str, Any]) -> str:
    """The limit itself came before the ranks had saved and the supervisor had requeued the job."""
    killed = "killed by its time limit before it could go back into the queue"
    if not Path(row["script"]).with_suffix(".yaml").is_file():  # it trains nothing
        return f"{killed}. What to do: `resume RUN` begins it again; a longer time_min in profile {row.get('profile')}"
    saved = max(checkpoints(Path(row["run_dir"]) / "checkpoints"), default=0)
    delay = row.get("signal_delay_s")
    given = "" if delay is None else f" (now {delay})"
    return (
        f"{killed}; saved at step {saved}. What to do: `resume RUN` goes on from there; so that it does not happen "
        f"again, raise signal_delay_s{given} of profile {row.get('profile')} above 60 s, the slowest step and a save "
        "together, or lower the interval of checkpoints (train.checkpoint.every), and submit with `--resume`"
    )


def _waiting(reason: str, row: Mapping[str, Any], before: Sequence[StageStatus], start: str = "N/A") -> list[str]:
    words, remedy = why_pending(reason)
    if reason == "Dependency" and row["after"]:
        words = f"waits for {_named(row['after'], before)} to succeed"
    when = f"; SLURM expects it to start at {_clock(start)}" if start not in ("N/A", "") else ""
    return [f"pending: {words}{when}" + (f". What to do: {remedy}" if remedy else "")]


def _never_started(row: Mapping[str, Any], before: Sequence[StageStatus], state: str, reason: str = "") -> list[str]:
    """A job that was cancelled before it began: by a person, or because the one before it did not succeed."""
    cause = next((stage for stage in before if stage.job == row["after"]), None)
    if (cause is not None and not cause.is_live and cause.state != "COMPLETED") or reason == "DependencyNeverSatisfied":
        return [
            f"never started: {_named(row['after'], before)} "
            f"{'did not succeed' if cause is None else _ended_state(cause)}. What to do: mend that, then `resume RUN`"
        ]
    return [f"never started: {how_ended(state)}"]


def _ended_state(stage: StageStatus) -> str:
    if any(note.startswith("never started") for note in stage.notes):
        return "never started either"
    return f"ended with {stage.state}" if "," in stage.state else how_ended(stage.state)  # of an array


def _named(job: str | None, before: Sequence[StageStatus]) -> str:
    """primary (job 12)."""
    stage = next((stage.stage for stage in before if stage.job == job), None)
    return f"job {job}" if stage is None else f"{stage} (job {job})"


def _clock(time: str) -> str:
    """2026-11-25T21:15:40 -> 2026-11-25 21:15."""
    return time[:16].replace("T", " ")


def _end_line(row: Mapping[str, Any]) -> str:
    """One segment: what it did, how it ended, what followed."""
    steps = ""
    if row.get("first_step") is not None and row.get("last_step") is not None:
        steps = f", steps {row['first_step']} to {row['last_step']}"
    lasted = ""
    if row.get("begin") is not None and row.get("end") is not None:
        lasted = f" after {duration(row['end'] - row['begin'])}"
    nodes = ",".join(row.get("nodes") or [])
    excluded = f"; avoids {', '.join(row['excluded'])}" if row.get("excluded") else ""
    return (
        f"start {row['restart']} on {nodes or '?'} ended{lasted}{steps}: {row['kind']} ({row['reason']}); "
        f"{row['decision']}{excluded}"
    )


# --------------------------------------------------------------------------------------------------------- local runs


def _local(root: Path) -> RunStatus:
    """A run, or a chain, of this machine's processes."""
    record = root / "job" / "chain.json"
    stages = json.loads(record.read_text())["stages"] if record.is_file() else []
    trainings = [stage for stage in stages if stage != "evals"]
    if not stages:
        if not (root / "config.yaml").is_file():
            raise StatusError(f"{root} is no run: there is neither config.yaml nor job/jobs.jsonl in it")
        trainings = [_stage_of(root / "config.yaml")]
    folders = {stage: root / stage if len(trainings) > 1 else root for stage in trainings}
    found = [_local_stage(stage, folder) for stage, folder in folders.items()]
    if "evals" in stages:
        rows = _summary(root).get("evals", [])
        is_done = set(trainings) <= {row["stage"] for row in rows if row["model"] == "trained"}
        found.append(StageStatus("evals", None, "finished" if is_done else "not started"))
    return RunStatus(root, found)


def _stage_of(config: Path) -> str:
    """The stage that a stored configuration is of."""
    lines = (line.partition(":") for line in config.read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key == "stage"), "primary")


def _summary(root: Path) -> dict[str, Any]:
    path = root / "summary.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _local_stage(stage: str, folder: Path) -> StageStatus:
    progress = read_progress(folder, log=newest_log(folder, 0))
    holder = is_held(folder)
    state = "finished" if progress.is_finished else "stopped" if (folder / "config.yaml").is_file() else "not started"
    notes = []
    if holder is not None:
        state, notes = "running", [f"{holder}"]
    elif state == "stopped":
        saved = "nothing is saved" if progress.checkpoint is None else f"saved at step {progress.checkpoint}"
        notes = [f"{saved}. What to do: --resume"]
    return StageStatus(stage, None, state, notes, progress, is_live=holder is not None)
