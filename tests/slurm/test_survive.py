"""Real trainings that are preempted, run out of time, lose a node or hang: they come back and end as if undisturbed."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.prepare.synthetic import make_debug_shards
from launch.cluster_profile import CLUSTERS
from launch.scheduler import describe
from launch.segments import newest_checkpoint, read_begin
from tests.slurm.conftest import PATIENCE_S, PrivateCluster, command, wait_until
from tests.slurm.trainings import Training, ranks_of, train

pytestmark = [pytest.mark.slurm, pytest.mark.slurm_long, pytest.mark.timeout(1200)]
LONG = 120  # of two runs that are preempted together: the faster one makes up to 45 while the other starts again
SHORT = 48  # of a run that is to lose its node before it is done
LIMIT_AWAY_S = 40
LONGER = 200  # steps of a run that is to meet its time limit
GRACE = {"low": 10, "low0": 0}  # partitions and the seconds that they give a preempted job
PREEMPTIONS = 3  # the first before a step is made


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_debug_shards(tmp_path_factory.mktemp("shards") / "debug")


@pytest.fixture(scope="module")
def undisturbed(
    running_cluster: PrivateCluster, shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[int, float]]:
    """Steps and losses of a run that nobody interrupts, on the same world."""
    run = train(tmp_path_factory.mktemp("undisturbed") / "run", shards, f"train.steps={LONG}")
    assert running_cluster.over(run.job, PATIENCE_S) == ["COMPLETED"], run.said
    assert len(run.segments) == 1
    return run.losses


@pytest.fixture(autouse=True)
def usual_site(running_cluster: PrivateCluster) -> Iterator[None]:
    yield
    running_cluster.up()


def preempt(cluster: PrivateCluster) -> None:
    """A job of higher priority takes both nodes for a second."""
    job = command(
        "sbatch", "--parsable", "-p", "high", "-N2", "--ntasks-per-node=4", "-o", "/dev/null", "--wrap=sleep 1"
    )
    assert cluster.over(job) == ["COMPLETED"]


def check_continuity(run: Training) -> None:
    """Every segment began at the step that the one before it had saved; every step was logged once, none is missing."""
    for before, after in zip(run.segments, run.segments[1:], strict=False):
        assert after.first_step == before.last_step, run.said
    assert [row["step"] for row in run.rows] == list(range(1, len(run.rows) + 1))


@pytest.mark.parametrize("site", [(), ("--no-user-signal",)], ids=["user signal", "SIGTERM alone"])
def test_preempted_any_number_of_times_a_run_ends_as_if_undisturbed(
    site: tuple[str, ...],
    cluster: PrivateCluster,
    shards: Path,
    undisturbed: list[tuple[int, float]],
    tmp_path: Path,
) -> None:
    """Two runs at once, in partitions with and without grace."""
    cluster.up(*site)
    runs = [train(tmp_path / name, shards, f"train.steps={LONG}", partition=name) for name in GRACE]
    for run in runs:
        wait_until(lambda run=run: read_begin(run.folder / "job", run.job, 0)[0], "no start", PATIENCE_S)
    preempt(cluster)
    for number in range(1, PREEMPTIONS):
        for run in runs:
            run.wait_for_steps(number)
        preempt(cluster)
    for run in runs:
        assert cluster.over(run.job, PATIENCE_S) == ["COMPLETED"], run.said
        assert [segment.kind for segment in run.segments] == ["interrupted"] * PREEMPTIONS + ["done"], run.said
        check_continuity(run)
        assert run.segments[0].last_step == 0
        assert all((s.last_step or 0) > (s.first_step or 0) or s.first_step == LONG for s in run.segments[1:])
        assert run.losses == undisturbed  # bit for bit: the rows hold the losses at full precision
        report(run)


def report(run: Training) -> None:
    """The figures of launch/README.md: -s shows them."""
    pairs = zip(run.segments, run.segments[1:], strict=False)
    gaps = [(after.begin or 0.0) - (before.end or 0.0) for before, after in pairs]
    print(f"\n{run.folder.name}: seconds in the queue {[round(gap, 1) for gap in gaps]}")
    for segment in run.segments:
        print(f"  {segment.first_step} -> {segment.last_step}: {segment.reason}; {segment.decision}")


def test_a_time_limit_and_a_hung_rank_cost_a_restart_and_no_more(
    cluster: PrivateCluster, shards: Path, undisturbed: list[tuple[int, float]], tmp_path: Path
) -> None:
    """Two runs at once: one reaches its time limit, in the other a rank is stopped."""
    limited = train(tmp_path / "limited", shards, f"train.steps={LONGER}")
    watchdog = ["train.watchdog.dump_after_s=15", "train.watchdog.abort_after_s=30"]
    hung = train(tmp_path / "hung", shards, f"train.steps={LONG}", *watchdog)
    limited.wait_for_steps(0)
    bring_the_limit_near(limited.job)
    hung.wait_for_steps(0)
    os.kill(ranks_of(hung.job)[3], signal.SIGSTOP)
    wait_until(lambda: limited.segments, lambda: f"no signal before the limit: {limited.said}")
    wait_until(lambda: describe(limited.job)["Restarts"] == "1", lambda: f"not requeued: {describe(limited.job)}")
    wait_until(lambda: cluster.states(limited.job)[0] in ("PENDING", "RUNNING"), "it is ending still")
    command("scontrol", "update", f"JobId={limited.job}", "TimeLimit=60")
    assert cluster.over(hung.job, PATIENCE_S) == ["COMPLETED"], hung.said
    check_hung(hung, cluster.nodes[1])
    assert hung.losses == undisturbed
    limited.wait_for_steps(1)
    assert limited.segments[0].kind == "interrupted"
    assert limited.segments[0].reason == f"SIGUSR2 at step {limited.segments[0].last_step}"
    assert cluster.over(limited.job, PATIENCE_S) == ["COMPLETED"], limited.said
    check_continuity(limited)


def bring_the_limit_near(job: str) -> None:
    """Less than signal_delay_s away, and far enough for a save on a busy machine: SLURM looks every 30 s."""
    hours, minutes, seconds = map(int, describe(job)["RunTime"].split(":"))
    limit = 60 * hours + minutes + (1 if seconds <= 60 - LIMIT_AWAY_S else 2)
    command("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")


def check_hung(run: Training, culprit: str) -> None:
    first, second = run.segments
    assert (first.kind, first.culprit, second.kind) == ("hung", culprit, "done")
    assert re.search(r"no progress for \d+ s", first.reason)
    assert first.reason.endswith(f"nothing was heard of rank 3 on {culprit}")
    stacks = (run.folder / "stacks" / "rank_0.txt").read_text()
    assert "=== end of these stacks" in stacks
    check_continuity(run)


def test_a_run_survives_the_death_of_its_first_node(
    cluster: PrivateCluster, shards: Path, undisturbed: list[tuple[int, float]], tmp_path: Path
) -> None:
    """The supervisor dies with it: SLURM requeues, the next start writes down what is known."""
    run = train(tmp_path / "run", shards, f"train.steps={SHORT}")
    run.wait_for_steps(0)
    wait_until(lambda: newest_checkpoint(run.folder) >= 5, "no checkpoint", PATIENCE_S)
    dead = cluster.nodes[0]
    cluster.crash(dead)
    wait_until(lambda: cluster.states(run.job) == ["PENDING"], "the node's death was not noticed")
    cluster.up()
    assert cluster.over(run.job, PATIENCE_S) == ["COMPLETED"], run.said
    first, second = run.segments
    assert (first.kind, first.nodes, second.kind) == ("lost", cluster.nodes, "done")
    assert "NODE_FAIL" in first.reason
    assert second.first_step is not None
    assert second.first_step >= 5
    check_continuity(run)
    assert run.losses == undisturbed[:SHORT]


@pytest.mark.skipif(os.getuid() != 0, reason="a folder that one node alone sees read-only needs root")
def test_a_node_with_a_read_only_disk_is_named_before_the_first_step(
    cluster: PrivateCluster, shards: Path, tmp_path: Path
) -> None:
    """Once is enough here: with max_crashes=1 there is no second start."""
    folder, bad = tmp_path / "run" / "checkpoints", cluster.nodes[1]
    profile = tmp_path / "once.yaml"
    profile.write_text((CLUSTERS / "private_test.yaml").read_text() + "max_crashes: 1\n")
    block = command(
        "sbatch", "--parsable", "-p", "high", "-N2", "--ntasks-per-node=4", "-o", "/dev/null", "--wrap=sleep 900"
    )
    run = train(tmp_path / "run", shards, profile=str(profile))
    folder.mkdir(parents=True)
    inside = ("nsenter", "--mount", f"--target={(cluster.folder / 'run' / f'slurmd.{bad}.pid').read_text().strip()}")
    command(*inside, "mount", "--bind", folder, folder)
    try:
        command(*inside, "mount", "-o", "remount,bind,ro", folder)
        command("scancel", block)
        assert cluster.over(run.job, PATIENCE_S) == ["FAILED"], run.said
    finally:
        command(*inside, "umount", folder)
    (segment,) = run.segments
    assert (segment.kind, segment.culprit, segment.last_step) == ("preflight", bad, 0)
    assert f"{bad}: {folder} cannot be written: Read-only file system" in segment.reason
    assert segment.decision.startswith("stopped: 1 failures without a newer checkpoint (max_crashes=1")
    assert run.step == 0
