"""The primary stage as a job on two nodes, through the command that people use."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.cluster_profile import CLUSTERS, load_profile
from launch.config import load_config
from launch.planned_job import dry_run
from launch.slurm_submit import refuse_queued, submit_stage
from launch.snapshot import take_snapshot
from launch.train import train
from tests.slurm.conftest import PATIENCE_S, PrivateCluster, command, wait_until
from tests.slurm.trainings import ranks_of
from vjepa.config import ConfigError
from vjepa.train.signals import StopFlag

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[2]
SETTINGS = ("--stage", "primary", "--recipe", "debug", "train.seed=3", "train.steps=12")
SLURM = ("--cluster", "slurm", "--profile", "private_test")


def submit(*arguments: str | Path, status: int = 0, root: Path = ROOT) -> str:
    """What the command prints, both streams."""
    words = [sys.executable, str(root / "launch" / "submit.py"), *map(str, arguments)]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root)
    assert done.returncode == status, done.stdout
    return done.stdout


@dataclass(frozen=True)
class SubmittedRun:
    """A run directory with jobs."""

    path: Path

    @property
    def job(self) -> str:
        """The number of the newest."""
        return json.loads((self.path / "job" / "jobs.jsonl").read_text().splitlines()[-1])["job"]

    @property
    def script(self) -> Path:
        return self.path / "job" / "primary.sbatch"

    def log(self, job: str = "", rank: int = 0) -> str:
        job = job or self.job
        return (self.path / "job" / job / f"{job}_{rank}_log.out").read_text()

    def rows(self) -> list[dict[str, float]]:
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def losses(self) -> dict[float, float]:
        return {row["step"]: row["loss"] for row in self.rows()}


@contextmanager
def nothing_starts() -> Iterator[None]:
    """Jobs wait for as long as this lasts."""
    command("scontrol", "update", "partitionname=low", "state=down")
    try:
        yield
    finally:
        command("scontrol", "update", "partitionname=low", "state=up")


def without_times(script: str) -> str:
    """A script as it would be at any other moment, made by any other command."""
    script = re.sub(r"\d{8}-\d{6}|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", script)
    return re.sub(r"^# made by .*$", "# made by", script, flags=re.MULTILINE)


def test_two_nodes_run_the_submitted_code_to_the_losses_of_one_process(
    cluster: PrivateCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Acceptance 1; the checkout is broken while the job waits, and its script is run again at the end."""
    run, alone, checkout = SubmittedRun(tmp_path / "run"), SubmittedRun(tmp_path / "alone"), tmp_path / "checkout"
    take_snapshot(checkout)
    with nothing_starts():
        text = submit(*SETTINGS, *SLURM, f"run_dir={run.path}", root=checkout)
        (checkout / "launch" / "train.py").write_text("raise SystemExit('the edited code runs')\n")
        with pytest.raises(ConfigError, match=f"job {run.job} of {run.path} is PENDING"):
            refuse_queued(run.path, "primary")
    assert "on SLURM, profile private_test (asked for; on this machine: --cluster local)" in text.splitlines()[0]
    assert f"job {run.job} is queued: 2 node(s), 4 rank(s); script {run.script}" in text
    config = load_config("debug", "primary", [f"run_dir={alone.path}", *SETTINGS[4:]])
    train(config, resume=False, stop=StopFlag())

    assert cluster.over(run.job, PATIENCE_S) == ["COMPLETED"], run.log()
    assert len(run.losses()) == 12
    assert run.losses() == pytest.approx(alone.losses(), abs=2e-6, rel=0)
    assert "4 rank(s) on cpu" in run.log()
    snapshot = json.loads((run.path / "environment.json").read_text())["source"]
    assert Path(snapshot).parent == run.path / "job" / "code"

    monkeypatch.chdir(tmp_path)
    repeated = command("sbatch", "--parsable", run.script)
    assert cluster.over(repeated, PATIENCE_S) == ["COMPLETED"], run.log(repeated)
    assert "resumed from step 12" in run.log(repeated)


