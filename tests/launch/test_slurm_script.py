"""The job script and the snapshot: what would be submitted, on machines with and without SLURM."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import snapshot
from launch.cluster_profile import load_profile
from launch.config import load_config
from launch.job_order import JobOrder
from launch.planned_job import dry_run
from launch.slurm_submit import clean_environment, plan_order, script_text
from launch.snapshot import OtherCodeError, hash_code, refuse_other_code, take_snapshot

RUN = "/shared/runs/gigantic"


def script(*overrides: str, profile: str = "example_gpu", recipe: str = "vit_gigantic") -> str:
    config = load_config(recipe, "primary", [f"run_dir={RUN}"])
    settings = load_profile(profile, overrides)
    return script_text(plan_order(config, settings, profile), settings)


def options(text: str) -> dict[str, str | None]:
    """What the #SBATCH lines ask for."""
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE)
    return {name: value or None for name, value in found}


def test_the_dry_run_of_the_largest_recipe_prints_the_script_for_32_nodes_of_8_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("time.strftime", lambda _: "NOW")
    config, profile = load_config("vit_gigantic", "primary", [f"run_dir={RUN}"]), load_profile("example_gpu")
    config.check(profile.world, needs_sources=False)
    assert dry_run(config, profile, "example_gpu") == 0
    said = capsys.readouterr().out
    assert script() in said
    assert "sbatch is not on PATH" in said
    wanted = {"nodes": "32", "gpus-per-node": "8", "ntasks-per-node": "8", "cpus-per-task": "14", "time": "1440"}
    wanted |= {"requeue": None, "open-mode": "append", "signal": "USR2@300", "exclusive": None}
    assert options(said).items() >= wanted.items()


def test_the_script_says_what_it_is_who_made_it_and_how_to_run_it_again() -> None:
    head = script().partition("#SBATCH")[0]
    assert head.startswith("#!/bin/bash\n# vit_gigantic/primary, 32 node(s) x 8 rank(s), profile example_gpu\n")
    assert f"# run      {RUN}\n" in head
    assert f"# again    sbatch {RUN}/job/primary.sbatch\n" in head
    assert sys.orig_argv[-1] in head


def test_the_script_asks_for_what_the_profile_says_and_nothing_else() -> None:
    text = script("partition=gpu", "account=vision", "qos=high", "constraint=h100&ib", "exclude=n[1-2]", "mem_gb=500.5")
    wanted = {"partition": "gpu", "account": "vision", "qos": "high", "constraint": "'h100&ib'", "exclude": "'n[1-2]'"}
    assert options(text).items() >= (wanted | {"mem": "512512M"}).items()
    bare = options(script(profile="private_test", recipe="debug"))
    assert not {"account", "qos", "constraint", "gpus-per-node", "wckey", "reservation"} & set(bare)


def test_a_script_stops_at_a_line_that_fails_and_a_step_at_a_rank_that_fails() -> None:
    text = script('setup=["module load cuda"]', 'srun_args=["--container-image=/shared/p t.sqsh"]')
    lines = text.splitlines()
    assert lines.index("set -e") < lines.index("module load cuda")
    srun = next(line for line in lines if line.startswith("srun "))
    assert "--kill-on-bad-exit=1 --wait=30" in srun
    assert "'--container-image=/shared/p t.sqsh'" in srun
    assert "CUDA_VISIBLE_DEVICES" not in text


def test_the_script_is_one_that_bash_can_read(tmp_path: Path) -> None:
    path = tmp_path / "script"
    path.write_text(script('environment={NAME: "it\'s two words"}'))
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "export NAME='it'\"'\"'s two words'" in path.read_text()


def test_a_job_submitted_from_a_job_keeps_the_way_to_the_cluster_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_CONF", "SLURM_JOB_ID", "SLURM_GPUS_PER_NODE", "SBATCH_PARTITION", "RANK", "HOME_OF_MINE"):
        monkeypatch.setenv(name, "x")
    with clean_environment():
        assert {"SLURM_CONF", "HOME_OF_MINE"} <= set(os.environ)
        assert not {"SLURM_JOB_ID", "SLURM_GPUS_PER_NODE", "SBATCH_PARTITION", "RANK"} & set(os.environ)
    assert os.environ["SLURM_JOB_ID"] == "x"


def test_an_order_is_read_as_it_was_written(tmp_path: Path) -> None:
    config, profile = load_config("debug", "primary", [f"run_dir={tmp_path}"]), load_profile("private_test")
    order = plan_order(config, profile, "private_test")
    order.write()
    assert JobOrder.read(order.file("json")) == order
    assert (order.world, order.run_dir) == (4, str(tmp_path))


def test_a_snapshot_is_the_code_with_its_edits_and_without_what_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = take_snapshot(tmp_path / "checkout")
    checkout = tmp_path / "checkout"
    monkeypatch.setattr(snapshot, "ROOT", checkout)
    (checkout / "vjepa" / "untracked.py").write_text("EDIT = 1\n")
    second = take_snapshot(tmp_path / "copy")
    (checkout / "vjepa" / "untracked.py").write_text("EDIT = 2\n")
    assert (tmp_path / "copy" / "vjepa" / "untracked.py").read_text() == "EDIT = 1\n"
    assert first != second == hash_code(tmp_path / "copy") != hash_code(checkout)
    assert not list((tmp_path / "copy").rglob("*.pyc"))
    assert (tmp_path / "copy" / "launch" / "recipes" / "debug" / "primary.yaml").is_file()


def test_other_code_than_the_snapshot_is_refused(tmp_path: Path) -> None:
    refuse_other_code(snapshot.ROOT)
    with pytest.raises(OtherCodeError, match=f"{tmp_path}, but Python imports {snapshot.ROOT}"):
        refuse_other_code(tmp_path)
