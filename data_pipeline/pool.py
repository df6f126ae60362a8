"""Work shared out to processes: what kills or hangs a process costs the piece it had only, and is known by name.

A process has one piece of work at a time. `in_order` is for tools that want all results; the loader builds on `Pool`.
"""

import contextlib
import math
import multiprocessing
import os
import pickle
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
Limit = Callable[[int, float], tuple[float, str]]
"""Of a process's slot and the time its piece was given to it: the time at which it is stopped, and why; both times are
`time.monotonic()`, the same clock in all processes."""

_AHEAD = 32
"""Pieces of work a process may be ahead of the one that is waited for: a long film must not make the others idle."""
_START = {"spawn": 600.0, "fork": 60.0}
"""Seconds within which a process must come to life: its imports, on a machine that is overloaded. A fork has none, but
may find a lock that another thread held at that moment: then it never comes to life, and is replaced."""


@dataclass(frozen=True)
class Lost:
    """What stands in place of a result whose process died or was stopped."""

    reason: str
    """In one line: which signal, which time limit."""
    is_overdue: bool = False
    """Whether it was stopped for a time limit of its work."""
    is_killed: bool = False
    """Whether somebody else killed it (SIGKILL): the kernel, for memory, or a person."""


@dataclass(frozen=True)
class Raised:
    """What stands in place of a result where the work raised an exception."""

    error: Exception


@dataclass(frozen=True)
class Done(Generic[Piece, Result]):
    """A piece of work that is over, one way or another."""

    number: int
    piece: Piece
    slot: int
    """Which of the pool's processes had it."""
    result: Result | Lost | Raised
    is_last: bool = False
    """Whether its process left of itself after it: `is_spent`."""


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

    def limit(_: int, since: float) -> tuple[float, str]:
        return since + timeout, f"took longer than {timeout:g} s and was stopped"

    left, given, results = iter(pieces), 0, {}
    with contextlib.closing(Pool(work, size=jobs, context="spawn", limit=limit, begin=_begin)) as pool:

        def hand_out() -> None:
            nonlocal given
            while pool.has_room and given < wanted + _AHEAD * jobs:
                try:
                    piece = next(left)
                except StopIteration:
                    return
                pool.give(given, piece)
                given += 1

        wanted = 0
        hand_out()
        while wanted < given:
            while wanted not in results:
                results |= {done.number: done for done in pool.collect()}
                hand_out()
            done = results.pop(wanted)
            if isinstance(done.result, Raised):
                raise done.result.error
            yield done.piece, done.result
            wanted += 1
            hand_out()


class Pool(Generic[Piece, Result]):
    """Up to `size` processes, started when there is work for them and replaced when they die. For one thread.

    Args:
        work: what is done with a piece; it is inherited by a fork, and pickled for a spawned process.
        size: processes; each has a slot of its own, from 0 on, which a replacement inherits.
        context: `fork` or `spawn`.
        limit: when a process is stopped.
        begin: called first in a process, with its slot.
        is_spent: called in a process after each piece; where true, it leaves and is replaced.
    """

    def __init__(
        self,
        work: Callable[[Piece], Result],
        *,
        size: int,
        context: str,
        limit: Limit,
        begin: Callable[[int], None],
        is_spent: Callable[[], bool] | None = None,
    ):
        self._tasks = (work, begin, is_spent)
        self._context, self._limit = context, limit
        self._workers: list[_Worker[Piece, Result] | None] = [None] * size

    @property
    def has_room(self) -> bool:
        """Whether a process is free, or may be started."""
        return any(worker is None or worker.is_idle for worker in self._workers)

    @property
    def pids(self) -> list[int]:
        """The process ids of those that run."""
        return [worker.pid for worker in self._workers if worker]

    def give(self, number: int, piece: Piece) -> None:
        """Hand a piece to a process that is free; there must be room."""
        slot = min(  # one that runs before one that must be started
            (slot for slot, worker in enumerate(self._workers) if worker is None or worker.is_idle),
            key=lambda slot: self._workers[slot] is None,
        )
        worker = self._workers[slot]
        if worker is None or not worker.give(number, piece):  # it died while it was idle
            worker = self._workers[slot] = _Worker(slot, self._context, *self._tasks)
            worker.give(number, piece)

    def collect(self, wake: Connection | None = None, *, seconds: float = math.inf) -> list[Done[Piece, Result]]:
        """Wait until a piece is over, `wake` has something to read or the time is up; what is over, maybe nothing."""
        busy = [worker for worker in self._workers if worker and not worker.is_idle]
        deadlines = {worker: worker.deadline(self._limit) for worker in busy}
        until = min((time for time, _ in deadlines.values()), default=math.inf)
        waits = [worker.pipe for worker in busy] + ([wake] if wake else [])
        left = min(max(0.0, until - time.monotonic()), seconds)
        ready = wait(waits, left if math.isfinite(left) else None)
        over = []
        for worker in busy:
            if worker.pipe in ready:
                over.append(worker.read())
            elif time.monotonic() >= deadlines[worker][0] and worker.deadline(self._limit)[0] <= time.monotonic():
                over.append(worker.lose(deadlines[worker][1]))
        self._workers = [None if worker and worker.has_ended else worker for worker in self._workers]
        return [done for done in over if done]

    def close(self) -> None:
        """End all processes, whatever they do."""
        workers = [worker for worker in self._workers if worker]
        for worker in workers:
            worker.hang_up()
        for worker in workers:
            worker.stop()
        self._workers = [None] * len(self._workers)


