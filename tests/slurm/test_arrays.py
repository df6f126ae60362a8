"""Arrays on a real SLURM: one element's fate is its own, and what is not finished is submitted again; a sweep."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from data_pipeline.prepare.synthetic import make_debug_shards
from launch import scheduler
from launch.cluster_profile import CLUSTERS, load_profile
from launch.job_array import ArrayJobs, PlannedArray
from launch.job_order import read_jobs
from launch.resubmit import resume
from launch.slurm_chain import Submission
from launch.status import read_status
from launch.submit import main as submit
from launch.watch import remarks
from tests.slurm.conftest import PATIENCE_S, PrivateCluster, command, wait_until
from tests.slurm.terminal import OnTerminal

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
CURSOR_UP = "\x1b[1A"  # what a live view moves over its own lines with


def three_parts(root: Path) -> ArrayJobs:
    """The first is done at once, the second waits for a file, the third fails without another; each has a GPU."""
    profile = root.parent / "once.yaml"
    profile.write_text(
        f"extends: {CLUSTERS}/private_test.yaml\ngpus_per_node: 1\nmem_gb: 0.4\nmax_crashes: 1\ntools: {{gpus: 1}}\n"
    )
    submission = Submission.begin(root, load_profile(str(profile)), "once")
    waits = f"until test -e {root}/go; do echo start $SLURM_RESTART_COUNT; sleep .3; done; echo woken"
    lines = ["true", waits, f"test -e {root}/mended"]
    share = submission.profile.tools
    parts = [
        submission.plain_command("parts", f"part-{index}", share, [["bash", "-c", line]])
        for index, line in enumerate(lines)
    ]
    join = submission.plain_command("parts", "join", share, [["true"]])
    return ArrayJobs(PlannedArray("parts", parts, range(3), 3), join, "afterok")


def restarts(job: str) -> list[int]:
    """Of each of the three elements."""
    return [int(scheduler.describe(f"{job}_{index}")["Restarts"]) for index in range(3)]


def test_an_element_that_is_requeued_leaves_the_others_alone_and_only_unfinished_ones_are_resumed(
    cluster: PrivateCluster, tmp_path: Path
) -> None:
    """Watched all the while: live views of the state and of the log, on terminals."""
    root = tmp_path / "parts"
    job, last = three_parts(root).submit()
    assert job is not None
    watching, following = OnTerminal("status", root, "--watch"), OnTerminal("logs", root, "--follow")

    def states() -> list[str]:
        return [cluster.states(f"{job}_{index}")[0] for index in range(3)]

    wait_until(lambda: states() == ["COMPLETED", "RUNNING", "FAILED"], states)
    wait_until(lambda: "start" in following.shown, lambda: following.shown)
    wait_until(lambda: "1 RUNNING" in watching.shown, lambda: watching.shown)
    command("scontrol", "requeue", f"{job}_1")
    wait_until(lambda: "start 1" in following.shown, lambda: following.shown)
    (root / "go").touch()
    cluster.over(job)
    assert states() == ["COMPLETED", "COMPLETED", "FAILED"]
    assert restarts(job) == [0, 1, 0]
    assert cluster.over(last) == ["CANCELLED"]
    check_hours(root, job)
    assert (watching.end(PATIENCE_S), following.end(PATIENCE_S)) == (0, 0)
    assert CURSOR_UP in watching.shown
    assert f"join: never started: parts (job {job}) ended with 2 COMPLETED, 1 FAILED" in watching.shown
    assert "woken" in following.shown

    (root / "mended").touch()
    assert [line.partition(" is queued")[0] for line in resume(root)] == ["parts", "join"]
    again = read_jobs(root)[-2]["job"]
    assert command("squeue", "-h", "-r", "-t", "all", "-j", again, "-o", "%i").split() == [f"{again}_2"]
    wait_until(lambda: not read_status(root).is_live, lambda: read_status(root).stages)
    assert [stage.state for stage in read_status(root).stages] == ["COMPLETED", "COMPLETED"]
    wait_until(lambda: resume(root) == ["parts is finished", "join is finished"], "resume")


def check_hours(root: Path, job: str) -> None:
    """GPU-hours are those of all starts, the one that was requeued too."""

    def are_told() -> bool:  # accounting is late
        starts = [segment for segment in scheduler.accounting([job]) if segment.job == f"{job}_1"]
        return [segment.state for segment in starts] == ["REQUEUED", "COMPLETED"]

    wait_until(are_told, lambda: scheduler.accounting([job]))
    starts = scheduler.accounting([job])
    assert all(segment.resources["gres/gpu"] == "1" for segment in starts)
    requeued = next(segment for segment in starts if segment.state == "REQUEUED")
    parts = read_status(root).stages[0]
    assert requeued.elapsed_s > 0
    assert parts.gpu_hours == pytest.approx(sum(segment.elapsed_s for segment in starts) / 3600)
    assert parts.restarts == 1


def test_the_runs_of_a_sweep_are_trained_as_an_array_and_judged(
    cluster: PrivateCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, folder = make_debug_shards(tmp_path / "shards"), tmp_path / "sweep"
    sources = [f"data.{modality}.sources.debug.path={shards}" for modality in ("video", "image")]
    asked = ["--recipe", "debug", "--sweep", "train.seed=1,2", "--method", "grid", "--jobs", "2", "--steps", "4"]
    shape = ["--cluster", "slurm", "--profile", "private_test", "--nodes", "1", "--tasks-per-node", "1"]
    words = [*asked, *shape, *sources, "prepare.debug=none", f"run_dir={folder}"]
    assert submit(words) == 0
    job, last = re.findall(r"^job (\d+): ", capsys.readouterr().out, re.MULTILINE)
    assert cluster.over(job, PATIENCE_S) == ["COMPLETED"] * 2, said(folder)
    assert cluster.over(last, PATIENCE_S) == ["COMPLETED"], said(folder)
    record = json.loads((folder / "sweep.json").read_text())
    runs = record["runs"].values()
    assert [(run["values"], run["status"]) for run in runs] == [({"train.seed": seed}, "finished") for seed in "12"]
    (folder / "02_seed=2" / "summary.json").unlink()
    assert submit([*words, "--resume", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "job script, " in shown
    assert f"{folder}/job/runs.sbatch (the array)" in shown
    assert "started by the array):" in shown, "one element is left"


def said(folder: Path) -> str:
    logs = [log for log in sorted((folder / "job").rglob("*.out")) if log.is_file()]
    return "\n".join([*remarks(read_status(folder)), *(f"--- {log}\n{log.read_text()}" for log in logs)])
