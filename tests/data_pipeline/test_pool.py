"""Claims: results come in order; what kills or hangs its process is lost alone, and named; errors come through."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import pool
from data_pipeline.pool import Lost, in_order


def work(piece: object) -> object:
    """Squares numbers; a signal kills the process, a string is what it says."""
    if isinstance(piece, signal.Signals):
        os.kill(os.getpid(), piece)
    if piece == "hang":
        time.sleep(600)
    if piece == "raise":
        raise ValueError("this piece is wrong")
    if isinstance(piece, float):
        time.sleep(piece)
        return piece
    assert isinstance(piece, int)
    return piece * piece


def test_results_come_in_the_order_of_the_pieces_whoever_is_faster():
    pieces = [0.3, 1, 2, 3, 4, 5]
    results = list(in_order(work, pieces, jobs=2, timeout=30))
    assert results == [(0.3, 0.3), (1, 1), (2, 4), (3, 9), (4, 16), (5, 25)]


def test_what_kills_or_hangs_a_process_is_lost_alone():
    pieces = [1, signal.SIGKILL, 2, signal.SIGSEGV, "hang", 3]
    results = dict(in_order(work, pieces, jobs=2, timeout=5))
    assert [results[number] for number in (1, 2, 3)] == [1, 4, 9]
    lost = {piece: result.reason for piece, result in results.items() if isinstance(result, Lost)}
    assert "SIGKILL" in lost[signal.SIGKILL]
    assert "SIGSEGV" in lost[signal.SIGSEGV]
    assert lost["hang"] == "took longer than 5 s and was stopped"
    assert len(lost) == 3


def test_a_process_that_is_killed_before_it_gets_its_piece_is_lost_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    start, started = pool._Worker.__init__, list[int]()

    def killed_at_once(self: pool._Worker, *arguments: Any) -> None:
        start(self, *arguments)
        started.append(self.pid)
        if len(started) == 1:
            self._process.kill()
            self._process.join()

    monkeypatch.setattr(pool._Worker, "__init__", killed_at_once)
    (_, lost), (_, nine) = in_order(work, [2, 3], jobs=2, timeout=120)
    assert isinstance(lost, Lost)
    assert "SIGKILL" in lost.reason
    assert (nine, len(started)) == (9, 2)


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_exception_comes_through(jobs: int):
    with pytest.raises(ValueError, match="this piece is wrong"):
        list(in_order(work, [1, "raise", 2], jobs=jobs, timeout=30))


def test_pieces_are_not_taken_far_ahead_of_the_one_that_is_waited_for():
    taken = []
    results = in_order(work, (taken.append(piece) or piece for piece in [1.0, *range(10_000)]), jobs=2, timeout=30)
    assert next(results) == (1.0, 1.0)
    assert len(taken) < 100
    assert isinstance(results, Generator)
    results.close()


def test_the_processes_end_with_the_parent_even_when_it_is_killed():
    code = (
        "import os, sys; sys.path[:0] = sys.argv[1:]\nfrom test_pool import alive\nif __name__ == '__main__': alive()"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", code, str(here), str(here.parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(command[3:])}
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60
    while is_running(child):
        assert time.monotonic() < deadline, f"process {child} is still there a minute after its parent was killed"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def tell_and_hang(_: object) -> int:
    """Say who we are, then stay."""
    print(os.getpid(), flush=True)
    time.sleep(600)
    return 0


def alive() -> None:
    """A parent whose process is at work."""
    list(in_order(tell_and_hang, [1, 2], jobs=2, timeout=600))
