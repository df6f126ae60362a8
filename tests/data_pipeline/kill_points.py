"""Kill an ingest at every one of its steps on disk, start it again, compare: `python kill_points.py INPUTS WORK`.

A process of its own, so that it may fork. Prints the number of points at which it was killed.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import webdataset.writer  # noqa: F401  (imported late by what is tested, and here before the steps are counted)

from data_pipeline.prepare.ingest import ingest
from data_pipeline.prepare.options import IngestOptions

STEPS = ("rename", "replace", "fsync", "unlink", "mkdir", "rmdir")
OPTIONS = IngestOptions(shard_count=2, stills=1, preset="ultrafast")


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(inputs: Path, out: Path, *, kill_at: int) -> bool:
    """Ingest in a forked process that dies just before its step `kill_at`; whether it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            _arm(kill_at)
            ingest([inputs], out, OPTIONS)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the ingest failed"
    return not os.WIFSIGNALED(status)


def _arm(kill_at: int) -> None:
    done = 0

    def counted(step: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **named: Any) -> Any:
            nonlocal done
            done += 1
            if done == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments, **named)

        return counting

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))


def main(inputs: Path, work: Path) -> int:
    """Every kill point in turn, each from the start."""
    assert run(inputs, work / "undisturbed", kill_at=-1)
    wanted = content(work / "undisturbed")
    point, out = 0, work / "out"
    while True:
        point += 1
        finished = run(inputs, out, kill_at=point)
        if not finished:
            assert run(inputs, out, kill_at=-1)
        assert content(out) == wanted, f"other bytes after a kill at step {point}"
        left = sorted(path.name for path in work.iterdir())
        assert left == ["out", "undisturbed"], f"left behind after a kill at step {point}: {left}"
        shutil.rmtree(out)
        if finished:
            print(point - 1)
            return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), Path(sys.argv[2])))
