"""A chain of real trainings, submitted once, runs to its evaluations by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.prepare.digits import DigitsConfig, make_digits
from launch.job_order import read_jobs
from launch.status import read_status
from tests.slurm.conftest import PrivateCluster
from tests.slurm.test_submit import submit

pytestmark = [pytest.mark.slurm, pytest.mark.slurm_long, pytest.mark.timeout(900)]
SHAPE = ("--cluster", "slurm", "--profile", "private_test", "--nodes", "1", "--tasks-per-node", "1")
STEPS = {"primary": 4, "cooldown": 2}


def test_a_chain_runs_to_its_evaluations(cluster: PrivateCluster, tmp_path: Path) -> None:
    data, root = tmp_path / "digits", tmp_path / "run"
    make_digits(data, DigitsConfig(train_clips=1, probe_train_clips=40, test_clips=20))
    steps = [f"{stage}.train.steps={count}" for stage, count in STEPS.items()]
    suites = [f"evals={{motion: {{data: {data}, seeds: 1}}}}"]
    small = ["data.video.clip.size=32", "data.image.clip.size=32", "model.patch_size=8"]
    schedule = ["primary.train.optim.lr.warmup_steps=1"]
    stages = ("--stage", "primary,cooldown,evals", "--recipe", "debug")
    submit(*stages, *SHAPE, f"run_dir={root}", *steps, *suites, *small, *schedule)
    jobs = {row["stage"]: row["job"] for row in read_jobs(root)}
    assert list(jobs) == ["primary", "cooldown", "evals"]
    ends = {stage: cluster.over(job, 600.0) for stage, job in jobs.items()}
    assert ends == {stage: ["COMPLETED"] for stage in jobs}, (root / "job" / f"{jobs['primary']}.out").read_text()
    assert str(root / "primary" / "exports" / "primary") in (root / "cooldown" / "config.yaml").read_text(), (
        "the teacher"
    )
    summary = json.loads((root / "summary.json").read_text())
    assert {name: stage["steps"] for name, stage in summary["stages"].items()} == STEPS
    assert {row["stage"] for row in summary["evals"]} >= set(STEPS)
    assert {(found.stage, found.state) for found in read_status(root).stages} == {(name, "COMPLETED") for name in jobs}
