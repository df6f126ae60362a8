"""A loader's worker processes under supervision: micro-batches in order, whatever happens to the processes.

A worker that dies or hangs is replaced, and its micro-batch is made again from the beginning, so the stream is the same
as without the accident. What it was decoding is told by `InFlight`: a sample that costs its worker twice is a bad
sample, with the cause of death as its reason. A thread of the training process hands out the work and collects it, so
that workers go on while the trainer computes.
"""

import heapq
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from typing import Any

import torch

from data_pipeline.config import DataConfig
from data_pipeline.heap import Heap
from data_pipeline.in_flight import Attempt, InFlight
from data_pipeline.parcel import Packer, Parcel, Unpacker
from data_pipeline.pool import Done, Lost, Pool, Raised
from data_pipeline.worker import start_worker

log = logging.getLogger(__name__)
Request = dict[str, range]
"""The ordinals of every modality in one micro-batch."""
MOST_DEATHS = 5
"""Workers that one micro-batch may cost while none of its samples is being decoded."""
_LOOK_EVERY = 0.5  # seconds between looks at the time limits
_STRIKES = 2  # workers that a sample may cost; the first may be an accident
_STRIKES_KILLED = 4  # of SIGKILL, which comes from outside: too little memory, maybe taken by another process


@dataclass(frozen=True)
class Job:
    """One micro-batch to be made."""

    request: Request
    lost: Mapping[Attempt, str] = field(default_factory=dict)
    """Attempts that are not to be made, and why."""
    deaths: int = 0
    """Workers that it has cost while they decoded nothing."""


@dataclass
class Events:
    """What has happened to the workers of a loader, since it was made."""

    died: int = 0
    timed_out: int = 0
    recycled: int = 0


