"""Once training has begun, signals set a flag and nothing else; the ranks agree on it at a step boundary."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StoppedEarly(KeyboardInterrupt):
    """A stop signal came before the first step: there is nothing to save."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} before the first step: nothing is lost")
        self.signum = signum


class StopFlag:
    """Which of STOP_SIGNALS this process has received."""

    def __init__(self, *, is_early: bool = False) -> None:
        self._received: set[int] = set()
        self.is_early = is_early  # training has not begun: a signal ends the process at once

    def set(self, signum: int, frame: FrameType | None = None) -> None:
        self._received.add(signum)
        if self.is_early:
            raise StoppedEarly(signum)

    def as_list(self) -> list[float]:
        """One 0 or 1 per stop signal, to be summed over ranks."""
        return [float(signum in self._received) for signum in STOP_SIGNALS]


@contextmanager
def catch_stop_signals() -> Iterator[StopFlag]:
    """Within it the stop signals set the flag; a second Ctrl-C is as mild as the first.

    Until the trainer takes `is_early` back they raise StoppedEarly: preparing data may take long.
    """
    flag = StopFlag(is_early=True)
    if threading.current_thread() is not threading.main_thread():
        yield flag  # Python delivers signals to the main thread only
        return
    previous = {signum: signal.signal(signum, flag.set) for signum in STOP_SIGNALS}
    try:
        yield flag
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
