"""The supervisor, last in a job's script, when its ranks have ended: python -m launch.after_job STAGE.json STATUS.

On the job's first node it says how the segment ended, writes that down, and has SLURM start the job again where that
can help. The standard library alone; SIGTERM is only noted, because SLURM sends it before it ends the script.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from launch import scheduler
from launch.job_order import JobOrder, restart_count
from launch.scheduler import SchedulerError
from launch.segments import (
    Decision,
    Ended,
    Outcome,
    Segment,
    append_segment,
    decide,
    hung_ranks,
    judge,
    newest_checkpoint,
    read_begin,
    read_outcomes,
    read_segments,
)

RUNNING = ("RUNNING", "UNKNOWN")
"""States in which SLURM leaves it to us; UNKNOWN: the controller does not answer now."""
NOTES_S = 3.0  # that notes of other nodes may take to be seen here, over a network file system
DONE_S = 60.0  # ... where srun says that nothing failed: NFS may show a folder as it was a minute ago
REQUEUE_TRIES = 10  # a controller that is being restarted does not answer
BETWEEN_TRIES_S = 6.0
KILLED_WITHIN_S = 600.0  # SLURM's kill after a requeue comes in seconds
POLL_S = 0.1


@dataclass(frozen=True)
class Situation:
    """What SLURM says of the job at the end of its ranks."""

    job: str
    restart: int
    nodes: list[str]
    state: str
    is_preempted: bool
    down: list[str]  # of its nodes
    is_superseded: bool = False  # this node was taken for dead: the job runs again, and its next start decides

    @classmethod
    def now(cls) -> Situation:
        """Of the job that this process is part of."""
        job = os.environ["SLURM_JOB_ID"]
        try:
            nodes = scheduler.host_names(os.environ["SLURM_JOB_NODELIST"])
            told, down = scheduler.describe(job), scheduler.down_nodes(nodes)
        except SchedulerError as error:
            say(str(error))
            nodes, told, down = [os.environ.get("SLURMD_NODENAME", "?")], {}, []
        state = told.get("JobState", "UNKNOWN")
        is_preempted = state not in RUNNING or _is_preempted(told)
        return cls(job, restart_count(), nodes, state, is_preempted, down, _is_superseded(told))

    @property
    def is_ours_to_decide(self) -> bool:
        return self.state in RUNNING


def _is_preempted(told: Mapping[str, str]) -> bool:
    """Whether preemption was announced in this segment; the times are written as 2026-11-25T21:20:50."""
    announced = told.get("PreemptTime", "None")
    return announced not in ("None", "N/A") and announced >= told.get("StartTime", "")


def _is_superseded(told: Mapping[str, str]) -> bool:
    """Whether a later start runs; SLURM counts it from the requeue on, while the earlier one is ending still."""
    return told.get("JobState") == "RUNNING" and int(told.get("Restarts", "0")) > restart_count()


def look(order: JobOrder, status: int, situation: Situation) -> tuple[Ended, Segment]:
    """How the segment has ended, and the line to be written of it."""
    job, restart, nodes = situation.job, situation.restart, situation.nodes
    places = {rank: nodes[min(rank // order.tasks_per_node, len(nodes) - 1)] for rank in range(order.world)}
    outcomes = _wait_for_notes(order, status, situation)
    begin, first_step = read_begin(order.folder, job, restart)
    hung = hung_ranks(Path(order.run_dir), begin or 0.0)
    ended = judge(status, outcomes, places, hung=hung, is_preempted=situation.is_preempted, down=situation.down)
    segment = Segment(
        job=job,
        restart=restart,
        stage=order.stage,
        nodes=nodes,
        begin=begin,
        end=time.time(),
        status=status,
        kind=ended.kind,
        reason=ended.reason,
        first_step=first_step,
        last_step=newest_checkpoint(Path(order.run_dir)),
        decision="",
        excluded=[],
        culprit=ended.culprit,
    )
    return ended, segment


def _wait_for_notes(order: JobOrder, status: int, situation: Situation) -> list[Outcome]:
    """The ranks' notes; where all may have left one, those of other nodes are waited for a moment."""
    patience = {0: DONE_S, 128 + signal.SIGUSR2: NOTES_S, 128 + signal.SIGTERM: NOTES_S}
    deadline = time.monotonic() + patience.get(status, 0.0)
    while True:
        outcomes = read_outcomes(order.folder, situation.job, situation.restart, order.world)
        if len(outcomes) == order.world or time.monotonic() > deadline:
            return outcomes
        time.sleep(POLL_S)


