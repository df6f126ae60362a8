"""A hang leaves stacks and an exit status, a healthy run leaves nothing, and a slow rank is named."""

from __future__ import annotations

import faulthandler
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_pipeline.dataset import ClipDataset
from data_pipeline.in_flight import Attempt
from vjepa.train import watchdog
from vjepa.train.stragglers import StepClock, stragglers
from vjepa.train.watchdog import DUMP_SIGNAL, EXIT_HUNG, Watchdog, WatchdogConfig

ROOT = Path(__file__).resolve().parents[2]
PREAMBLE = """
    import ctypes, multiprocessing, os, sys, time
    from pathlib import Path
    from vjepa.train.watchdog import Watchdog, WatchdogConfig

    def say(text):
        print(text, flush=True)

    def watchdog(dump, abort):
        config = WatchdogConfig(dump_after_s=dump, abort_after_s=abort, first_step_factor=1.0)
        return Watchdog(config, Path(sys.argv[1]), 3, say=say)
"""


def in_process(folder: Path, source: str) -> subprocess.CompletedProcess[str]:
    """Run a script that has `watchdog(dump, abort)` of rank 3."""
    script = textwrap.dedent(PREAMBLE) + textwrap.dedent(source)
    command = [sys.executable, "-c", script, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def stacks(folder: Path, rank: int = 3) -> str:
    return (folder / "stacks" / f"rank_{rank}.txt").read_text()


LIMIT_S = 300.0


def limits(*, factor: float = 1.0) -> WatchdogConfig:
    """In this process: never abort it."""
    return WatchdogConfig(dump_after_s=LIMIT_S, abort_after_s=None, first_step_factor=factor)


def wait_for(found: Callable[[], bool]) -> None:
    """Returns when it is so; fails after two minutes."""
    deadline = time.monotonic() + 120
    while not found():
        assert time.monotonic() < deadline, "it did not happen within two minutes"
        time.sleep(0.005)


class Clock:
    """The watchdog's time, which passes only where a test says so, however busy the machine is."""

    def __init__(self) -> None:
        self.now, self._looks = 1000.0, 0

    def monotonic(self) -> float:
        self._looks += threading.current_thread().name == "watchdog"
        return self.now

    def passes(self, seconds: float) -> None:
        """So much later the watchdog has looked, and done what it does then."""
        self.now += seconds
        looks = self._looks
        wait_for(lambda: self._looks > looks + 1)  # a second look begins when the first is over


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=made.monotonic, strftime=time.strftime))
    monkeypatch.setattr(watchdog, "LONGEST_POLL_S", 0.01)
    return made


def seconds_without(text: str) -> float:
    """The seconds without progress that a line tells."""
    found = re.search(r"no progress for (\d+\.\d) s", text)
    assert found, text
    return float(found[1])


# --------------------------------------------------------------------------------------------------------------- hangs


def test_a_hang_writes_stacks_then_ends_with_its_status(tmp_path: Path) -> None:
    ended = in_process(
        tmp_path,
        """
        def hung_here():
            time.sleep(500)

        with watchdog(2.0, 4.0) as dog:
            dog.beat("forward", 7)
            hung_here()
        """,
    )
    assert ended.returncode == EXIT_HUNG, ended.stderr
    late, last = ended.stdout.splitlines()
    assert f"rank 3 on {os.uname().nodename}: no progress for " in late
    assert 2 <= seconds_without(late) <= 4 <= seconds_without(last)
    assert "in forward of step 7" in late
    assert str(tmp_path / "stacks" / "rank_3.txt") in late
    assert "ends with status 75" in last
    assert stacks(tmp_path).count("in hung_here") == 2
    assert f"no progress for {seconds_without(late)} s" in stacks(tmp_path)


def test_a_hang_that_holds_the_interpreters_lock_does_so_too(tmp_path: Path) -> None:
    ended = in_process(
        tmp_path,
        """
        def hung_here(library, mutex):
            library.pthread_mutex_lock(mutex)
            library.pthread_mutex_lock(mutex)

        with watchdog(2.0, 4.0) as dog:
            dog.beat("forward", 7)
            hung_here(ctypes.PyDLL(None), ctypes.create_string_buffer(64))
        """,
    )
    assert ended.returncode == EXIT_HUNG, ended.stderr
    assert ended.stdout == ""
    assert f"rank 3 on {os.uname().nodename}: no progress, and the interpreter does not answer" in ended.stderr
    assert stacks(tmp_path).count("in hung_here") == 1


