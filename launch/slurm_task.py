"""What each rank of a SLURM job executes, started by submitit on every node, as often as SLURM starts the job.

The standard library alone until the signals are caught: importing torch takes seconds, and SLURM's signals may come
within them.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from launch.job_order import JobOrder
from launch.rendezvous import Place, meet
from launch.segments import NoteKind, Outcome, write_outcome
from launch.snapshot import refuse_other_code

if TYPE_CHECKING:
    from launch.train import Note

REFUSED = 2  # exit status of what no restart would change
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class SlurmTask:
    """One rank of one stage. It has no `checkpoint`: submitit's own ways to save and requeue are not used.

    At its end it leaves a note for the supervisor (segments.py).
    """

    def __init__(self, order: Path | str) -> None:
        self.order = str(order)  # the file: a restart reads it anew

    def __call__(self) -> NoReturn:
        for signum in SIGNALS:  # in place of submitit's
            signal.signal(signum, self.leave_early)
        leave(self._status())

    def _status(self) -> int:
        order, place = JobOrder.read(self.order), Place.of_slurm()
        try:
            refuse_other_code(order.snapshot)
            place.export()
            return train_stage(order, place, self.note)
        except Exception as error:  # a bug too is to be noted, and shown whole
            return self._fail(order, place, error)

    def _fail(self, order: JobOrder, place: Place, error: Exception) -> int:
        is_told = isinstance(error, ValueError | RuntimeError | OSError)
        text = str(error) if is_told else traceback.format_exc()
        where = f"rank {place.rank} on {place.node}"
        print(f"error: {where}: {text} (run_dir={order.run_dir})", file=sys.stderr, flush=True)
        try:
            from launch.train import note_error
        except ImportError as missing:  # nothing can run on this node
            self.note("error", f"ImportError: {missing}")
            return 1
        note_error(self.note, error)
        return REFUSED if isinstance(error, ValueError) else 1

    def note(
        self, kind: NoteKind, text: str, *, step: int | None = None, signum: int = 0, culprit: str | None = None
    ) -> None:
        """Leave the note; from here on signals change nothing."""
        for taken in SIGNALS:
            signal.signal(taken, signal.SIG_IGN)
        place, order = Place.of_slurm(), JobOrder.read(self.order)
        outcome = Outcome(
            job=place.job,
            restart=place.restart,
            rank=place.rank,
            node=place.node,
            kind=kind,
            text=text,
            step=step,
            time=time.time(),
            signum=signum,
            culprit=culprit,
        )
        try:
            write_outcome(order.folder, outcome)
        except OSError as error:  # a full or read-only disk: the others' notes must do
            print(f"rank {place.rank} on {place.node} could not leave its note: {error}", file=sys.stderr, flush=True)

    def leave_early(self, signum: int, frame: FrameType | None) -> NoReturn:
        """A signal before training has begun: there is nothing to save."""
        name = signal.Signals(signum).name
        print(f"stopped by {name} during start-up: nothing is lost", flush=True)
        self.note("interrupted", f"{name} during start-up", signum=signum)
        leave(128 + signum)


def train_stage(order: JobOrder, place: Place, note: Note) -> int:
    """Meet the other ranks, see whether all nodes are fit, and train from the newest checkpoint there is."""
    from launch.config import load_stored
    from launch.preflight import check_nodes
    from launch.train import run

    config = load_stored(order.file("yaml"))
    store = meet(order.folder / "rendezvous", place, seconds=order.rendezvous_s)
    found = check_nodes(config, place, store)
    if place.rank == 0:
        print(found, flush=True)
    return run(config, resume=True, store=store, note=note)


def leave(status: int) -> NoReturn:
    """End this rank at once, with its status: neither submitit nor the interpreter's own end has anything to add."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