class _Worker(Generic[Piece, Result]):
    """One process and the pipe to it."""

    def __init__(self, slot: int, context: str, *tasks: Callable[..., Any] | None):
        made = multiprocessing.get_context(context)
        self.pipe, theirs = made.Pipe()
        self._process = made.Process(target=_serve, args=(theirs, slot, *tasks), daemon=True)  # pyright: ignore[reportAttributeAccessIssue]
        self._process.start()
        theirs.close()
        self.slot, self._start = slot, _START[context]
        self._piece: tuple[int, Piece] | None = None
        self._since = time.monotonic()
        self._is_started = self.has_ended = False

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    @property
    def is_idle(self) -> bool:
        return self._piece is None

    def give(self, number: int, piece: Piece) -> bool:
        """Hand a piece over; False where an idle process is no longer there. One that dies at its start: see `read`."""
        try:
            self.pipe.send(piece)
        except OSError:
            if self._is_started:
                self.stop()
                return False
        self._piece, self._since = (number, piece), time.monotonic()
        return True

    def deadline(self, limit: Limit) -> tuple[float, str]:
        """When it is to be stopped, and why."""
        if self._is_started:
            return limit(self.slot, self._since)
        return self._since + self._start, f"did not start within {self._start:g} s"

    def read(self) -> Done[Piece, Result] | None:
        """What it says: that it has begun (its time runs from here), or a result; Lost where it has died."""
        try:
            said = self.pipe.recv()
        except Exception:  # cut off, or it died before what it shares could be taken over
            return self.lose(None)
        if not self._is_started:
            self._is_started, self._since = True, time.monotonic()
            return None
        result, is_leaving = said
        done = self._over(result, is_leaving)
        if is_leaving:
            self.stop()
        return done

    def lose(self, reason: str | None) -> Done[Piece, Result]:
        """End it; the reason is how it has ended if none is given.

        RuntimeError where it ended of itself before it began: another would do the same.
        """
        is_overdue, code = reason is not None and self._is_started, None
        if reason is None:
            self._process.join(1)
            code = self._process.exitcode
            if not self._is_started and code is not None and code > 0:
                raise RuntimeError(
                    "a process ended before it began to work (see its error above; a script that calls this needs "
                    "`if __name__ == '__main__':`)"
                )
            reason = f"its process died ({_ending(code)})"
        done = self._over(Lost(reason, is_overdue, is_killed=code == -signal.SIGKILL))
        self.stop()
        return done

    def hang_up(self) -> None:
        """An idle process leaves at that, a dead one has left."""
        self.pipe.close()

    def stop(self) -> None:
        """End it now."""
        self.has_ended = True
        self.hang_up()
        self._process.join(0.5 if self.is_idle else 0.1)
        self._process.kill()
        self._process.join(20)

    def _over(self, result: Result | Lost | Raised, is_last: bool = False) -> Done[Piece, Result]:
        assert self._piece is not None
        (number, piece), self._piece = self._piece, None
        return Done(number, piece, self.slot, result, is_last)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"{signal.Signals(-code).name}: a crash, or too little memory"
    return f"exit status {code}"


def _serve(
    pipe: Connection,
    slot: int,
    work: Callable[[Any], Any],
    begin: Callable[[int], None],
    is_spent: Callable[[], bool] | None,
) -> None:
    """A process's life: take a piece, send its result, until the parent hangs up or is gone."""
    begin(slot)
    with contextlib.suppress(EOFError, OSError):
        pipe.send(True)
        while True:
            piece = pipe.recv()
            try:
                result = work(piece)
            except Exception as error:
                result = Raised(_portable(error))
            is_leaving = bool(is_spent and is_spent())
            pipe.send((result, is_leaving))
            if is_leaving:
                with contextlib.suppress(EOFError):  # what it shares must outlive its being taken over
                    pipe.recv()
                return


def _portable(error: Exception) -> Exception:
    """The exception with its traceback as a note, and as a RuntimeError where it cannot be pickled."""
    text = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(text)
    return error


def _begin(_: int) -> None:
    """How a tool's process begins: Ctrl-C is the parent's affair, and it leaves when its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
