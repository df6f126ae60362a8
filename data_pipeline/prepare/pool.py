"""Work shared out to processes, its results in the order of the work: what kills or hangs a process costs itself only.

A process has one piece of work at a time, so a piece is known by name when its process dies or takes too long.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

Piece = TypeVar("Piece")
Result = TypeVar("Result")

_AHEAD = 32
"""Pieces of work a process may be ahead of the one that is waited for: a long film must not make the others idle."""
_START = 600.0
"""Seconds within which a process must come to life: its imports, on a machine that is overloaded."""


@dataclass(frozen=True)
class Lost:
    """What stands in place of a result whose process died or was stopped."""

    reason: str
    """In one line: which signal, which time limit."""


@dataclass
class _Raised:
    """An exception on its way to the parent."""

    error: Exception


def in_order(
    work: Callable[[Piece], Result], pieces: Iterable[Piece], *, jobs: int, timeout: float
) -> Iterator[tuple[Piece, Result | Lost]]:
    """Each piece with `work(piece)`, in the order of the pieces.

    Args:
        work: a function of a module, for it is pickled; an exception that it raises is raised here.
        pieces: taken from only as fast as results are taken.
        jobs: processes; 1 works in this process, without protection and without a time limit.
        timeout: seconds for one piece.
    """
    if jobs == 1:
        yield from ((piece, work(piece)) for piece in pieces)
        return
    with contextlib.closing(_Pool(work, pieces, jobs, timeout)) as pool:
        yield from pool.results()


class _Pool(Generic[Piece, Result]):
    def __init__(self, work: Callable[[Piece], Result], pieces: Iterable[Piece], jobs: int, timeout: float):
        self._work, self._pieces, self._jobs, self._timeout = work, iter(pieces), jobs, timeout
        self._workers: list[_Worker] = []
        self._given = 0  # pieces handed out so far
        self._waiting: dict[int, Piece] = {}  # handed out, and not yet given back to the caller
        self._results: dict[int, Result | Lost] = {}

    def results(self) -> Iterator[tuple[Piece, Result | Lost]]:
        wanted = 0
        while True:
            self._hand_out(wanted)
            if wanted == self._given:
                return
            while wanted not in self._results:
                self._collect()
                self._hand_out(wanted)
            yield self._waiting.pop(wanted), self._results.pop(wanted)
            wanted += 1

    def close(self) -> None:
        for worker in self._workers:
            worker.stop()

    def _hand_out(self, wanted: int) -> None:
        """Give every idle process a piece, as long as there are any that are not too far ahead."""
        idle = [worker for worker in self._workers if worker.number is None]
        while self._given < wanted + _AHEAD * self._jobs and (idle or len(self._workers) < self._jobs):
            try:
                piece = next(self._pieces)
            except StopIteration:
                return
            worker = idle.pop() if idle else self._add()
            self._waiting[self._given] = piece
            if not worker.give(self._given, piece, self._timeout):  # it died while it was idle
                self._workers.remove(worker)
                self._add().give(self._given, piece, self._timeout)
            self._given += 1

    def _add(self) -> "_Worker":
        worker = _Worker(self._work)
        self._workers.append(worker)
        return worker

    def _collect(self) -> None:
        """Wait until at least one process is done, dead or out of time."""
        busy = [worker for worker in self._workers if worker.number is not None]
        soonest = min(worker.deadline for worker in busy)
        ready = wait([worker.pipe for worker in busy], max(0.0, soonest - time.monotonic()))
        for worker in busy:
            assert worker.number is not None
            if worker.pipe in ready and not worker.is_started:
                worker.start(self._timeout)
                continue
            if worker.pipe in ready:
                self._results[worker.number] = worker.take()
            elif time.monotonic() >= worker.deadline:
                worker.stop()
                self._results[worker.number] = Lost(f"took longer than {self._timeout:g} s and was stopped")
            else:
                continue
            worker.number = None
        self._workers = [worker for worker in self._workers if not worker.stopped]


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, work: Callable[..., object]):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self._process.start()
        theirs.close()
        self.number: int | None = None
        self.deadline = 0.0
        self.stopped = False
        self.is_started = False

    def give(self, number: int, piece: object, timeout: float) -> bool:
        """Hand a piece over; False where the process is no longer there."""
        self.number = number
        self.deadline = time.monotonic() + (timeout if self.is_started else max(timeout, _START))
        try:
            self.pipe.send(piece)
        except OSError:
            self.stop()
        return not self.stopped

    def start(self, timeout: float) -> None:
        """The process says that it has begun: its time runs from here. RuntimeError where it has ended instead."""
        try:
            self.is_started = self.pipe.recv()
        except (EOFError, OSError):
            raise RuntimeError(
                "a process ended before it began to work (see its error above; a script that calls this needs "
                "`if __name__ == '__main__':`)"
            ) from None
        self.deadline = time.monotonic() + timeout

    def take(self) -> Any:
        """The result, or Lost where the process has died."""
        try:
            result = self.pipe.recv()
        except (EOFError, OSError):
            self.stop()
            return Lost(f"its process died ({_ending(self._process.exitcode)})")
        if isinstance(result, _Raised):
            raise result.error
        return result

    def stop(self) -> None:
        self.stopped = True
        self.pipe.close()  # an idle process leaves at that, a dead one has left
        self._process.join(0.5 if self.number is None else 0.1)
        self._process.kill()
        self._process.join()


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"{signal.Signals(-code).name}: a crash, or too little memory"
    return f"exit status {code}"


def _serve(pipe: Connection, work: Callable[..., object]) -> None:
    """A process's life: take a piece, send its result, until the parent hangs up or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        pipe.send(True)
        while True:
            piece = pipe.recv()
            try:
                result = work(piece)
            except Exception as error:
                error.add_note("".join(traceback.format_exception(error)))
                result = _Raised(error)
            pipe.send(result)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
