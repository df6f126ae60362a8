"""Trainings as processes of a command that starts several: what they print, and the signals that reach them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Self

SUBMIT = Path(__file__).parent / "submit.py"


def training(*arguments: str) -> list[str]:
    """The command of one training on this machine, which ends when this process is gone."""
    return [sys.executable, str(SUBMIT), f"--owner={os.getpid()}", "--cluster=local", *arguments]


class Trainings:
    """Runs trainings from any thread; within it, Ctrl-C and SIGTERM are passed on to all of them, which save first.

    Each is a session of its own: Ctrl-C reaches it once, from here; a second one kills it.
    """

    def __init__(self) -> None:
        self.stopped_by: int | None = None
        """The signal after which nothing more is started."""
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.RLock()  # a signal handler runs in the thread that may hold it
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        self._before = {signum: signal.signal(signum, self._receive) for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # pyright: ignore[reportArgumentType]

    def _receive(self, signum: int, _frame: FrameType | None) -> None:
        self.stop(signum)

    def stop(self, signum: int) -> None:
        """Pass a signal on to all that run and start no more."""
        with self._lock:
            self.stopped_by = signum
            for process in list(self._running):
                process.send_signal(signum)

    def run(self, command: Sequence[str], *, prefix: str = "", log: IO[str] | None = None) -> int:
        """Run a command to its end; its exit status, or 128 + the signal where nothing is started any more.

        What it prints goes to `log`, or here, each line behind `prefix`.
        """
        pipe = subprocess.PIPE if prefix and log is None else None
        output = log if log is not None else pipe
        errors = subprocess.STDOUT if log is not None else None
        with self._lock:
            if self.stopped_by is not None:
                return 128 + self.stopped_by
            process = subprocess.Popen(command, stdout=output, stderr=errors, text=True, start_new_session=True)
            self._running.add(process)
        for line in process.stdout or ():
            print(prefix + line, end="", flush=True)
        status = process.wait()
        with self._lock:
            self._running.discard(process)
        return status