def test_a_wait_for_data_is_named_once_and_so_is_its_end(tmp_path: Path, clock: Clock) -> None:
    said: list[str] = []
    with Watchdog(limits(), tmp_path, 0, say=said.append) as dog:
        dog.beat("forward", 4)
        dog.beat("data", 5)
        clock.passes(LIMIT_S)
        assert said == []
        clock.passes(1)
        clock.passes(2 * LIMIT_S)
        assert len(said) == 1
        dog.beat("forward", 5)
        clock.passes(LIMIT_S)
        clock.passes(0)
    assert "in data of step 5 (waiting for data: look at the storage" in said[0]
    assert "goes on, data of step 5 took 901 s at most" in said[1]
    assert len(said) == 2
    assert "test_a_wait_for_data_is_named_once" in stacks(tmp_path, 0)


def test_a_healthy_run_says_and_writes_nothing(tmp_path: Path, clock: Clock) -> None:
    said: list[str] = []
    with Watchdog(limits(), tmp_path, 0, say=said.append) as dog:
        for step in range(40):  # longer than the limit, in phases that are not
            dog.beat("data", step + 1)
            clock.passes(LIMIT_S)
    assert said == []
    assert stacks(tmp_path, 0) == ""


def test_the_first_step_may_take_longer(tmp_path: Path, clock: Clock) -> None:
    said: list[str] = []
    with Watchdog(limits(factor=50), tmp_path, 0, say=said.append) as dog:
        clock.passes(50 * LIMIT_S)
        dog.beat("forward", 11)  # of a resumed run
        clock.passes(50 * LIMIT_S)
        assert said == []
        dog.beat("forward", 12)
        clock.passes(LIMIT_S + 1)
    assert "in forward of step 12" in said[0]


def test_forked_children_and_later_starts_do_not_inherit_the_end(tmp_path: Path) -> None:
    ended = in_process(
        tmp_path,
        """
        with watchdog(1.5, 3.0) as dog:
            worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(4.5,))
            worker.start()
            child = os.fork()  # one that ends in the ordinary way, through the `with`
            if not child:
                time.sleep(4.5)
                sys.exit(5)
            step, status = 0, (0, 0)
            while worker.is_alive() or not status[0]:
                step += 1
                dog.beat("forward", step)
                status = status if status[0] else os.waitpid(child, os.WNOHANG)
                time.sleep(0.04)
            print(worker.exitcode, os.waitstatus_to_exitcode(status[1]))
        time.sleep(4.5)
        with watchdog(1.5, 3.0) as dog:
            dog.beat("save", 50)
            print("alive", flush=True)
            time.sleep(500)
        """,
    )
    assert ended.stdout.splitlines()[:2] == ["0 5", "alive"], ended.stdout + ended.stderr
    assert ended.returncode == EXIT_HUNG
    assert "in save of step 50" in ended.stdout.splitlines()[2]


def test_sigusr1_writes_stacks_of_a_running_process_and_is_let_go_after(tmp_path: Path) -> None:
    said: list[str] = []
    with Watchdog(limits(), tmp_path, 0, say=said.append) as dog:
        dog.beat("update", 8)
        os.kill(os.getpid(), DUMP_SIGNAL)
        wait_for(lambda: bool(said))
    assert "test_sigusr1_writes_stacks" in stacks(tmp_path, 0)
    assert "asked for by SIGUSR1, in update of step 8" in stacks(tmp_path, 0)
    assert not faulthandler.unregister(DUMP_SIGNAL)
    assert signal.getsignal(DUMP_SIGNAL) is signal.SIG_DFL


