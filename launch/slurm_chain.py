"""A chain as dependent SLURM jobs: each starts when the one before it has succeeded, and dies when that cannot be.

All jobs of one submission run one snapshot of the code. Evaluations of checkpoints on the way are jobs of their own,
submitted by a process beside the ranks (checkpoint_evals.py).
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch import scheduler
from launch.chain import EVALS, Chain
from launch.cluster_profile import ClusterProfile, OneProcess
from launch.command_task import STEP_VARIABLE, CommandTask
from launch.config import RunConfig
from launch.job_order import JobOrder, job_folder
from launch.planned_job import PlannedJob, show, shown
from launch.resubmit import ResumeError
from launch.slurm_submit import Submitted, plan_order
from launch.slurm_task import SlurmTask
from launch.snapshot import ROOT, hash_code, snapshot_path, take_snapshot
from launch.status import live_jobs


@dataclass(frozen=True)
class Submission:
    """What the jobs of one submission share."""

    root: Path
    profile: ClusterProfile
    profile_name: str
    snapshot: str
    code_hash: str

    @classmethod
    def begin(cls, root: Path, profile: ClusterProfile, profile_name: str) -> Submission:
        """Refuse a root whose jobs still live, and take the snapshot of the code."""
        planned = cls.plan(root, profile, profile_name)
        if alive := live_jobs(planned.root):
            first = alive[0]
            raise ResumeError(
                f"job {first.job} of {planned.root} is {first.state}: it goes on by itself. "
                f"`submit.py cancel {planned.root}` ends it"
            )
        return replace(planned, code_hash=take_snapshot(Path(planned.snapshot)))

    @classmethod
    def plan(cls, root: Path, profile: ClusterProfile, profile_name: str) -> Submission:
        """As `begin`, but nothing is asked or written."""
        root = root.resolve()
        return cls(root, profile, profile_name, str(snapshot_path(job_folder(root))), hash_code(ROOT))

    def training(self, config: RunConfig, name: str | None = None) -> PlannedJob:
        """A training, under the name of its stage or another."""
        order = self._order(config, self.profile, name or config.stage)
        return PlannedJob(order, self.profile, SlurmTask(order.file("json")), config)

    def command(self, config: RunConfig, name: str, share: OneProcess, commands: Sequence[Sequence[str]]) -> PlannedJob:
        """Commands that belong to a training, in one process."""
        profile = self.profile.of_one_process(share)
        order = self._order(config, profile, name)
        return PlannedJob(order, profile, CommandTask(order.file("json"), commands))

    def plain_command(self, recipe: str, name: str, share: OneProcess, commands: Sequence[Sequence[str]]) -> PlannedJob:
        """Commands that belong to no training."""
        return self.command(RunConfig(recipe=recipe, run_dir=str(self.root)), name, share, commands)

    def _order(self, config: RunConfig, profile: ClusterProfile, name: str) -> JobOrder:
        order = plan_order(config, profile, self.profile_name, root=self.root)
        return replace(order, stage=name, snapshot=self.snapshot, code_hash=self.code_hash)


def submit_chain(chain: Chain, profile: ClusterProfile, profile_name: str) -> list[Submitted]:
    """Queue all stages that are not finished, in their order; all of them or none.

    Raises ResumeError where a job of the chain lives, SchedulerError with SLURM's words.
    """
    submission = Submission.begin(chain.root, profile, profile_name)
    chain.begin()
    done: list[Submitted] = []
    try:
        for job in plan_jobs(chain, submission):
            done.append(job.submit(done[-1].job if done else None))
    except scheduler.SchedulerError:
        scheduler.cancel([submitted.job for submitted in done])  # half a chain is none
        raise
    return done


def dry_run(chain: Chain, profile: ClusterProfile, profile_name: str) -> int:
    """Print every script that would be submitted, and what SLURM says to it; status 2 where one cannot start."""
    return show(shown(plan_jobs(chain, Submission.plan(chain.root, profile, profile_name))))


def plan_jobs(chain: Chain, submission: Submission) -> list[PlannedJob]:
    """The jobs of the stages that are not finished, in their order."""
    return [_plan_stage(chain, stage, submission) for stage in chain.request.stages if not chain.is_finished(stage)]


def _plan_stage(chain: Chain, stage: str, submission: Submission) -> PlannedJob:
    if stage == EVALS:
        last, share = list(chain.configs.values())[-1], submission.profile.evals
        jobs = str(processors(submission.profile.of_one_process(share)))
        job = submission.command(last, EVALS, share, [[*chain.evaluation(), "--jobs", jobs]])
        return replace(job, order=replace(job.order, run_dir=str(submission.root)))
    config = chain.configs[stage]
    training = submission.training(config)
    if chain.request.eval_every is None or not config.suites():
        return training
    return _with_evaluations(submission, training, config, chain.request.eval_every)


def processors(profile: ClusterProfile) -> int:
    """Processors of one rank."""
    return profile.cpus_per_task or 1


def _with_evaluations(submission: Submission, training: PlannedJob, config: RunConfig, every: int) -> PlannedJob:
    """The training with the script that evaluates a checkpoint, and in its own a process that submits that."""
    name = f"{config.stage}-checkpoint"
    command = [sys.executable, "-m", "launch.evaluate", config.run_dir, "--step", f"{{{STEP_VARIABLE}}}"]
    evaluation = submission.command(config, name, submission.profile.evals, [command])
    order, profile = training.order, training.profile
    python = profile.python or shlex.quote(sys.executable)
    log = shlex.quote(str(order.folder / f"{name}s.log"))
    beside = (
        f"(exec env PYTHONPATH={shlex.quote(order.snapshot)} PYTHONSAFEPATH=1 {python} -m launch.checkpoint_evals "
        f"{shlex.quote(str(evaluation.order.file('json')))} {every} >> {log} 2>&1) &"
    )
    setup = [*profile.setup, "# evaluations of checkpoints", beside]
    return replace(training, profile=replace(profile, setup=setup), beside=evaluation)


def describe_jobs(done: Sequence[Submitted]) -> list[str]:
    """A line for each job."""
    lines = []
    for before, submitted in zip([None, *done[:-1]], done, strict=True):
        behind = "" if before is None else f", after {before.order.stage} (job {before.job}) has succeeded"
        lines.append(f"job {submitted.job}: {submitted.order.stage}{behind}; {submitted.order.file('sbatch')}")
    return lines
