"""A stage as a SLURM job: snapshot, order, script, submission, record. Through submitit.

The script is for people: it says what it runs and which command made it, and `sbatch RUN/job/STAGE.sbatch` runs it
again. One script serves the first start and every restart: the ranks go on from the newest checkpoint there is.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission, FailedJobError
from submitit.helpers import clean_env

from launch import scheduler
from launch.cluster_profile import ClusterProfile
from launch.config import RunConfig
from launch.job_order import JobOrder, job_folder, note_job, read_jobs, write_whole
from launch.slurm_task import SlurmTask
from launch.snapshot import ROOT, hash_code, snapshot_path, take_snapshot
from vjepa.config import ConfigError, to_yaml

FOLDER = "%j"  # under RUN/job: logs and pickles of one job
CANNOT_START = (
    "SLURM says that this request cannot start: it is more than the partition has, or nodes are down or drained now "
    "(sinfo tells)"
)
AFTER_KILLED_S = 30  # that srun leaves the other ranks when one has ended


@dataclass(frozen=True)
class Submitted:
    """A job that SLURM has taken."""

    job: str
    order: JobOrder


class JobScript(submitit.SlurmExecutor):
    """submitit's executor, with a script that says what it is and is kept; `sbatch_options` go beside it."""

    def __init__(self, order: JobOrder, profile: ClusterProfile, sbatch_options: tuple[str, ...] = ()) -> None:
        python = profile.python or shlex.quote(sys.executable)
        super().__init__(folder=order.folder / FOLDER, python=python)
        self.order, self.sbatch_options = order, sbatch_options
        self.update_parameters(**script_parameters(order, profile, python))

    @classmethod
    def affinity(cls) -> int:
        return 2  # a script can be shown where there is no SLURM

    def text(self) -> str:
        """The script."""
        shebang, _, rest = super()._make_submission_file_text(self._submitit_command_str, "").partition("\n")
        return "\n".join([shebang, *header(self.order), rest])

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self.text()

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        submission_file_path.replace(self.order.file("sbatch"))
        submission_file_path.symlink_to(self.order.file("sbatch"))  # submitit moves it on
        return ["sbatch", *self.sbatch_options, str(self.order.file("sbatch"))]


def header(order: JobOrder) -> list[str]:
    """What the script says of itself."""
    script = shlex.quote(str(order.file("sbatch")))
    shape = f"{order.nodes} node(s) x {order.tasks_per_node} rank(s)"
    return [
        f"# {order.recipe}/{order.stage}, {shape}, profile {order.profile}",
        f"# run      {order.run_dir}",
        f"# code     {order.snapshot} ({order.code_hash})",
        f"# made by  {shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]])}",
        f"#          in {Path.cwd()}, {time.strftime('%Y-%m-%d %H:%M:%S')}",
        f"# again    sbatch {script}",
        "#          It goes on from the run's newest checkpoint, with the same code and configuration "
        f"({order.file('yaml').name}).",
    ]


def script_parameters(order: JobOrder, profile: ClusterProfile, python: str) -> dict[str, Any]:
    """submitit's names for what the profile says."""
    extra = {name.replace("_", "-"): True if value is None else value for name, value in profile.extra.items()}
    ours = {
        "requeue": True,
        "open-mode": "append",
        "chdir": str(Path.cwd()),  # relative paths of the configuration mean the same wherever sbatch is called
        "output": str(order.folder / "%j.out"),  # of the script itself; in a folder that is there before the job
    }
    if profile.reservation is not None:
        ours["reservation"] = profile.reservation
    given = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "nodelist": profile.nodelist,
        "exclude": profile.exclude,
        "cpus_per_task": profile.cpus_per_task,
        "gpus_per_node": profile.gpus_per_node or None,
        "mem": None if profile.mem_gb is None else f"{round(profile.mem_gb * 1024)}M",
        "comment": profile.comment,
    }
    return {name: value for name, value in given.items() if value is not None} | {
        "job_name": f"{order.recipe}-{order.stage}",
        "nodes": order.nodes,
        "ntasks_per_node": order.tasks_per_node,
        "time": profile.time_min,
        "signal_delay_s": profile.signal_delay_s,
        "wckey": None,  # submitit's own, which a site may not know
        "stderr_to_stdout": True,
        "setup": setup_lines(order, profile, python),
        "srun_args": srun_arguments(profile),
        "additional_parameters": ours | extra,
    }


def srun_arguments(profile: ClusterProfile) -> list[str]:
    """One dead rank ends the step; srun of 22.05 and later does not take the processors over from sbatch."""
    cpus = [] if profile.cpus_per_task is None else [f"--cpus-per-task={profile.cpus_per_task}"]
    return ["--kill-on-bad-exit=1", f"--wait={AFTER_KILLED_S}", "--distribution=block", *cpus, *profile.srun_args]


