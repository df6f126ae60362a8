"""How far a long loop has come: a line of the log now and then, which `evals.run` shows."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import timedelta

SECONDS = 20.0  # between two lines; what is done sooner says nothing
log = logging.getLogger(__name__)


class Pace:
    """Rate of a loop and the time it still takes, from where this process began."""

    def __init__(self, what: str, total: int | None = None, *, done: int = 0) -> None:
        """`total` may not be known; `done` is what an earlier process did."""
        self.what, self.total, self._first = what, total, done
        self._begun = self._said = time.monotonic()

    def at(self, done: int, more: Callable[[], str] = str) -> None:
        """So much is done; `more` is asked for the rest of the line only when there is one."""
        now = time.monotonic()
        if now - self._said < SECONDS:
            return
        self._said = now
        rate = (done - self._first) / (now - self._begun)
        parts = [f"{self.what} {done}" + (f" of {self.total}" if self.total else ""), f"{rate:.2f} a second"]
        if self.total and rate:
            parts.append(f"{timedelta(seconds=round((self.total - done) / rate))} left")
        log.info("  %s", ", ".join([*parts, *filter(None, [more()])]))
