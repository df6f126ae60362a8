"""What each rank of a SLURM job executes, started by submitit on every node, as often as SLURM starts the job.

The standard library alone until the signals are caught: importing torch takes seconds, and SLURM's signals may come
within them.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

from launch.job_order import JobOrder
from launch.rendezvous import Place, RendezvousError, meet
from launch.snapshot import OtherCodeError, refuse_other_code

REFUSED = 2  # exit status of what no restart would change


class SlurmTask:
    """One rank of one stage. It has no `checkpoint`: submitit's own ways to save and requeue are not used."""

    def __init__(self, order: Path | str) -> None:
        self.order = str(order)  # the file: a restart reads it anew

    def __call__(self) -> NoReturn:
        for signum in (signal.SIGTERM, signal.SIGUSR2):  # in place of submitit's
            signal.signal(signum, leave_early)
        leave(self._status())

    def _status(self) -> int:
        order = JobOrder.read(self.order)
        place = Place.of_slurm()
        try:
            refuse_other_code(order.snapshot)
            place.export()
            return train_stage(order, place)
        except OtherCodeError as error:
            say_error(order, place, error)
            return REFUSED
        except RendezvousError as error:
            say_error(order, place, error)
            return 1


def train_stage(order: JobOrder, place: Place) -> int:
    """Meet the other ranks and train, from the newest checkpoint where there is one."""
    from launch.config import load_stored
    from launch.train import run

    config = load_stored(order.file("yaml"))
    store = meet(order.folder / "rendezvous", place, seconds=order.rendezvous_s)
    return run(config, resume=True, store=store)


def say_error(order: JobOrder, place: Place, error: Exception) -> None:
    print(
        f"error: rank {place.rank} on {place.node}: {error} (run_dir={order.run_dir})",
        file=sys.stderr,
        flush=True,
    )


def leave_early(signum: int, frame: FrameType | None) -> NoReturn:
    """A signal before training has begun: there is nothing to save."""
    print(f"stopped by {signal.Signals(signum).name} during start-up: nothing is lost", flush=True)
    leave(128 + signum)


def leave(status: int) -> NoReturn:
    """End this rank at once, with its status: neither submitit nor the interpreter's own end has anything to add."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
