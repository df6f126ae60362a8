"""What the supervisor does with jobs whose ranks fail, refuse or are cancelled; ranks without a model, all at once."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.cluster_profile import ClusterProfile, load_profile
from launch.job_order import JobOrder
from launch.segments import Segment, read_segments
from launch.slurm_submit import setup_lines, srun_arguments
from tests.slurm.conftest import PrivateCluster, command, wait_until
from tests.slurm.orders import order_in

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[2]
GAP_S = 25.0  # after which a job that was put back into the queue would have started again


@dataclass
class Fake:
    """A job of two ranks on one node, in the script that people's jobs have."""

    order: JobOrder
    job: str

    @property
    def segments(self) -> list[Segment]:
        return read_segments(self.order.folder, self.job)

    @property
    def said(self) -> str:
        return (self.order.folder / f"{self.job}.out").read_text()


def start(folder: Path, *behaviour: str, max_restarts: int = 20) -> Fake:
    profile = load_profile("private_test", ["nodes=1", "tasks_per_node=2", "mem_gb=0.2"])
    order = order_in(folder, nodes=1, tasks_per_node=2, snapshot=ROOT, max_restarts=max_restarts)
    order.write()
    order.file("pkl").touch()
    order.file("sbatch").write_text(script(order, profile, behaviour))
    return Fake(order, command("sbatch", "--parsable", order.file("sbatch")))


def script(order: JobOrder, profile: ClusterProfile, behaviour: tuple[str, ...]) -> str:
    ranks = [sys.executable, "-m", "tests.slurm.fake_ranks", str(order.file("json")), *behaviour]
    options = ["--nodes=1", "--ntasks-per-node=2", "--partition=low", "--mem=200M", "--time=60", "--requeue"]
    options += ["--open-mode=append", "--signal=USR2@60", f"--output={order.folder}/%j.out"]
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), "export OMP_NUM_THREADS=1"]
    lines += setup_lines(order, profile, sys.executable)
    return "\n".join([*lines, shlex.join(["srun", *srun_arguments(profile), *ranks])]) + "\n"


@pytest.fixture(scope="module")
def fates(running_cluster: PrivateCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Fake]]:
    """Five jobs, over; in the time of the longest."""
    root = tmp_path_factory.mktemp("fates")
    good, bad = running_cluster.nodes[1], running_cluster.nodes[0]
    jobs = {"cancelled": start(root / "cancelled", "train_on")}
    ranks = [jobs["cancelled"].order.folder / f"training_{rank}" for rank in range(2)]
    wait_until(lambda: all(rank.exists() for rank in ranks), "no rank trains")
    command("scancel", jobs["cancelled"].job)
    cancelled = time.monotonic()
    command("scontrol", "update", f"nodename={good}", "state=drain", "reason=test")
    try:
        jobs["bad node"] = start(root / "bad_node", "crash_on", bad)
        jobs["crash loop"] = start(root / "crash_loop", "crash")
        jobs["refused"] = start(root / "refused", "refuse")
        jobs["capped"] = start(root / "capped", "crash", max_restarts=0)
        wait_until(lambda: len(jobs["bad node"].segments) == 2, "the job has not failed twice")
    finally:
        command("scontrol", "update", f"nodename={good}", "state=resume")
    for name in ("bad node", "crash loop", "refused", "capped"):
        running_cluster.over(jobs[name].job)
    time.sleep(max(0.0, GAP_S - (time.monotonic() - cancelled)))
    yield jobs
    running_cluster.clear()


def test_a_crash_loop_stops_with_its_reason(fates: dict[str, Fake], running_cluster: PrivateCluster) -> None:
    fake = fates["crash loop"]
    assert running_cluster.states(fake.job) == ["FAILED"]
    assert [segment.kind for segment in fake.segments] == ["crashed"] * 3
    assert [segment.restart for segment in fake.segments] == [0, 1, 2]
    assert fake.segments[1].decision.startswith("requeued: failure 2 of at most 3 without a newer checkpoint")
    last = fake.segments[2].decision
    assert last.startswith("stopped: 3 failures without a newer checkpoint (max_crashes=3, newest checkpoint step 0)")
    assert "ended without a word; srun's status is 3" in last
    assert last in fake.said


def test_a_node_that_fails_twice_is_avoided_from_then_on(
    fates: dict[str, Fake], running_cluster: PrivateCluster
) -> None:
    fake, (bad, good) = fates["bad node"], running_cluster.nodes
    assert running_cluster.states(fake.job) == ["COMPLETED"], fake.said
    assert [segment.nodes for segment in fake.segments] == [[bad], [bad], [good]]
    assert [segment.culprit for segment in fake.segments] == [bad, bad, None]
    assert [segment.excluded for segment in fake.segments] == [[], [bad], []]
    assert fake.segments[2].kind == "done"


def test_a_cancelled_job_never_comes_back(fates: dict[str, Fake], running_cluster: PrivateCluster) -> None:
    fake = fates["cancelled"]
    assert running_cluster.states(fake.job) == ["CANCELLED"]
    assert [segment.decision[:13] for segment in fake.segments] == ["left to SLURM"]
    assert "Restarts=0" in command("scontrol", "show", "job", fake.job)


def test_what_is_refused_is_not_tried_again(fates: dict[str, Fake], running_cluster: PrivateCluster) -> None:
    fake = fates["refused"]
    assert running_cluster.states(fake.job) == ["FAILED"]
    (segment,) = fake.segments
    assert (segment.kind, segment.status) == ("refused", 2)
    assert segment.reason.endswith("train.batch.video=7 is odd")
    assert "ExitCode=2:0" in command("scontrol", "show", "job", fake.job)


def test_restarts_are_capped(fates: dict[str, Fake], running_cluster: PrivateCluster) -> None:
    fake = fates["capped"]
    assert running_cluster.states(fake.job) == ["FAILED"]
    assert [segment.decision for segment in fake.segments] == ["stopped: restarted 0 times, max_restarts=0"]
