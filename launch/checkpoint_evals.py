"""Evaluations of checkpoints while the training goes on: python -m launch.checkpoint_evals ORDER.json EVERY

A process of its own beside the ranks, in the job's script on the first node. It looks for new checkpoints and submits a
job for each one that is due; nothing that it does, or fails to do, reaches the training: no rank waits for sbatch, and
where jobs may not be submitted from nodes it says so in its log and the evaluations at the end do the rest. It ends
with the job. Without torch.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.command_task import STEP_VARIABLE
from launch.job_order import JobOrder, note_job, read_jobs
from launch.resubmit import sbatch
from launch.run_progress import checkpoints
from launch.scheduler import SchedulerError

LOOK_EVERY_S = 2.0


def due(run_dir: Path, every: int, known: set[int]) -> list[int]:
    """Steps of complete checkpoints that are to be evaluated and have no job yet."""
    return [step for step in sorted(checkpoints(run_dir / "checkpoints")) if step % every == 0 and step not in known]


def submitted(order: JobOrder) -> set[int]:
    """Steps that have a job, of this start or of an earlier one."""
    stage = order.stage.removesuffix("-checkpoint")
    rows = (row["stage"].partition("@") for row in read_jobs(order.root))
    return {int(step) for name, _, step in rows if name == stage and step}


def watch(order: JobOrder, every: int, owner: int) -> None:
    """Until the job's script, which started this, is gone."""
    while os.getppid() == owner:
        for step in due(Path(order.run_dir), every, submitted(order)):
            submit(order, step)
        time.sleep(LOOK_EVERY_S)


def submit(order: JobOrder, step: int) -> None:
    """One job for one checkpoint, noted like all others."""
    stage = order.stage.removesuffix("-checkpoint")
    name = f"--job-name={order.recipe}-{stage}@{step}"
    job = sbatch(order.file("sbatch"), name, variables={STEP_VARIABLE: str(step)})
    row = order.row() | {"stage": f"{stage}@{step}"}
    note_job(order.root, row, job, None)
    print(f"step {step}: job {job}", flush=True)


def main(argv: Sequence[str]) -> int:
    path, every = argv
    try:
        watch(JobOrder.read(path), int(every), os.getppid())
    except (SchedulerError, OSError) as error:
        print(f"evaluations on the way end here: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
