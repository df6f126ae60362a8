"""Where numbers go: metrics.jsonl at full precision, TensorBoard, and a progress display for people."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vjepa.train.run_dir import RunDirError

PLAIN_LINE_EVERY_S = 5.0


class MetricsWriter:
    """Appends one JSON object per logged step and mirrors it to TensorBoard. For the main rank only."""

    def __init__(self, path: Path, *, start_step: int, tensorboard: bool) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._board = None
        if tensorboard:
            from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
            from torch.utils.tensorboard import SummaryWriter  # costs a second of import

            self._new_summary = Summary
            self._board = SummaryWriter(str(path.parent), purge_step=start_step + 1 if start_step else None)

    def write(self, row: Mapping[str, float | int]) -> None:
        """Write a row with at least `step`; it reaches the operating system before this returns."""
        line = (json.dumps(row) + "\n").encode()
        try:
            written = self._file.write(line)
            if written < len(line):  # a disk takes what fits, and says at the next byte that it is full
                self._file.write(line[written:])
        except OSError as error:
            raise RunDirError(
                f"{self._path} could not be written at step {row['step']} ({error.strerror}): make room or mend the "
                "disk, then --resume"
            ) from error
        if self._board is not None and self._board.file_writer is not None:
            self._board.file_writer.add_summary(self._summary(row), int(row["step"]))

    def _summary(self, row: Mapping[str, float | int]) -> Any:
        """The whole row as one TensorBoard record; one for each number costs 26 us each, here it is 0.5."""
        summary = self._new_summary()
        for name, value in row.items():
            if name != "step":
                summary.value.add(tag=name, simple_value=value)
        return summary

    def sync(self) -> None:
        """Flush to the disk itself: before a checkpoint, so that no row behind it can be lost with the power."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


class ProgressDisplay:
    """A rich bar where there is a terminal, otherwise a plain line every few seconds."""

    def __init__(self, total_steps: int, start_step: int, *, title: str) -> None:
        self._total, self._title = total_steps, title
        self._last_line = -PLAIN_LINE_EVERY_S
        self._started, self._start_step = time.monotonic(), start_step
        self._progress: Progress | None = None
        if sys.stdout.isatty():
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=Console(file=sys.stdout),
            )
            self._task = self._progress.add_task(title, total=total_steps, completed=start_step, status="")
            self._progress.start()

    def update(self, row: Mapping[str, Any]) -> None:
        """Show a logged row."""
        loss, waited = row.get("loss", math.nan), 100 * row["data_wait"]  # a skipped step may have none
        status = f"loss {loss:.4f}  {row['clips_per_second']:.1f} clips/s  data wait {waited:.0f} %"
        if self._progress is not None:
            self._progress.update(self._task, completed=row["step"], status=status)
        elif time.monotonic() - self._last_line >= PLAIN_LINE_EVERY_S or row["step"] == self._total:
            self._last_line = time.monotonic()
            print(f"{self._title} step {row['step']}/{self._total}  {status}  ETA {self._eta(row['step'])}", flush=True)

    def _eta(self, step: int) -> str:
        done = max(1, step - self._start_step)
        seconds = (time.monotonic() - self._started) / done * (self._total - step)
        return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86_400 else f"{seconds / 86_400:.1f} days"

    def message(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