def test_a_full_disk_is_said_and_the_stacks_go_to_standard_error(
    small_disk: Path, clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    with Watchdog(limits(), small_disk, 0, say=said.append) as dog:
        with (small_disk / "filling").open("wb", buffering=0) as file, suppress(OSError):
            while file.write(b"0" * 65536):
                pass
        dog.beat("save", 5)
        clock.passes(LIMIT_S + 1)
        dog.beat("data", 6)
    assert "rank_0.txt could not be written (No space left on device)" in said[1]
    assert "test_a_full_disk_is_said" in capfd.readouterr().err


def test_a_folder_that_cannot_be_made_stops_no_run(
    tmp_path: Path, clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stacks").write_text("a file in the way")
    said: list[str] = []
    with Watchdog(limits(), tmp_path, 0, say=said.append) as dog:
        dog.beat("data", 2)
        clock.passes(LIMIT_S + 1)
    assert len(said) == 3
    assert "cannot be written (File exists): stacks go to standard error" in said[0]
    assert "test_a_folder_that_cannot_be_made" in capfd.readouterr().err


def test_a_fault_in_what_it_tells_stops_neither_run_nor_watching(tmp_path: Path, clock: Clock) -> None:
    said: list[str] = []

    def broken(text: str) -> None:
        said.append(text)
        raise BrokenPipeError

    with Watchdog(limits(), tmp_path, 0, say=broken) as dog:
        for step in (1, 2):
            dog.beat("data", step)
            clock.passes(LIMIT_S + 1)
            assert any(f"in data of step {step} " in text for text in said)


def test_a_sign_of_life_costs_microseconds(tmp_path: Path) -> None:
    with Watchdog(limits(), tmp_path, 0, say=print) as dog:
        taken = math.inf
        for _ in range(5):
            begin = time.thread_time()  # other processes' load is not the claim
            for _ in range(2000):
                dog.beat("forward", 1)
            taken = min(taken, (time.thread_time() - begin) / 2000)
    assert taken < 50e-6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dump_after_s": 0.0}, "dump_after_s=0.0 must be a positive number"),
        ({"dump_after_s": 60.0, "abort_after_s": 60.0}, "abort_after_s=60.0 must be more than dump_after_s=60.0"),
        ({"first_step_factor": 0.5}, "first_step_factor=0.5 must be at least 1"),
        ({"straggler_ratio": math.nan}, "straggler_ratio=nan must be at least 1"),
    ],
)
def test_a_watchdog_that_could_not_work_is_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"watchdog.{message}"):
        WatchdogConfig(**fields)


# ---------------------------------------------------------------------------------------------------------- stragglers


def test_a_slow_rank_is_named_with_its_figure() -> None:
    per_rank = [[0.01, 0.40], [0.01, 0.42], [0.31, 0.41], [0.02, 0.90]]
    hosts = ["n1", "n1", "n2", "n2"]
    data, forward = stragglers(per_rank, hosts, 1.5)
    assert "rank 2 on n2 is slow: waiting for data takes it 0.310 s" in data
    assert "median rank 0.010 s" in data
    assert "storage" in data
    assert "rank 3 on n2 is slow: forward pass takes it 0.900 s per micro-batch, the median rank 0.410 s" in forward
    assert "nvidia-smi" in forward


def test_of_two_ranks_the_slower_is_named_and_equal_or_short_ones_are_not() -> None:
    assert len(stragglers([[0.0, 0.2], [0.0, 0.9]], ["a", "b"], 1.5)) == 1
    assert stragglers([[0.5, 0.9]] * 3, ["a", "b", "c"], 1.5) == []
    assert stragglers([[0.001, 0.1], [0.01, 0.14]], ["a", "b"], 1.1) == []  # 9 and 40 ms are no matter
    assert stragglers([[0.5, 0.9]], ["alone"], 1.5) == []


def test_the_step_clock_gives_means_since_it_was_last_read(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([5.0, 5.5, 7.0, 8.5])
    monkeypatch.setattr("vjepa.train.stragglers.time", SimpleNamespace(perf_counter=times.__next__))
    clock = StepClock(torch.device("cpu"))
    for seconds in (0.02, 0.06):
        clock.waited(seconds)
        with clock.forward():
            pass
    assert clock.drain() == pytest.approx([0.04, 1.0])
    assert clock.drain() == [0.0, 0.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="timing by CUDA events needs a CUDA device")
def test_the_step_clock_times_the_device_on_cuda() -> None:
    clock = StepClock(torch.device("cuda"))
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(3):
        with clock.forward():
            for _ in range(20):
                x = (x @ x).tanh()
    torch.cuda.synchronize()
    assert clock.drain()[1] > 1e-4


# ---------------------------------------------------------------------------------------------------- in a training run


def test_a_run_whose_data_stops_coming_leaves_stacks_and_goes_on(
    debug_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = ClipDataset._load

    def slow(self: ClipDataset, attempt: Attempt, *rest: Any) -> Any:
        if attempt[:2] == ("video", 30):
            wait_for(lambda: "in data of step 3" in stacks(tmp_path / "run", 0))
        return load(self, attempt, *rest)

    monkeypatch.setattr(ClipDataset, "_load", slow)
    limits = ("train.watchdog.dump_after_s=0.5", "train.watchdog.abort_after_s=600")
    run = debug_run(tmp_path / "run", "train.steps=5", *limits)
    told = stacks(run, 0)
    assert "in data of step 3" in told
    assert "in slow" in told, "the stack says where"
    assert (run / "summary.json").is_file()


def test_a_healthy_run_leaves_no_stacks(debug_run: Callable[..., Path], tmp_path: Path) -> None:
    run = debug_run(tmp_path / "run", "train.steps=3")
    assert (run / "stacks" / "rank_0.txt").read_text() == ""
