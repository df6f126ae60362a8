"""Going on with what was submitted and is not finished: the job scripts are kept, and each goes on where it stopped.

The code, the configuration and the request stay those of the first submission. To change them:
`submit.py --stage ... --cluster slurm --resume`. The standard library alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import scheduler
from launch.job_order import note_job, read_jobs
from launch.own_notes import accounts
from launch.status import live_jobs

FOR_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_")
RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class ResumeError(ValueError):
    """A run that cannot be resumed by its job scripts; the message says why."""


def resume(root: Path) -> list[str]:
    """Submit the unfinished stages of a run again, in their order; a line for each stage.

    Raises ResumeError where a job of the run still lives, SchedulerError with SLURM's words.
    """
    stages: dict[str, list[dict[str, Any]]] = {}
    for row in read_jobs(root):
        if "@" not in row["stage"]:  # evaluations on the way
            stages.setdefault(row["stage"], []).append(row)
    if not stages:
        raise ResumeError(f"{root} has no jobs on a cluster: `submit.py --stage STAGE run_dir={root} --resume`")
    if alive := live_jobs(root):
        first = alive[0]
        raise ResumeError(f"job {first.job} of {root} is {first.state}: it goes on by itself; or `cancel` it first")
    lines, after = [], None
    for stage, rows in stages.items():
        if not (left := unfinished(root, rows)):
            lines.append(f"{stage} is finished")
            continue
        row = rows[-1]
        job = sbatch(Path(row["script"]), *_array(row, left), *_behind(row, after))
        note_job(root, row, job, after)
        behind = f", after job {after}" if after else ""
        lines.append(f"{stage} is queued as job {job}{behind} ({row['script']})")
        after = job
    return lines


def unfinished(root: Path, rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The indices of a stage's elements (0: its one job) that no job of it has completed."""
    last, done = rows[-1], set[str]()
    for row in rows:
        done |= {job.partition("_")[2] or "0" for job in _completed(root, row)}
    if last["array"] is None:  # the export is written at the very end
        is_exported = (Path(last["run_dir"]) / "exports" / last["stage"] / "config.json").is_file()
        return [] if is_exported or done else [0]
    return [index for index in range(last["array"]) if str(index) not in done]


def _completed(root: Path, row: Mapping[str, Any]) -> set[str]:
    """The job, or the elements of the array, known to have completed: to squeue, accounting or the run's notes."""
    found = {state.job for state in scheduler.queue([row["job"]]) if state.state == "COMPLETED"}
    starts, _ = accounts(root, [row], lambda: ())
    return found | {start.job for start in starts if start.state == "COMPLETED"}


def _array(row: Mapping[str, Any], left: list[int]) -> list[str]:
    return [] if row["array"] is None else [f"--array={','.join(map(str, left))}%{row['at_once']}"]


def _behind(row: Mapping[str, Any], after: str | None) -> list[str]:
    if after is None:
        return []
    return [f"--dependency={row.get('when', 'afterok')}:{after}", "--kill-on-invalid-dep=yes"]


def sbatch(script: Path, *options: str, variables: Mapping[str, str] | None = None) -> str:
    """Submit a kept script, also from within a job; the new job's number. `variables` are added to its environment."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if (not name.startswith(FOR_A_JOB) and name not in RENDEZVOUS) or name == "SLURM_CONF"
    }
    return scheduler.ask("sbatch", "--parsable", *options, str(script), environment=kept | dict(variables or {}))
