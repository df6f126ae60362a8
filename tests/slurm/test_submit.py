"""The primary stage as a job on two nodes, through the command that people use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import PrivateCluster

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parents[2]


def submit(*arguments: str | Path, status: int = 0, root: Path = ROOT) -> str:
    """What the command prints, both streams."""
    command = [sys.executable, str(root / "launch" / "submit.py"), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root)
    assert done.returncode == status, done.stdout
    return done.stdout


def submitted(run: Path) -> str:
    """The number of the run's newest job."""
    return json.loads((run / "job" / "jobs.jsonl").read_text().splitlines()[-1])["job"]


def rank_log(run: Path, job: str, rank: int = 0) -> str:
    return (run / "job" / job / f"{job}_{rank}_log.out").read_text()


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def test_a_run_on_two_nodes_has_the_losses_of_one_process(cluster: PrivateCluster, tmp_path: Path) -> None:
    run, alone = tmp_path / "run", tmp_path / "alone"
    settings = ("--stage", "primary", "--recipe", "debug", "train.steps=12", "train.seed=3")
    text = submit(*settings, "--cluster", "slurm", "--profile", "private_test", f"run_dir={run}")
    assert "on SLURM, profile private_test" in text.splitlines()[0]
    submit(*settings, "--cluster", "local", f"run_dir={alone}")
    job = submitted(run)
    assert cluster.over(job) == ["COMPLETED"], rank_log(run, job)
    assert losses(run) == pytest.approx(losses(alone), abs=2e-6, rel=0)
    assert len(losses(run)) == 12
    assert "4 rank(s) on cpu" in rank_log(run, job)
