"""Jobs as they would be submitted: scripts to be shown, and SLURM asked about them, before anything is queued."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from submitit.core.utils import DelayedSubmission

from launch import scheduler
from launch.cluster_profile import ClusterProfile
from launch.command_task import CommandTask
from launch.config import RunConfig
from launch.job_order import JobOrder, note_job, write_whole
from launch.resubmit import sbatch
from launch.slurm_submit import Submitted, ask_scheduler, plan_order, script_text, submit_order
from launch.slurm_task import SlurmTask
from vjepa.config import to_yaml


@dataclass(frozen=True)
class PlannedJob:
    """All of a job but its number."""

    order: JobOrder
    profile: ClusterProfile
    task: SlurmTask | CommandTask
    config: RunConfig | None = None
    """Of a training."""
    beside: PlannedJob | None = None
    """What the job itself submits, for each checkpoint that is to be evaluated."""
    options: Sequence[str] = field(default=())
    """For sbatch, beside those of the script."""

    @property
    def script(self) -> Path:
        return self.order.file("sbatch")

    def text(self) -> str:
        return script_text(self.order, self.profile)

    def write(self) -> None:
        """The job's files; nothing is submitted."""
        if self.config is not None:
            write_whole(self.order.file("yaml"), to_yaml(self.config))
        self.order.write()
        pickled = DelayedSubmission(self.task)
        pickled.set_timeout(self.profile.time_min, 0)
        pickled.dump(self.order.file("pkl"))
        write_whole(self.script, self.text())
        if self.beside is not None:
            self.beside.write()

    def submit(self, after: str | None) -> Submitted:
        """Queue it behind the job that must succeed first."""
        self.write()
        return submit_order(self.order, self.profile, self.task, after=after)

    def submit_behind(self, array: str | None, *, when: str) -> str:
        """Queue it behind an array, `afterok` or `afterany`, where there is one; its number."""
        self.write()
        behind = () if array is None else (f"--dependency={when}:{array}", "--kill-on-invalid-dep=yes")
        job = sbatch(self.script, *behind)
        note_job(self.order.root, self.order.row() | {"when": when}, job, array)
        return job


@dataclass(frozen=True)
class Shown:
    """A script that --dry-run prints."""

    script: Path
    text: str
    options: Sequence[str] = ()
    note: str = ""


def show(scripts: Iterable[Shown]) -> int:
    """Print the scripts that would be submitted, and what SLURM says to each; status 2 where one cannot start.

    What a job waits for is left out of the question: those jobs have no numbers yet.
    """
    problems = []
    for shown in scripts:
        note = f" ({shown.note})" if shown.note else ""
        print(f"\njob script, {shown.script}{note}:\n\n{shown.text}")
        if scheduler.is_there():
            problems.append(_ask(shown))
    if not scheduler.is_there():
        print("sbatch is not on PATH: whether the request can start was not asked")
    for problem in dict.fromkeys(filter(None, problems)):
        print(f"error: {problem}", file=sys.stderr)
    return 2 if any(problems) else 0


def _ask(shown: Shown) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
        file.write(shown.text)
        file.flush()
        return ask_scheduler(file.name, *shown.options)


def shown(jobs: Sequence[PlannedJob]) -> list[Shown]:
    """The scripts of jobs, each behind the one before it, with those that they submit themselves."""
    found = []
    for before, job in zip([None, *jobs[:-1]], jobs, strict=True):
        note = "" if before is None else f"after {before.order.stage} has succeeded"
        found.append(Shown(job.script, job.text(), note=note))
        if job.beside is not None:
            note = f"submitted by {job.order.stage} for each checkpoint that is due"
            found.append(Shown(job.beside.script, job.beside.text(), note=note))
    return found


def dry_run(config: RunConfig, profile: ClusterProfile, profile_name: str) -> int:
    """Print the script of a stage, and what SLURM says to it; status 2 where it cannot start."""
    order = plan_order(config, profile, profile_name)
    return show([Shown(order.file("sbatch"), script_text(order, profile))])