def choose(order: JobOrder, ended: Ended, segment: Segment, situation: Situation) -> Decision:
    """What to do: nothing where SLURM has decided already, else what the policy says, as far as there are nodes."""
    if not situation.is_ours_to_decide:
        return Decision("leave", f"left to SLURM, which says {situation.state}", status=segment.status or 0)
    history = [other for other in read_segments(order.folder, segment.job) if other.restart < segment.restart]
    decision = decide(ended, segment, history, max_restarts=order.max_restarts, max_crashes=order.max_crashes)
    if decision.excluded and not _are_enough(order, decision.excluded):
        text = f"{decision.reason}; {', '.join(decision.excluded)} not excluded: too few other nodes"
        return replace(decision, reason=text, excluded=())
    return decision


def _are_enough(order: JobOrder, excluded: Sequence[str]) -> bool:
    """Whether the partition has as many nodes as the job needs without these; else it would wait for ever."""
    partition = os.environ.get("SLURM_JOB_PARTITION", "")
    try:
        names = set(scheduler.ask("sinfo", "-h", "-N", "-p", partition, "-o", "%N").split())
    except SchedulerError as error:
        say(str(error))
        return False
    return len(names - set(excluded)) >= order.nodes


def act(decision: Decision, situation: Situation, ended_by: Sequence[int]) -> int:
    """Carry it out; the status that the script ends with. `ended_by` are the SIGTERMs that came."""
    if decision.action != "requeue":
        return decision.status
    requeue(situation.job, decision.excluded)
    wait_for_the_end(ended_by)
    return 0


def wait_for_the_end(ended_by: Sequence[int]) -> None:
    """Until SLURM ends the script: were it to end by itself, the job would count as completed."""
    deadline = time.monotonic() + KILLED_WITHIN_S
    while not ended_by and time.monotonic() < deadline:
        time.sleep(POLL_S)


def requeue(job: str, excluded: Sequence[str]) -> None:
    """Back into the queue, on other nodes where some are to be avoided; tried again where SLURM does not answer."""
    for left in reversed(range(REQUEUE_TRIES)):
        try:
            scheduler.requeue(job)
            break
        except SchedulerError as error:
            say(str(error))
            if _is_decided(job):
                return  # SLURM was faster, or has heard us after all
            if not left:
                raise
            time.sleep(BETWEEN_TRIES_S)
    if excluded:
        try:
            scheduler.exclude(job, excluded)
        except SchedulerError as error:  # then it may be the same node again, and the count goes on
            say(str(error))


def _is_decided(job: str) -> bool:
    try:
        told = scheduler.describe(job)
    except SchedulerError:
        return False
    return told.get("JobState", "UNKNOWN") not in RUNNING or _is_superseded(told)


def say(text: str) -> None:
    print(f"supervisor: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    """Decide about the job that this process is part of; the status that its script is to end with."""
    ended_by: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        ended_by.append(signum)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    order, status = JobOrder.read(argv[0]), int(argv[1])
    ended, segment = look(order, status, Situation.now())
    situation = Situation.now()  # notes may have been waited for
    if situation.is_superseded:
        say(f"start {situation.restart} of job {situation.job} was given up for lost; a later one runs and decides")
        wait_for_the_end(ended_by)
        return 0
    decision = choose(order, ended, segment, situation)
    words = {"requeue": "requeued", "stop": "stopped", "leave": "", "finish": ""}[decision.action]
    text = ": ".join(filter(None, [words, decision.reason]))
    append_segment(order.folder, replace(segment, decision=text, excluded=list(decision.excluded)))
    if ended.kind != "done":
        avoided = f"; avoided from now on: {', '.join(decision.excluded)}" if decision.excluded else ""
        say(f"{ended.kind}: {ended.reason}; {text}{avoided}")
    try:
        return act(decision, situation, ended_by)
    except SchedulerError as error:
        append_segment(order.folder, replace(segment, decision=f"stopped: it could not be requeued: {error}"))
        return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