def setup_lines(order: JobOrder, profile: ClusterProfile, python: str) -> list[str]:
    """The script's lines between its #SBATCH head and srun."""
    folder, quote = order.folder, shlex.quote
    exports = [f"export {name}={quote(value)}" for name, value in profile.environment.items()]
    threads = [f'export {name}="${{{name}:-1}}"' for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")]
    site = ["# the cluster profile's lines", *profile.setup, *exports] if profile.setup or exports else []
    task = quote(str(order.file("pkl")))
    return [
        "set -e",
        *site,
        "# this code and no other; PYTHONSAFEPATH keeps the current folder out of Python's path",
        f"export PYTHONPATH={quote(order.snapshot)} PYTHONSAFEPATH=1",
        *threads,
        "# logs of the ranks, and what they execute, under this job's number",
        f'mkdir -p {quote(str(folder))}/"$SLURM_JOB_ID"',
        f'cp {task} {quote(str(folder))}/"$SLURM_JOB_ID/${{SLURM_JOB_ID}}_submitted.pkl"',
        "# when this segment begins, and what became of those before it",
        f"{python} -m launch.before_job {quote(str(order.file('json')))}",
        "# when the ranks have ended, the supervisor decides: done, start again, or give up",
        "trap : TERM",
        f"trap 'status=$?; {python} -m launch.after_job {quote(str(order.file('json')))} $status; exit $?' EXIT",
    ]


def plan_order(config: RunConfig, profile: ClusterProfile, profile_name: str, *, root: Path | None = None) -> JobOrder:
    """The order of a stage submitted now; `root` where the stage is part of a chain."""
    root = Path(root or config.run_dir).resolve()
    return JobOrder(
        root=str(root),
        run_dir=str(Path(config.run_dir).resolve()),
        stage=config.stage,
        recipe=config.recipe,
        snapshot=str(snapshot_path(job_folder(root))),
        code_hash=hash_code(ROOT),
        profile=profile_name,
        nodes=profile.nodes,
        tasks_per_node=profile.ranks_per_node,
        gpus_per_node=profile.gpus_per_node,
        max_restarts=profile.max_restarts,
        max_crashes=profile.max_crashes,
        rendezvous_s=profile.rendezvous_s,
        signal_delay_s=profile.signal_delay_s,
        cpus_per_task=profile.cpus_per_task or 1,
    )


def script_text(order: JobOrder, profile: ClusterProfile) -> str:
    """The job script of an order: what is submitted, and what --dry-run prints."""
    return JobScript(order, profile).text()


def submit_stage(
    config: RunConfig,
    profile: ClusterProfile,
    profile_name: str,
    *,
    after: str | None = None,
    root: Path | None = None,
) -> Submitted:
    """Snapshot the code, write the job's files, hand the script to SLURM and note it in jobs.jsonl.

    `after` is the number of the job that must succeed first; if it cannot, this one is cancelled. `config` has been
    checked against the profile's world size. Raises SchedulerError with SLURM's own words.
    """
    order = plan_order(config, profile, profile_name, root=root)
    order = replace(order, code_hash=take_snapshot(Path(order.snapshot)))
    write_whole(order.file("yaml"), to_yaml(config))
    order.write()
    return submit_order(order, profile, SlurmTask(order.file("json")), after=after)


def submit_order(
    order: JobOrder, profile: ClusterProfile, task: Callable[[], object], *, after: str | None = None
) -> Submitted:
    """Submit whatever `task` each rank is to execute; it is pickled by reference, so it holds plain values only."""
    pickled = DelayedSubmission(task)
    pickled.set_timeout(profile.time_min, 0)
    order.folder.mkdir(parents=True, exist_ok=True)
    pickled.dump(order.file("pkl"))
    options = () if after is None else (f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes")
    executor = JobScript(order, profile, options)
    with clean_environment():
        try:
            job = executor.submit(task).job_id
        except FailedJobError as error:
            raise scheduler.SchedulerError(f"sbatch refused the job: {_last_words(error)}") from error
        finally:
            for left in order.folder.glob(".submission_file_*.sh"):
                left.unlink()
    note_job(order.root, order.row(), job, after)
    return Submitted(job, order)


def refuse_queued(root: Path | str, stage: str) -> None:
    """Two jobs of one stage would share its files and its run directory."""
    jobs = [row["job"] for row in read_jobs(root) if row["stage"] == stage]
    for found in scheduler.queue(jobs[-1:]):
        if found.state not in scheduler.FINISHED:
            raise ConfigError(
                f"job {found.job} of {root} is {found.state}: it goes on by itself. Wait for it, or scancel it first"
            )


def ask_scheduler(script: Path | str, *options: str) -> str:
    """Print what SLURM says to a script's request; what is wrong with it, or nothing."""
    with clean_environment():
        can_start, words = scheduler.test_only(script, *options)
    print(f"sbatch --test-only: {words}", flush=True)
    if can_start is None:
        print("no controller answered: whether the request can start is not known")
    return CANNOT_START if can_start is False else ""


@contextmanager
def clean_environment() -> Iterator[None]:
    """Without what SLURM has set for the job that this process may itself be in, but with the way to the cluster."""
    configuration = os.environ.get("SLURM_CONF")
    with clean_env():
        if configuration is not None:
            os.environ["SLURM_CONF"] = configuration
        yield


def _last_words(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if "sbatch: error" in line]
    return " ".join(line.split("sbatch: error:")[-1].strip() for line in lines) or " ".join(str(error).split())
