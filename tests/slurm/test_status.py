"""What `submit.py status`, `cancel` and `resume` say of jobs on a real SLURM; the jobs train nothing."""

import json
from pathlib import Path

import pytest

from launch.job_order import note_job
from launch.resubmit import ResumeError, resume, sbatch
from launch.status import read_status
from launch.submit import main as submit
from tests.slurm.conftest import PrivateCluster, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def stage(root: Path, name: str, command: str, after: str | None = None) -> str:
    """A job of a chain, submitted as chains are."""
    folder = root / "job"
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / f"{name}.sbatch"
    script.write_text(f"#!/bin/bash\n#SBATCH --partition=low --ntasks=1 --output={folder}/%j.out\n{command}\n")
    behind = [] if after is None else [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    job = sbatch(script, *behind)
    row = {"stage": name, "script": str(script), "run_dir": str(root), "array": None}
    note_job(root, row, job, after)
    return job


def states(root: Path) -> dict[str, str]:
    return {found.stage: found.state for found in read_status(root).stages}


def test_a_failed_stage_leaves_the_next_ones_in_a_state_that_status_explains(
    cluster: PrivateCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = stage(
        tmp_path, "primary", f"until test -e {tmp_path}/go; do sleep .1; done; test -e {tmp_path}/mended || exit 3"
    )
    second = stage(tmp_path, "cooldown", "true", first)
    third = stage(tmp_path, "evals", "true", second)
    assert states(tmp_path)["evals"] == "PENDING"
    (tmp_path / "go").touch()
    cluster.over(third)
    assert states(tmp_path) == {"primary": "FAILED", "cooldown": "CANCELLED", "evals": "CANCELLED"}
    assert submit(["status", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert f"cooldown: never started: primary (job {first}) failed. What to do: mend that" in text
    assert f"evals: never started: cooldown (job {second}) never started either" in text
    (tmp_path / "mended").touch()
    assert [line.partition(" is queued")[0] for line in resume(tmp_path)] == ["primary", "cooldown", "evals"]
    wait_until(lambda: set(states(tmp_path).values()) == {"COMPLETED"}, lambda: states(tmp_path))


def test_cancel_ends_the_whole_chain_and_resume_queues_it_again(
    cluster: PrivateCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = stage(tmp_path, "primary", "sleep 300")
    stage(tmp_path, "cooldown", "true", first)
    cluster.wait(first, ["RUNNING"])
    with pytest.raises(ResumeError, match=rf"job {first} of .* is RUNNING"):
        resume(tmp_path)
    assert submit(["cancel", str(tmp_path)]) == 0
    assert f"cancelled job {first} (primary), which was RUNNING" in capsys.readouterr().out
    wait_until(lambda: set(states(tmp_path).values()) == {"CANCELLED"}, lambda: states(tmp_path))
    wait_until(lambda: not read_status(tmp_path).is_live, "something lives")
    assert submit(["status", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "primary: was cancelled" in text
    assert "cooldown: never started: " in text
    (tmp_path / "job" / "primary.sbatch").write_text(
        (tmp_path / "job" / "primary.sbatch").read_text().replace("sleep 300", "true")
    )
    assert [line.partition(" is queued")[0] for line in resume(tmp_path)] == ["primary", "cooldown"]
    wait_until(lambda: set(states(tmp_path).values()) == {"COMPLETED"}, lambda: states(tmp_path))
    wait_until(lambda: resume(tmp_path) == ["primary is finished", "cooldown is finished"], "resume")


def test_a_request_that_can_never_start_is_explained(
    cluster: PrivateCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage(tmp_path, "primary", "#SBATCH --cpus-per-task=99\ntrue")
    wait_until(
        lambda: "no node of its partition can ever give" in str(read_status(tmp_path).stages[0].notes), "no reason"
    )
    assert submit(["status", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][0]["is_live"] is True


def test_slices_of_ingest_run_as_an_array_and_are_joined(cluster: PrivateCluster, tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    from tests.data_pipeline.made_videos import write_video

    (tmp_path / "videos").mkdir()
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 255, (12, 48, 64, 3), dtype=np.uint8)
        write_video(tmp_path / "videos" / f"{index}.mp4", pixels)
    out = tmp_path / "shards"
    words = [
        "prepare",
        "ingest",
        "--slices=2",
        "--profile=private_test",
        "--",
        str(tmp_path / "videos"),
        f"--out={out}",
    ]
    assert submit(words) == 0
    wait_until(lambda: not read_status(out).is_live, lambda: read_status(out).stages)
    assert states(out)["join"] == "COMPLETED"
    assert sum(entry["samples"] for entry in json.loads((out / "manifest.json").read_text())["shards"]) == 2
    assert submit([*words[:2], "--slices=1", *words[3:]]) == 2