def test_a_rank_that_dies_ends_the_job_in_seconds(cluster: PrivateCluster, tmp_path: Path) -> None:
    run = SubmittedRun(tmp_path / "run")
    profile = tmp_path / "strict.yaml"
    profile.write_text(f"extends: {CLUSTERS}/private_test.yaml\nmax_crashes: 1\nmax_restarts: 0\n")
    config = load_config("debug", "primary", [f"run_dir={run.path}", "train.steps=100000"])
    submit_stage(config, load_profile(str(profile)), "strict")
    wait_until(lambda: len(run.rows()) > 2, "no steps", PATIENCE_S)
    ranks = ranks_of(run.job)
    assert set(ranks) == {0, 1, 2, 3}
    os.kill(ranks[3], signal.SIGKILL)
    wait_until(lambda: not ranks_of(run.job), lambda: f"ranks {ranks_of(run.job)} of a dead job run on", 45)
    assert cluster.over(run.job, PATIENCE_S) == ["FAILED"]


def test_two_jobs_on_one_node_meet_beside_a_port_that_is_taken(cluster: PrivateCluster, tmp_path: Path) -> None:
    """Also the one that submitit would derive from the job's number."""
    program = (
        "import sys, torch.distributed as dist; from pathlib import Path; from launch.rendezvous import Place, meet\n"
        "place = Place.of_slurm(); place.export()\n"
        "store = meet(Path(sys.argv[1]), place, seconds=300)\n"
        "dist.init_process_group('gloo', store=store, rank=place.rank, world_size=place.size)\n"
        "print(place.job, store.port, dist.get_world_size(), flush=True)\n"
        "dist.barrier(); dist.destroy_process_group()\n"
    )
    script = tmp_path / "meet.py"
    script.write_text(program)
    node = cluster.nodes[0]
    wrap = f"srun -n2 --output={tmp_path}/%j.%t {sys.executable} {script} {tmp_path}"
    options = ("--parsable", "-w", node, "-n2", f"--export=ALL,PYTHONPATH={ROOT}", "-o", f"{tmp_path}/%j.log")
    with socket.create_server(("", 0)) as taken:
        jobs = [command("sbatch", *options, f"--wrap={wrap}") for _ in range(2)]
        assert [cluster.over(job, PATIENCE_S) for job in jobs] == [["COMPLETED"]] * 2
        ports = {(tmp_path / f"{job}.0").read_text().split()[1] for job in jobs}
        assert len(ports | {str(taken.getsockname()[1])}) == 3
    assert all((tmp_path / f"{job}.1").read_text().split()[::2] == [job, "2"] for job in jobs)


def test_a_line_of_the_set_up_that_fails_ends_the_job_before_any_rank(cluster: PrivateCluster, tmp_path: Path) -> None:
    run = SubmittedRun(tmp_path / "run")
    profile = tmp_path / "broken.yaml"
    profile.write_text(f"extends: {CLUSTERS}/private_test.yaml\nsetup: [cd /no/such/folder]\n")
    config = load_config("debug", "primary", [f"run_dir={run.path}"])
    submit_stage(config, load_profile(str(profile)), "broken")
    assert cluster.over(run.job, PATIENCE_S) == ["FAILED"]
    assert "/no/such/folder" in (run.path / "job" / f"{run.job}.out").read_text()
    assert not (run.path / "job" / run.job / f"{run.job}_0_log.out").exists()


def test_the_script_that_is_shown_is_the_one_that_is_submitted_and_slurm_is_asked_about_it(
    cluster: PrivateCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = SubmittedRun(tmp_path / "run")
    config, profile = load_config("debug", "primary", [f"run_dir={run.path}"]), load_profile("private_test")
    assert dry_run(config, profile, "private_test") == 0
    shown = capsys.readouterr().out
    assert " to start at " in shown
    with nothing_starts():
        assert submit_stage(config, profile, "private_test").job == run.job
        assert without_times(run.script.read_text()) in without_times(shown)
        cluster.clear()
    assert dry_run(config, load_profile("private_test", ["nodes=3"]), "private_test") == 2
    assert "Requested node configuration is not available" in capsys.readouterr().out
