"""First of all in a job's script, on its first node, at every start: python -m launch.before_job STAGE.json.

Notes when the segment begins and from which checkpoint, and writes down the segments before it that no supervisor
could: SLURM itself starts a job again whose first node died. The standard library alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from launch import scheduler
from launch.job_order import JobOrder, restart_count
from launch.segments import Segment, append_segment, newest_checkpoint, read_begin, read_segments, write_begin

T = TypeVar("T")


def note_lost(order: JobOrder, job: str, restart: int) -> None:
    """A line for every earlier start of this job that has none."""
    known = {segment.restart for segment in read_segments(order.folder, job)}
    missing = [number for number in range(restart) if number not in known]
    accounts = asked(lambda: scheduler.accounting([job])) if missing else []
    for number in missing:
        account = accounts[number] if number < len(accounts) else None
        append_segment(order.folder, _lost(order, job, number, account))


def _lost(order: JobOrder, job: str, restart: int, account: scheduler.Segment | None) -> Segment:
    begin, first_step = read_begin(order.folder, job, restart)
    nodes = asked(lambda: scheduler.host_names(account.nodes)) if account is not None else []
    dead = asked(lambda: scheduler.down_nodes(nodes))
    said = "no word of it" if account is None else account.state
    return Segment(
        job=job,
        restart=restart,
        stage=order.stage,
        nodes=nodes,
        begin=begin,
        end=None,
        status=None,
        kind="lost",
        reason=f"no supervisor was left to say why; SLURM's accounting: {said}"
        + (f"; down now: {', '.join(dead)}" if dead else ""),
        first_step=first_step,
        last_step=newest_checkpoint(Path(order.run_dir)),
        decision="requeued by SLURM",
        excluded=[],
        culprit=dead[0] if len(dead) == 1 else None,
    )


def asked(question: Callable[[], list[T]]) -> list[T]:
    """SLURM's answer, or nothing where it has none: what is only for the record must not keep a job from starting."""
    try:
        return question()
    except scheduler.SchedulerError as error:
        print(f"before_job: {error}", file=sys.stderr)
        return []


def main(argv: Sequence[str]) -> int:
    """0 where the ranks may start; 1 where the job has been started too often, whoever requeued it."""
    order, job, restart = JobOrder.read(argv[0]), os.environ["SLURM_JOB_ID"], restart_count()
    note_lost(order, job, restart)
    if restart > order.max_restarts:
        print(f"error: job {job} was restarted {restart} times, max_restarts={order.max_restarts}", file=sys.stderr)
        return 1
    write_begin(order.folder, job, restart, newest_checkpoint(Path(order.run_dir)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
