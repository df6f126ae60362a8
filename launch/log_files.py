"""The logs of a run's ranks: RUN/job/JOB/JOB_RANK_log.out, appended by every restart of a job."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from launch.job_order import read_jobs

POLL_S = 0.5


class Tail:
    """Complete lines that were added to a file since the last look."""

    def __init__(self, path: Path) -> None:
        self.path, self._position, self._rest = path, 0, b""

    def skip(self) -> None:
        """Begin at the file's end."""
        self._position = self.path.stat().st_size if self.path.exists() else 0

    def read(self, is_last: bool) -> list[str]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            if self.path.stat().st_size < self._position:  # cut back by a resume
                self._position, self._rest = self.path.stat().st_size, b""
            file.seek(self._position)
            text = self._rest + file.read()
            self._position = file.tell()
        lines = text.split(b"\n")
        self._rest = b"" if is_last else lines.pop()
        return [line.decode(errors="replace") for line in lines if line]


def newest_log(root: Path, rank: int, stage: str | None = None) -> Path | None:
    """The log of that rank that was written to last, of one stage or of all; None where there is none yet.

    Where no rank has come to write, what the job's script itself has said.
    """
    folders = _folders(root, stage)
    found = [path for folder in folders for path in folder.glob(f"*_{rank}_log.out")]
    found = found or [path for folder in folders if (path := folder.with_suffix(".out")).is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _folders(root: Path, stage: str | None) -> list[Path]:
    """Of all jobs, or of one stage's; local stages of a chain keep theirs in their own folders."""
    jobs = read_jobs(root)
    if jobs:
        numbers = {row["job"] for row in jobs if stage in (None, row["stage"])}
        elements = {path.stem for number in numbers for path in (root / "job").glob(f"{number}_*.out")}
        return [root / "job" / number for number in numbers | elements]
    parents = [root / stage, root] if stage is not None and (root / stage).is_dir() else [root, *root.iterdir()]
    return [path for parent in parents for path in parent.glob("job/*") if path.is_dir()]


def print_log(path: Path) -> None:
    print(f"==> {path}", flush=True)
    print(path.read_text(errors="replace"), end="", flush=True)


def follow(root: Path, rank: int, stage: str | None, *, is_live: Callable[[], bool]) -> None:
    """Print lines as they come; a log that another job begins is gone over to. Ends when nothing is alive any more."""
    tail: Tail | None = None
    while True:
        is_over = not is_live()
        path = newest_log(root, rank, stage)
        if path is not None and (tail is None or path != tail.path):
            if tail is not None:
                _print(tail, is_last=True)
            tail = Tail(path)
            print(f"==> {path}", flush=True)
        if tail is not None:
            _print(tail, is_last=is_over)
        if is_over:
            return
        time.sleep(POLL_S)


def _print(tail: Tail, *, is_last: bool) -> None:
    for line in tail.read(is_last):
        print(line, flush=True)
