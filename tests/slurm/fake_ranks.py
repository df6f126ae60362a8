"""Ranks without a model, for tests of the supervisor: python -m tests.slurm.fake_ranks ORDER BEHAVIOUR, under srun.

`train` counts steps and stops at signals as the trainer does, `train_on` does so until it is stopped; `crash` ends
without a word, `refuse` with a refusal; `crash_on NODE` crashes there and trains anywhere else.
"""

import itertools
import os
import signal
import sys
import time

from launch.job_order import JobOrder
from launch.rendezvous import Place
from launch.segments import Outcome, newest_checkpoint, write_outcome

STEP_S = 0.05
STEPS = 40


def train(order: JobOrder, place: Place, *, is_endless: bool = False) -> int:
    received: list[int] = []
    for signum in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(signum, lambda signum, frame: received.append(signum))
    (order.folder / f"training_{place.rank}").touch()  # from here on it takes signals
    for step in itertools.count() if is_endless else range(STEPS):
        time.sleep(STEP_S)
        if received:
            return leave(order, place, "interrupted", signal.Signals(received[0]).name, received[0], step)
    return leave(order, place, "done", "", 0, STEPS)


def leave(order: JobOrder, place: Place, kind: str, text: str, signum: int = 0, step: int | None = None) -> int:
    note = (place.job, place.restart, place.rank, place.node, kind, text, step, time.time(), signum)
    write_outcome(order.folder, Outcome(*note))  # pyright: ignore[reportArgumentType]
    return {"done": 0, "refused": 2}.get(kind, 128 + signum)


def main() -> int:
    order, behaviour = JobOrder.read(sys.argv[1]), sys.argv[2:]
    place = Place.of_slurm()
    assert newest_checkpoint(order.folder) == 0
    if behaviour[0] == "refuse":
        return leave(order, place, "refused", "train.batch.video=7 is odd")
    if behaviour == ["crash"] or behaviour == ["crash_on", place.node]:
        os._exit(3)
    return train(order, place, is_endless=behaviour == ["train_on"])


if __name__ == "__main__":
    raise SystemExit(main())
