"""Where a run's processes live. Today: this machine, through submitit's local executor, in the foreground.

The process that the user started stays, streams the log and forwards Ctrl-C. If it is killed, the run's processes die
with it: nothing trains on unseen.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import submitit
import torch
from submitit.core.utils import UncompletedJobError

from launch.config import RunConfig
from launch.log_files import Tail
from launch.train import ROOT, run
from vjepa.train.metrics import ProgressDisplay

NO_TIME_LIMIT_MIN = 10 * 365 * 24 * 60
POLL_S = 0.2
NOISE = "submitit INFO"


class LocalTask:
    """What each process of a local run executes; the owner is the process the user started."""

    def __init__(self, config: RunConfig, *, resume: bool, owner: int) -> None:
        self.config, self.resume, self.owner = config, resume, owner

    def __call__(self) -> int:
        die_with(self.owner)
        logging.getLogger("submitit").propagate = False  # it has a handler of its own
        if submitit.JobEnvironment().num_tasks > 1:
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        return run(self.config, resume=self.resume)


def die_with(owner: int) -> None:
    """Kill this process as soon as process `owner` is gone, however it went."""

    def watch() -> None:
        try:
            descriptor = os.pidfd_open(owner)
        except ProcessLookupError:
            os.kill(os.getpid(), signal.SIGKILL)
            return
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        poller.poll()  # returns when the owner has ended
        os.kill(os.getpid(), signal.SIGKILL)

    if hasattr(os, "pidfd_open"):  # Linux 5.3 and later
        threading.Thread(target=watch, daemon=True).start()


def num_processes(config: RunConfig) -> int:
    """Ranks of a local run."""
    return max(1, torch.cuda.device_count()) if config.train.device != "cpu" else 1


def run_locally(config: RunConfig, *, resume: bool) -> int:
    """Run one process per GPU (one on a CPU), stream their log, and return the run's exit status."""
    run_dir = Path(config.run_dir)
    processes = num_processes(config)
    # submitit names its files by process id, which a container hands out again: a folder for each start.
    executor = submitit.LocalExecutor(folder=run_dir / "job" / time.strftime("%Y%m%d-%H%M%S"))
    executor.update_parameters(
        timeout_min=NO_TIME_LIMIT_MIN,
        tasks_per_node=processes,
        gpus_per_node=torch.cuda.device_count(),
        stderr_to_stdout=True,
    )
    received: list[int] = []
    with _ignoring_interrupts(received), _environment():
        job = executor.submit(LocalTask(config, resume=resume, owner=os.getpid()))
        with _forwarding_signals(job, received):
            _follow(job, run_dir, config)
    return _status(job, processes, received)


@contextmanager
def _environment() -> Iterator[None]:
    """The job imports this checkout, with one thread per process unless the user has set another number."""
    additions = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        additions[name] = os.environ.get(name, "1")
    before = {name: os.environ.get(name) for name in additions}
    os.environ.update(additions)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _ignoring_interrupts(received: list[int]) -> Iterator[None]:
    """submitit's controller, started within, inherits this: at Ctrl-C it would kill its tasks before they saved.

    It stays where a signal was received: this process is about to end, and a further one must not change its status.
    """
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        if not received:
            signal.signal(signal.SIGINT, previous)


@contextmanager
def _forwarding_signals(job: Any, received: list[int]) -> Iterator[None]:
    """First Ctrl-C or SIGTERM: the run saves and stops. Second: it is killed; its last checkpoint stays.

    What is received is noted.
    """

    def forward(signum: int, frame: object) -> None:
        received.append(signum)
        if len(received) > 1:
            os._exit(128 + signum)  # the run's processes die with this one
        print("stopping: the run saves first (once more to kill it)", file=sys.stderr, flush=True)
        job._process.send_signal(signal.SIGTERM)  # the controller forwards it to its tasks

    previous = {signum: signal.signal(signum, forward) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _follow(job: Any, run_dir: Path, config: RunConfig) -> None:
    """Relay rank 0's log until the job ends; on a terminal, step lines become a progress bar."""
    step_line = f"{config.recipe}/{config.stage} step "
    display = None
    if sys.stdout.isatty():
        display = ProgressDisplay(config.train.steps, 0, title=f"{config.recipe}/{config.stage}")
    lines, rows = Tail(Path(job.paths.stdout)), Tail(run_dir / "metrics.jsonl")
    rows.skip()
    is_over = False
    while not is_over:
        time.sleep(POLL_S)
        is_over = job.done()
        for line in lines.read(is_over):
            if NOISE in line or (display and line.startswith(step_line)):
                continue
            display.message(line) if display else print(line, flush=True)
        if display:
            for line in rows.read(False)[-1:]:
                display.update(json.loads(line))
    if display:
        display.close()


def _status(job: Any, processes: int, received: list[int]) -> int:
    """The first exit status that is not 0; a process that died without one is reported with the place of its log."""
    try:
        status = next((status for status in job.results() if status), 0)
        # The run was told to stop by SIGTERM, whatever this process was told.
        return 128 + received[0] if received and status == 128 + signal.SIGTERM else status
    except UncompletedJobError as error:
        if received:  # before it could handle signals
            print("stopped before the first step: nothing is lost", file=sys.stderr)
            return 128 + received[0]
        logs = ", ".join(str(job.paths.folder / f"{job.job_id}_{rank}_log.out") for rank in range(processes))
        print(
            f"error: the run's process died without a result ({str(error).splitlines()[0]}); logs: {logs}",
            file=sys.stderr,
        )
        return 1
