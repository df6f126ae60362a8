"""The starts of a run's jobs from what the run itself has noted, for sites whose SLURM keeps no accounts.

The job's script notes when a start began (outcomes/JOB_N_begin.json), the supervisor when and how it ended
(segments.jsonl). What is missing: a start whose script was killed has no end, and counts no time. Resources are those
that were asked for. The standard library alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import scheduler
from launch.segments import Segment, outcome_file, read_begin, read_segments

NOTED = "hours and ends are from the run's own notes: what was asked for, without starts whose script was killed"


def noted_starts(root: Path, rows: Sequence[Mapping[str, Any]], alive: Collection[str]) -> list[scheduler.Segment]:
    """Every noted start of the jobs in `rows` (of jobs.jsonl), oldest first; `alive` are those that run now."""
    folder = root / "job"
    ended = {(segment.job, segment.restart): segment for segment in read_segments(folder)}
    found = []
    for row in rows:
        for shown, number in _elements(folder, row).items():
            last = max((restart for job, restart in ended if job == number), default=-1)
            is_open = outcome_file(folder, number, last + 1, "begin").is_file()
            for restart in range(last + 1 + is_open):
                segment = ended.get((number, restart))
                found.append(_start(folder, row, shown, number, restart, segment, is_alive=shown in alive))
    return found


def _elements(folder: Path, row: Mapping[str, Any]) -> dict[str, str]:
    """The job by SLURM's name for it and its plain number; of an array each element that has begun."""
    if row["array"] is None:
        return {row["job"]: row["job"]}
    links = [path for path in sorted(folder.glob(f"{row['job']}_*")) if path.is_symlink()]
    return {path.name: os.readlink(path) for path in links}


def _start(
    folder: Path,
    row: Mapping[str, Any],
    shown: str,
    number: str,
    restart: int,
    segment: Segment | None,
    *,
    is_alive: bool,
) -> scheduler.Segment:
    begin = read_begin(folder, number, restart)[0]
    end = segment.end if segment is not None else time.time() if is_alive else None
    cpus = row["nodes"] * row["tasks_per_node"] * row.get("cpus_per_task", 1)
    return scheduler.Segment(
        job=shown,
        state=_state(segment, is_alive=is_alive),
        elapsed_s=0 if begin is None or end is None else round(end - begin),
        resources={"cpu": str(cpus), "gres/gpu": str(row["nodes"] * row["gpus_per_node"])},
        start=_clock(begin),
        end=_clock(end),
        nodes=",".join(segment.nodes) if segment is not None else "",
        exit_code=f"{segment.status or 0}:0" if segment is not None else "0:0",
    )


def _state(segment: Segment | None, *, is_alive: bool) -> str:
    """In SLURM's words."""
    if segment is None:
        return "RUNNING" if is_alive else "UNKNOWN"
    if segment.kind == "done":
        return "COMPLETED"
    if segment.decision.startswith("stopped"):
        return "FAILED"
    said = segment.decision.rpartition("left to SLURM, which says ")
    return said[2] if said[1] else "REQUEUED"


def _clock(when: float | None) -> str:
    return "Unknown" if when is None else time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(when))


def accounts(
    root: Path, rows: Sequence[Mapping[str, Any]], alive: Callable[[], Collection[str]]
) -> tuple[list[scheduler.Segment], str]:
    """Every start of the jobs from SLURM's accounting, or from the notes with why that is; nothing to say otherwise."""
    try:
        return scheduler.accounting([row["job"] for row in rows]), ""
    except scheduler.SchedulerError as error:
        return noted_starts(root, rows, alive()), f"SLURM's accounting does not answer, so {NOTED} ({error})"
