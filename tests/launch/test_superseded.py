"""A supervisor whose node was taken for dead, and whose job runs again elsewhere: it touches nothing."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch import after_job, scheduler
from launch.job_order import JobOrder
from launch.scheduler import NoAnswerError
from launch.segments import read_segments
from tests.slurm.orders import order_in


@pytest.fixture
def order(tmp_path: Path) -> JobOrder:
    """Of a job of two ranks that have left no note."""
    order = order_in(tmp_path, nodes=2, tasks_per_node=1, snapshot=tmp_path)
    order.write()
    return order


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What SLURM says of job 7 to its second start; a requeue is written there too."""
    told = {"JobState": "RUNNING", "Restarts": "1"}
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "tn[1-2]", "SLURM_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(scheduler, "describe", lambda job, **_: told)
    monkeypatch.setattr(scheduler, "host_names", lambda nodes, **_: ["tn1", "tn2"])
    monkeypatch.setattr(scheduler, "down_nodes", lambda nodes: [])
    monkeypatch.setattr(scheduler, "requeue", lambda job: told.update(requeued=job))
    monkeypatch.setattr(after_job, "DONE_S", 0.0)
    monkeypatch.setattr(after_job, "KILLED_WITHIN_S", 0.3)
    monkeypatch.setattr(after_job, "BETWEEN_TRIES_S", 0.0)
    return told


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """The supervisor sets two for the whole process."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR2)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def end(order: JobOrder) -> int:
    return after_job.main([str(order.file("json")), "137"])


def test_the_supervisor_of_the_running_start_decides(order: JobOrder, slurm: dict[str, str]):
    assert end(order) == 0
    assert slurm["requeued"] == "7"
    (segment,) = read_segments(order.folder)
    assert (segment.restart, segment.kind) == (1, "crashed")


def test_a_superseded_one_requeues_nothing_and_writes_nothing(
    order: JobOrder, slurm: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    slurm["Restarts"] = "2"
    assert end(order) == 0
    assert "requeued" not in slurm
    assert read_segments(order.folder) == []
    assert "start 1 of job 7 was given up for lost; a later one runs" in capsys.readouterr().err


def test_it_looks_again_after_it_has_waited_for_notes(
    order: JobOrder, slurm: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    def judged(*arguments: object, real: Callable[..., object] = after_job.judge, **more: object) -> object:
        slurm["Restarts"] = "2"
        return real(*arguments, **more)

    monkeypatch.setattr(after_job, "judge", judged)
    end(order)
    assert "requeued" not in slurm
    assert read_segments(order.folder) == []


def test_a_requeue_that_was_heard_though_no_answer_came_is_not_asked_for_twice(
    order: JobOrder, slurm: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []

    def requeue(job: str) -> None:
        asked.append(job)
        slurm["Restarts"] = "2"  # it runs again already
        raise NoAnswerError("Socket timed out on send/recv operation")

    monkeypatch.setattr(scheduler, "requeue", requeue)
    end(order)
    assert asked == ["7"]


def test_a_start_that_ends_because_slurm_requeued_it_is_written_down(order: JobOrder, slurm: dict[str, str]):
    slurm.update(JobState="COMPLETING", Restarts="2")  # counted already, the later start does not run yet
    end(order)
    (segment,) = read_segments(order.folder)
    assert segment.decision == "left to SLURM, which says COMPLETING"