class Supervised:
    """Iterate once: `make(job)` of every request, in the order of the requests.

    Args:
        make: makes a micro-batch, in a worker; inherited by forked workers, pickled for spawned ones.
        requests: may be endless.
        config: workers, prefetch, time limits, memory.
        in_flight: the table that `make` writes into.
        name: what an attempt's record is called, for messages.
        events: counted up.
        context: `fork` or `spawn`.
    """

    def __init__(
        self,
        make: Callable[[Job], Any],
        requests: Iterator[Request],
        config: DataConfig,
        *,
        in_flight: InFlight,
        name: Callable[[Attempt], str],
        events: Events,
        context: str,
    ):
        self._config, self._in_flight, self._name, self._events = config, in_flight, name, events
        life = _Life(os.getpid(), in_flight, config.worker_growth_gb * 1e9)
        self._pool: Pool[Job, Any] = Pool(
            _Make(make, in_flight, Packer()),
            size=config.workers,
            context=context,
            limit=self._limit,
            begin=life.begin,
            is_spent=life.is_spent,
        )
        self._requests, self._again = enumerate(requests), list[tuple[int, Job]]()
        self._taken = self._given = 0
        self._total: int | None = None  # micro-batches in all, once the last request was handed out
        self._ready: dict[int, Any] = {}
        self._strikes: Counter[Attempt] = Counter()
        self._changed = threading.Condition()
        self._is_closing = False
        self._wake, self._bell = Pipe(duplex=False)
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._unpackers = [Unpacker(is_pinned=self._device is not None) for _ in range(config.workers)]
        self._thread = threading.Thread(target=self._supervise, name="data-workers", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Any]:
        """The micro-batches. Raises what making one has raised, at its place; RuntimeError for a dead disk."""
        while True:
            with self._changed:
                while self._taken not in self._ready and self._taken != self._total:
                    self._changed.wait()
                if self._taken not in self._ready:
                    return
                result = self._ready.pop(self._taken)
                self._taken += 1
            self._bell.send_bytes(b"!")
            if isinstance(result, Raised):
                raise result.error
            yield result

    def close(self) -> None:
        """End the workers now, even one that hangs in a decoder."""
        self._is_closing = True
        self._bell.send_bytes(b"!")
        self._thread.join()
        self._bell.close()
        self._wake.close()

    # ------------------------------------------------------------------------------------------ in the thread

    def _supervise(self) -> None:
        """The thread's life. What goes wrong here is raised in the training process's place, not lost."""
        if self._device is not None:
            torch.cuda.set_device(self._device)  # pinned memory belongs to a device's context
        with closing(self._pool):
            try:
                while not self._is_closing:
                    self._hand_out()
                    for done in self._pool.collect(self._wake, seconds=_LOOK_EVERY):
                        self._settle(done)
                    while self._wake.poll():
                        self._wake.recv_bytes()
            except Exception as error:
                with self._changed:
                    self._ready[self._taken] = Raised(error)
                    self._changed.notify_all()

    def _hand_out(self) -> None:
        """Give every free worker something to do, as long as it is not too far ahead of what was taken."""
        while self._pool.has_room:
            if self._again:
                self._pool.give(*heapq.heappop(self._again))
                continue
            if self._total is not None or self._given >= self._taken + self._config.workers * self._config.prefetch:
                return
            number, request = next(self._requests, (self._given, None))
            if request is None:
                with self._changed:
                    self._total = self._given
                    self._changed.notify_all()
                return
            self._pool.give(number, Job(request))
            self._given += 1

    def _limit(self, slot: int, since: float) -> tuple[float, str]:
        """When a worker is stopped: a sample has its time, and so has everything else that is between two of them."""
        attempt, alive = self._in_flight.of(slot)
        seconds = self._config.sample_timeout if attempt else self._config.worker_timeout
        return max(alive, since) + (seconds or float("inf")), f"took longer than {seconds:g} s"

    def _settle(self, done: Done[Job, Any]) -> None:
        """Keep a result, or have it made again."""
        result = done.result
        self._events.recycled += done.is_last
        if isinstance(result, Lost):
            result = self._again_or_error(done, result)
        elif not isinstance(result, Raised):
            result = self._unpackers[done.slot].unpack(result)
        if result is not None:
            with self._changed:
                self._ready[done.number] = result
                self._changed.notify_all()

    def _again_or_error(self, done: Done[Job, Any], lost: Lost) -> Raised | None:
        """Queue a micro-batch whose worker was lost once more, without the sample that is to blame."""
        attempt, _ = self._in_flight.of(done.slot)
        self._in_flight.forget(done.slot)
        self._events.timed_out += lost.is_overdue
        self._events.died += not lost.is_overdue
        job = done.piece
        if attempt is None:
            if lost.is_overdue:
                return Raised(RuntimeError(self._stuck(done)))
            job = replace(job, deaths=job.deaths + 1)
            if job.deaths > MOST_DEATHS:
                return Raised(
                    RuntimeError(
                        f"{job.deaths} data workers in a row were lost while they made one micro-batch and decoded "
                        f"nothing: {lost.reason}. Lower data.workers or data.prefetch, then --resume"
                    )
                )
            log.warning("data worker %d: %s. It is replaced, nothing is lost", done.slot, lost.reason)
        else:
            self._strikes[attempt] += 1
            is_bad = self._strikes[attempt] >= (_STRIKES_KILLED if lost.is_killed else _STRIKES)
            what = "the sample counts as bad" if is_bad else "the sample is tried once more"
            log.warning(
                "data worker %d, decoding %s (%s ordinal %d): %s. It is replaced, %s",
                *(done.slot, self._name(attempt), attempt.modality, attempt.ordinal, lost.reason, what),
            )
            if is_bad:
                cost = f"decoding it cost {self._strikes[attempt]} workers: {lost.reason}"
                job = replace(job, lost={**job.lost, attempt: cost})
        heapq.heappush(self._again, (done.number, job))
        return None

    def _stuck(self, done: Done[Job, Any]) -> str:
        ordinals = ", ".join(f"{name} {each[0]}-{each[-1]}" for name, each in done.piece.request.items())
        return (
            f"data worker {done.slot} gave no sign of life for data.worker_timeout={self._config.worker_timeout:g} s "
            f"while it read or collated (ordinals {ordinals}): look at the disk or file system of the shards, then "
            "--resume"
        )


class _Make:
    def __init__(self, make: Callable[[Job], Any], in_flight: InFlight, packer: Packer):
        self.make, self.in_flight, self.packer = make, in_flight, packer

    def __call__(self, job: Job) -> Parcel:
        self.in_flight.sign_of_life()
        return self.packer.pack(self.make(job))


class _Life:
    """How a worker begins and when it leaves: when its own memory has grown by so much, for some decoders leak."""

    def __init__(self, parent: int, in_flight: InFlight, most_growth: float):
        self.parent, self.in_flight, self.most_growth = parent, in_flight, most_growth
        self.heap: Heap | None = None

    def begin(self, slot: int) -> None:
        start_worker(self.parent, slot)
        self.heap = Heap()
        self.in_flight.sign_of_life()

    def is_spent(self) -> bool:
        """Called after each micro-batch."""
        assert self.heap is not None
        grown = self.heap.give_back()
        return bool(self.most_growth) and grown > self.most_growth


def pin(value: Any) -> Any:
    """A micro-batch in pinned memory, where its parts know how."""
    if isinstance(value, dict):
        return {name: pin(part) for name, part in value.items()}
    return value.pin_memory() if hasattr(value, "pin_memory") else value


def alone(make: Callable[[Job], Any], requests: Iterator[Request]) -> Iterator[Any]:
    """The same micro-batches made in this process, without protection."""
    for request in requests:
        made = make(Job(request))
        yield pin(made) if torch.cuda.is_available() else made
