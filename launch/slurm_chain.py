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

from submitit.core.utils import DelayedSubmission

from launch import scheduler
from launch.chain import EVALS, Chain
from launch.cluster_profile import ClusterProfile
from launch.command_task import STEP_VARIABLE, CommandTask
from launch.config import RunConfig
from launch.job_order import JobOrder, job_folder, write_whole
from launch.resubmit import ResumeError
from launch.slurm_submit import JobScript, Submitted, plan_order, submit_order
from launch.slurm_task import SlurmTask
from launch.snapshot import snapshot_path, take_snapshot
from launch.status import live_jobs
from vjepa.config import to_yaml


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
        root = root.resolve()
        if alive := live_jobs(root):
            first = alive[0]
            raise ResumeError(
                f"job {first.job} of {root} is {first.state}: it goes on by itself. `submit.py cancel {root}` ends it"
            )
        snapshot = snapshot_path(job_folder(root))
        return cls(root, profile, profile_name, str(snapshot), take_snapshot(snapshot))

    def order(self, config: RunConfig, name: str | None = None, *, is_command: bool = False) -> JobOrder:
        """The order of a stage called `name`, or as its configuration says."""
        order = plan_order(config, self.shape(is_command=is_command), self.profile_name, root=self.root)
        return replace(order, stage=name or order.stage, snapshot=self.snapshot, code_hash=self.code_hash)

    def plain_order(self, recipe: str, name: str) -> JobOrder:
        """The order of a command that belongs to no training."""
        return self.order(RunConfig(recipe=recipe, run_dir=str(self.root)), name, is_command=True)

    def shape(self, *, is_command: bool) -> ClusterProfile:
        """The profile, or for a command that is one process its share of a node."""
        return one_rank(self.profile) if is_command else self.profile

    def write_training(self, config: RunConfig, name: str | None = None) -> tuple[JobOrder, SlurmTask]:
        """The files of a training's job."""
        order = self.order(config, name)
        write_whole(order.file("yaml"), to_yaml(config))
        order.write()
        return order, SlurmTask(order.file("json"))


def one_rank(profile: ClusterProfile) -> ClusterProfile:
    """The share of one rank."""
    share = None if profile.mem_gb is None else profile.mem_gb / profile.ranks_per_node
    return replace(profile, nodes=1, tasks_per_node=1, gpus_per_node=min(1, profile.gpus_per_node), mem_gb=share)


def submit_chain(chain: Chain, profile: ClusterProfile, profile_name: str) -> list[Submitted]:
    """Queue all stages that are not finished, in their order; all of them or none.

    Raises ResumeError where a job of the chain lives, SchedulerError with SLURM's words.
    """
    submission = Submission.begin(chain.root, profile, profile_name)
    chain.request.write(submission.root)
    done: list[Submitted] = []
    try:
        for stage in chain.request.stages:
            if not chain.is_finished(stage):
                done.append(_submit_stage(chain, stage, submission, done[-1].job if done else None))
    except scheduler.SchedulerError:
        scheduler.cancel([submitted.job for submitted in done])  # half a chain is none
        raise
    return done


def _submit_stage(chain: Chain, stage: str, submission: Submission, after: str | None) -> Submitted:
    if stage == EVALS:
        last = list(chain.configs.values())[-1]
        order = replace(submission.order(last, EVALS, is_command=True), run_dir=str(submission.root))
        order.write()
        jobs = str(processors(submission.profile))
        task = CommandTask(order.file("json"), [[*chain.evaluation(), "--jobs", jobs]])
        return submit_order(order, submission.shape(is_command=True), task, after=after)
    config = chain.configs[stage]
    order, task = submission.write_training(config)
    profile = submission.profile
    if chain.request.eval_every is not None and config.suites():
        profile = _with_evaluations(submission, config, order, chain.request.eval_every)
    return submit_order(order, profile, task, after=after)


def processors(profile: ClusterProfile) -> int:
    """Processors of one rank."""
    return profile.cpus_per_task or 1


def _with_evaluations(submission: Submission, config: RunConfig, order: JobOrder, every: int) -> ClusterProfile:
    """Write the script that evaluates a checkpoint; the profile whose job has the process that submits it."""
    name = f"{config.stage}-checkpoint"
    evaluation = submission.order(config, name, is_command=True)
    evaluation.write()
    command = [sys.executable, "-m", "launch.evaluate", config.run_dir, "--step", f"{{{STEP_VARIABLE}}}"]
    write_script(evaluation, submission.shape(is_command=True), CommandTask(evaluation.file("json"), [command]))
    python = submission.profile.python or shlex.quote(sys.executable)
    log = shlex.quote(str(order.folder / f"{name}s.log"))
    beside = (
        f"(exec env PYTHONPATH={shlex.quote(order.snapshot)} PYTHONSAFEPATH=1 {python} -m launch.checkpoint_evals "
        f"{shlex.quote(str(evaluation.file('json')))} {every} >> {log} 2>&1) &"
    )
    return replace(submission.profile, setup=[*submission.profile.setup, "# evaluations of checkpoints", beside])


def write_script(order: JobOrder, profile: ClusterProfile, task: CommandTask | SlurmTask) -> None:
    """What `submit_order` writes, without submitting it."""
    pickled = DelayedSubmission(task)
    pickled.set_timeout(profile.time_min, 0)
    pickled.dump(order.file("pkl"))
    write_whole(order.file("sbatch"), JobScript(order, profile).text())


def describe_jobs(done: Sequence[Submitted]) -> list[str]:
    """A line for each job."""
    lines = []
    for before, submitted in zip([None, *done[:-1]], done, strict=True):
        behind = "" if before is None else f", after {before.order.stage} (job {before.job}) has succeeded"
        lines.append(f"job {submitted.job}: {submitted.order.stage}{behind}; {submitted.order.file('sbatch')}")
    return lines
