"""A run that hangs says where: stacks of all threads in the run's folder, and later ends with a status to requeue on.

Two layers. A thread of this process looks at the last sign of life and writes, says and ends. Where it cannot run,
because an extension holds the interpreter's lock, timers of the kernel do the same with less to say. Signs of life
put the timers off; a process that was suspended for longer than `abort_after_s` (SIGSTOP) is ended by them too.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import math
import os
import platform
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

from vjepa.train.timers import Timer

EXIT_HUNG = 75  # exit status of a process that its watchdog ended: EX_TEMPFAIL of sysexits.h, "try again"
DUMP_SIGNAL = signal.SIGUSR1  # asks a running rank for its stacks; the stop signals are others (signals.py)
LONGEST_POLL_S = 1.0
STDERR = 2

HINTS = {
    "start": "workers start, blocks are compiled",
    "data": "waiting for data: look at the storage, data.workers and data.prefetch",
    "forward": "a kernel or a collective: compare the stacks of the other ranks",
    "backward": "a kernel or a collective: compare the stacks of the other ranks",
    "update": "a kernel or a collective: compare the stacks of the other ranks",
    "save": "writing a checkpoint: look at the file system, and for a rank that did not come to it",
}


@dataclass
class WatchdogConfig:
    """When a run counts as hung, and a rank as slow."""

    dump_after_s: float = 300.0  # a phase of a step, a wait for data or a save that lasts longer: stacks are written
    abort_after_s: float | None = 1800.0  # after so long the process ends with exit status 75; null: it never does
    first_step_factor: float = 4.0  # times longer for the first step: compilation, start of workers
    straggler_ratio: float = 1.5  # a rank whose seconds exceed the median rank's so many times is named

    def __post_init__(self) -> None:
        if not (self.dump_after_s > 0 and math.isfinite(self.dump_after_s)):
            raise ValueError(f"watchdog.dump_after_s={self.dump_after_s} must be a positive number of seconds")
        if self.abort_after_s is not None and not self.dump_after_s < self.abort_after_s < math.inf:
            raise ValueError(
                f"watchdog.abort_after_s={self.abort_after_s} must be more than dump_after_s={self.dump_after_s}, so "
                "that the stacks are written first; null: never abort"
            )
        for name in ("first_step_factor", "straggler_ratio"):
            if not (getattr(self, name) >= 1 and math.isfinite(getattr(self, name))):
                raise ValueError(f"watchdog.{name}={getattr(self, name)} must be at least 1")


class Beat(NamedTuple):
    """A sign of life: what began, in which step (counted from 1; 0 before the first), and when."""

    phase: str
    step: int
    at: float  # time.monotonic()


class Watchdog:
    """Watches this rank from `__enter__` to `__exit__`; nothing in it stops a run that goes on.

    `say` gets one line at a time, in a thread of the watchdog, on every rank. SIGUSR1 asks for the stacks at any time.
    """

    def __init__(self, config: WatchdogConfig, folder: Path, rank: int, *, say: Callable[[str], None]) -> None:
        self.config, self.path, self._say = config, folder / "stacks" / f"rank_{rank}.txt", say
        self.name = f"rank {rank} on {platform.node()}"
        self._poll = min(LONGEST_POLL_S, config.dump_after_s / 10)
        self._first_step: int | None = None
        self._beat = Beat("start", 0, time.monotonic())
        self._reported: Beat | None = None  # after which the stacks were written
        self._stop = threading.Event()

    def __enter__(self) -> Watchdog:
        self._file = self._open()
        self._size = self._file_size()
        faulthandler.register(DUMP_SIGNAL, file=self._file or STDERR, all_threads=True)
        self._backup = self._make_backup()
        self._stop.clear()
        self._first_step = self._reported = None
        self.beat("start", 0)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._backup is not None:
            self._backup.close()
        self._thread.join(timeout=10 * self._poll)  # it may be in a `say` that does not return
        faulthandler.unregister(DUMP_SIGNAL)
        if self._file is not None and not self._thread.is_alive():
            self._file.close()

    def beat(self, phase: str, step: int) -> None:
        """A phase of a step begins (steps count from 1): whatever was before it did not hang."""
        now = time.monotonic()
        if self._first_step is None and step:
            self._first_step = step
        self._beat = Beat(phase, step, now)
        if self._backup is not None and now >= self._backup.arm_at:
            self._arm(now)

    def _patience(self, beat: Beat) -> float:
        """How many times longer than configured this beat's phase may last."""
        return self.config.first_step_factor if beat.step in (0, self._first_step) else 1.0

    # ---------------------------------------------------------------------------------- timers, for a stuck interpreter

    def _make_backup(self) -> _Backup | None:
        text = f"{self.name}: no progress, and the interpreter does not answer: its stacks are in {self.path}; ends "
        try:
            return _Backup(f"{text}with status {EXIT_HUNG}. The C library's last error", slack_s=4 * self._poll)
        except OSError as error:
            self._tell(f"{self.name}: only hangs that leave the interpreter free will be seen ({error})")
            return None

    def _arm(self, now: float) -> None:
        assert self._backup is not None
        patience = self._patience(self._beat)
        abort = self.config.abort_after_s
        try:
            self._backup.arm(self.config.dump_after_s * patience, None if abort is None else abort * patience)
        except OSError as error:
            self._backup.close()
            self._backup = None
            self._tell(f"{self.name}: only hangs that leave the interpreter free will be seen ({error})")
        else:
            self._backup.arm_at = now + self._poll

    # ---------------------------------------------------------------------------------------------- the watching thread

    def _watch(self) -> None:
        said = ""
        while not self._stop.wait(self._poll):
            try:
                self._look()
            except Exception as error:  # a fault of the watchdog must neither end the run nor the watching
                text = f"{self.name}: watchdog: {type(error).__name__}: {error}"
                if text != said:  # it may come back at every look
                    self._tell(text)
                said = text

    def _look(self) -> None:
        beat, patience, abort = self._beat, self._patience(self._beat), self.config.abort_after_s
        late = time.monotonic() - beat.at
        if self._reported is not None and self._reported is not beat:
            self._tell(
                f"{self.name}: goes on, {_place(self._reported)} took {beat.at - self._reported.at:.0f} s at most"
            )
            self._reported = None
        if abort is not None and late > abort * patience:
            self._report(beat, late, end=f"; ends with status {EXIT_HUNG}, start it again with --resume")
            if self._beat is beat and not self._stop.is_set():
                os._exit(EXIT_HUNG)  # the interpreter's own end would wait for the thread that hangs
        elif late > self.config.dump_after_s * patience and self._reported is not beat:
            self._reported = beat
            self._report(beat, late)
            if self._backup is not None:
                self._backup.spare_dump()
        self._note_asked_stacks()

    def _report(self, beat: Beat, late: float, *, end: str = "") -> None:
        what = f"{self.name}: no progress for {_seconds(late)} in {_place(beat)}"
        hint = HINTS.get(beat.phase)
        self._tell(f"{what}{f' ({hint})' if hint else ''}; stacks of all threads: {self.path}{end}")
        try:
            if self._file is None:
                raise OSError(errno.ENOENT, "the file could not be opened")
            self._write(f"\n=== {_now()} {what}\n")
            faulthandler.dump_traceback(self._file, all_threads=True)
            self._write("=== end of these stacks\n")
        except OSError as error:
            self._tell(f"{self.name}: {self.path} could not be written ({error.strerror}): stacks on standard error")
            faulthandler.dump_traceback(STDERR, all_threads=True)
        self._size = self._file_size()

    def _note_asked_stacks(self) -> None:
        """Say that a signal, or a timer in a stuck interpreter, had stacks written."""
        size = self._file_size()
        if size > self._size:
            self._size = size
            self._write(f"=== {_now()} those were asked for by {DUMP_SIGNAL.name}, in {_place(self._beat)}\n")
            self._size = self._file_size()
            self._tell(f"{self.name}: stacks of all threads, asked for by {DUMP_SIGNAL.name}: {self.path}")

    def _tell(self, text: str) -> None:
        with suppress(Exception):  # a closed pipe or full disk under `say` has nowhere to be said, and stops no run
            self._say(text)

    # --------------------------------------------------------------------------------------------------------- the file

    def _open(self) -> IO[bytes] | None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return self.path.open("ab", buffering=0)
        except OSError as error:
            self._tell(f"{self.name}: {self.path} cannot be written ({error.strerror}): stacks go to standard error")
            return None

    def _file_size(self) -> int:
        return 0 if self._file is None else os.fstat(self._file.fileno()).st_size

    def _write(self, text: str) -> None:
        assert self._file is not None
        data = text.encode()
        if self._file.write(data) < len(data):  # a disk takes what fits
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _Backup:
    """Timers that need no interpreter: one has the stacks written, one prints a line, one ends the process."""

    def __init__(self, text: str, *, slack_s: float) -> None:
        self.arm_at = 0.0  # when a beat should arm them anew
        self._slack_s = slack_s  # the thread comes first, and beats in between do not arm
        self._text = ctypes.create_string_buffer(text.encode())
        self._dump = Timer.signalling(DUMP_SIGNAL)
        self._print = Timer.calling("perror", ctypes.addressof(self._text))
        self._end = Timer.calling("_exit", EXIT_HUNG)

    def arm(self, dump_after_s: float, abort_after_s: float | None) -> None:
        self._dump.arm(dump_after_s + self._slack_s)
        if abort_after_s is not None:
            self._print.arm(abort_after_s + self._slack_s)
            self._end.arm(abort_after_s + 2 * self._slack_s)

    def spare_dump(self) -> None:
        self._dump.arm(0)

    def close(self) -> None:
        for timer in (self._end, self._print, self._dump):
            timer.close()


def _place(beat: Beat) -> str:
    return f"{beat.phase} of step {beat.step}" if beat.step else f"{beat.phase}, before the first step"


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
