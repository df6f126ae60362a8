"""Going on with what was submitted and is not finished: the job scripts are kept, and each goes on where it stopped.

The code, the configuration and the request stay those of the first submission. To change them:
`submit.py --stage ... --cluster slurm --resume`. The standard library alone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch import scheduler
from launch.status import live_jobs, read_jobs

FOR_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_")
RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class ResumeError(ValueError):
    """A run that cannot be resumed by its job scripts; the message says why."""


def resume(root: Path) -> list[str]:
    """Submit the unfinished stages of a run again, in their order; a line for each stage.

    Raises ResumeError where a job of the run still lives, SchedulerError with SLURM's words.
    """
    rows = {row["stage"]: row for row in read_jobs(root) if "@" not in row["stage"]}
    if not rows:
        raise ResumeError(
            f"{root} has no jobs on a cluster: go on with `submit.py --stage STAGE run_dir={root} --resume`"
        )
    if alive := live_jobs(root):
        raise ResumeError(
            f"job {alive[0].job} of {root} is {alive[0].state}: it goes on by itself, or `cancel` it first"
        )
    lines, after = [], None
    for stage, row in rows.items():
        left = unfinished(row)
        if not left:
            lines.append(f"{stage} is finished")
            continue
        job = sbatch(Path(row["script"]), *_array(row, left), *_behind(after))
        note_again(root, row, job, after)
        behind = f", after job {after}" if after else ""
        lines.append(f"{stage} is queued as job {job}{behind} ({row['script']})")
        after = job
    return lines


def unfinished(row: Mapping[str, Any]) -> list[int]:
    """The indices of a job's elements (0: the job itself) that have not completed."""
    if row["array"] is None:
        return [] if is_completed(row) else [0]
    done = _completed(row["job"])
    return [index for index in range(row["array"]) if f"{row['job']}_{index}" not in done]


def is_completed(row: Mapping[str, Any]) -> bool:
    """Whether SLURM says so, or the stage's export is there, which is written at its very end."""
    export = Path(row["run_dir"]) / "exports" / row["stage"] / "config.json"
    return export.is_file() or row["job"] in _completed(row["job"])


def _completed(job: str) -> set[str]:
    """The job, or the elements of the array, that squeue or accounting knows to have completed."""
    found = {state.job for state in scheduler.queue([job]) if state.state == "COMPLETED"}
    try:
        return found | {segment.job for segment in scheduler.accounting([job]) if segment.state == "COMPLETED"}
    except scheduler.SchedulerError:  # a site without accounting
        return found


def _array(row: Mapping[str, Any], left: list[int]) -> list[str]:
    if row["array"] is None:
        return []
    return [f"--array={','.join(map(str, left))}" + (f"%{row['at_once']}" if row.get("at_once") else "")]


def _behind(after: str | None) -> list[str]:
    return [] if after is None else [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]


def note_again(root: Path, row: Mapping[str, Any], job: str, after: str | None) -> None:
    """The job's line in jobs.jsonl."""
    line = dict(row) | {"job": job, "after": after, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}
    with (root / "job" / "jobs.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def sbatch(script: Path, *options: str, variables: Mapping[str, str] | None = None) -> str:
    """Submit a kept script, also from within a job; the new job's number. `variables` are added to its environment."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if (not name.startswith(FOR_A_JOB) and name not in RENDEZVOUS) or name == "SLURM_CONF"
    }
    return scheduler.ask("sbatch", "--parsable", *options, str(script), environment=kept | dict(variables or {}))
