"""How far an embedding has come: a bar where there is a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

PLAIN_LINE_EVERY_S = 5.0


class EmbedProgress:
    """Files, percent of the present one, frames a second, time left for it. On standard error."""

    def __init__(self, num_files: int) -> None:
        self._num_files, self._head = num_files, ""
        self._begun, self._first = time.monotonic(), 0
        self._last_line = -PLAIN_LINE_EVERY_S
        self._console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, disable=not sys.stderr.isatty())
        self._task = self._bar.add_task("", total=None, rate="")

    def __enter__(self) -> EmbedProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, number: int, name: str) -> None:
        self._head = f"{number + 1}/{self._num_files} {name}"
        self._begun, self._first = time.monotonic(), -1
        self._bar.reset(self._task, description=self._head.replace("[", r"\["), total=None, rate="")

    def update(self, name: str, done: int, total: int) -> None:
        if self._first < 0:  # what an earlier run did is not this one's speed: counting starts with the first batch
            self._begun, self._first = time.monotonic(), done
        rate = (done - self._first) / max(1e-9, time.monotonic() - self._begun)
        self._bar.update(self._task, completed=done, total=total, rate=f"{rate:.1f} frames/s")
        if self._bar.disable and (time.monotonic() - self._last_line >= PLAIN_LINE_EVERY_S or done == total):
            self._last_line = time.monotonic()
            left = f"{(total - done) / rate:.0f} s" if rate > 0 else "?"
            said = f"{self._head}  {100 * done / total:.0f} %  {rate:.1f} frames/s  ETA {left}"
            print(said, file=sys.stderr, flush=True)

    def message(self, text: str) -> None:
        """A line of its own, above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
