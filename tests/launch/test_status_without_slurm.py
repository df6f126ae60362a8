"""What `status` and `resume` say from SLURM's recorded answers, where it has no accounts, and of alarms in the log."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from launch.job_order import note_job
from launch.resubmit import resume
from launch.segments import Segment, append_segment, write_begin
from launch.status import RunStatus, read_status
from launch.watch import main as watch
from launch.watch import remarks

NO_ACCOUNTS = "echo 'Slurm accounting storage is disabled' >&2; exit 1"  # sacct's words and status
FORGOTTEN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH for programs that answer as SLURM's did."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return programs


def answer(slurm: Path, program: str, script: str) -> None:
    (slurm / program).write_text(f"#!/bin/sh\n{script}\n")
    (slurm / program).chmod(0o755)


def run(tmp_path: Path, *, array: int | None = None, jobs: tuple[str, ...] = ("17",)) -> Path:
    """A run of 2 nodes x 4 GPUs with jobs in its record."""
    folder = tmp_path / "run"
    (folder / "job").mkdir(parents=True)
    script = folder / "job" / "primary.sbatch"
    row = {"stage": "primary", "script": str(script), "run_dir": str(folder), "profile": "mine", "nodes": 2}
    row |= {"tasks_per_node": 4, "gpus_per_node": 4, "cpus_per_task": 3, "signal_delay_s": 60, "array": array}
    for job in jobs:
        note_job(folder, row | {"at_once": 2}, job, None)
    return folder


def ended(
    folder: Path, job: str, restart: int, kind: str, decision: str, begin: float, end: float, stage: str = "primary"
) -> None:
    append_segment(
        folder / "job",
        Segment(job, restart, stage, ["n1", "n2"], begin, end, 0, kind, "why", 0, 4, decision, []),  # pyright: ignore[reportArgumentType]
    )
    write_begin(folder / "job", job, restart, 0)
    path = folder / "job" / "outcomes" / f"{job}_{restart}_begin.json"
    path.write_text(json.dumps({"begin": begin, "first_step": 0}))


def said(found: RunStatus) -> str:
    return "\n".join(remarks(found))


def checkpoint(folder: Path, step: int, **alarms: dict[str, float]) -> None:
    path = folder / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "COMMITTED").touch()
    (path / "meta.json").write_text(json.dumps({"recorder": {"alarms": alarms}}))


def test_a_job_that_its_limit_killed_is_explained_and_resume_goes_on(tmp_path: Path, slurm: Path) -> None:
    """The answers are those of the private cluster (SLURM 22.05.8) to a job whose ranks took no signal."""
    folder = run(tmp_path)
    (folder / "job" / "primary.yaml").write_text("train: {steps: 100}\n")
    checkpoint(folder, 40)
    answer(slurm, "squeue", "echo '17|deaf.sh|TIMEOUT|TimeLimit|tn1|2026-11-26T00:48:06|INVALID'")
    used, from_to = "billing=1,cpu=1,gres/gpu=1,mem=100M,node=1", "2026-11-26T00:48:06|2026-11-26T00:49:35"
    answer(slurm, "sacct", f"echo '17|TIMEOUT|89|{used}|{from_to}|tn1|0:0'")
    answer(slurm, "sbatch", f'echo 18; echo "$@" > {tmp_path}/asked')
    found = read_status(folder)
    assert (found.stages[0].state, found.is_live) == ("TIMEOUT", False)
    assert found.stages[0].gpu_hours == pytest.approx(89 / 3600)
    words = said(found)
    assert "killed by its time limit before it could go back into the queue; saved at step 40" in words
    assert "raise signal_delay_s (now 60) of profile mine" in words
    assert "train.checkpoint.every" in words
    answer(slurm, "squeue", FORGOTTEN)
    assert "killed by its time limit" in said(read_status(folder)), "also when only accounting remembers it"
    (folder / "job" / "primary.yaml").rename(folder / "job" / "other.yaml")
    assert "a longer time_min in profile mine" in said(read_status(folder)), "a job that trains nothing saves nothing"
    assert resume(folder) == [f"primary is queued as job 18 ({folder}/job/primary.sbatch)"]
    assert (tmp_path / "asked").read_text().split() == ["--parsable", f"{folder}/job/primary.sbatch"]


def test_a_watch_goes_on_while_the_controller_does_not_answer(
    tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, looks = run(tmp_path), tmp_path / "looks"
    state = "17|primary|$1|None|n1|2026-11-26T00:48:06|23:00"
    silent = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    answer(
        slurm,
        "squeue",
        f"echo >> {looks}; case $(wc -l < {looks}) in 1) set RUNNING;; 2) echo '{silent}' >&2; exit 1;; "
        f'*) set COMPLETED;; esac; echo "{state}"',
    )
    answer(slurm, "sacct", "true")
    monkeypatch.setattr("launch.watch.LOOK_EVERY_S", 0.0)
    assert watch(["status", str(folder), "--watch"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("RUNNING") < shown.index("as it was a moment ago: squeue") < shown.index("COMPLETED")
    looks.write_text("\n")
    assert watch(["status", str(folder), "--watch"]) == 2, "at the first look there is nothing to show"


def test_without_accounting_hours_and_restarts_are_from_the_runs_own_notes(tmp_path: Path, slurm: Path) -> None:
    folder = run(tmp_path)
    now = time.time()
    ended(folder, "17", 0, "interrupted", "requeued: asked to by SLURM", now - 9000, now - 7200)
    write_begin(folder / "job", "17", 1, 4)
    begun = folder / "job" / "outcomes" / "17_1_begin.json"
    begun.write_text(json.dumps({"begin": now - 3600, "first_step": 4}))
    answer(slurm, "sacct", NO_ACCOUNTS)
    answer(slurm, "squeue", "echo '17|primary|RUNNING|None|n[1-2]|2026-11-26T00:48:06|23:00'")
    found = read_status(folder)
    least, most = 1800 + 3600, 1800 + 3600 + time.time() - now  # it runs on while it is looked at
    (stage,) = found.stages
    assert least * 8 / 3600 <= stage.gpu_hours <= most * 8 / 3600
    assert least * 24 / 3600 <= stage.cpu_hours <= most * 24 / 3600
    assert (stage.state, stage.restarts) == ("RUNNING", 1)
    assert "hours and ends are from the run's own notes" in said(found)
    assert "Slurm accounting storage is disabled" in said(found)


def test_without_accounting_a_job_that_squeue_has_forgotten_is_known_by_its_notes(tmp_path: Path, slurm: Path) -> None:
    folder = run(tmp_path)
    answer(slurm, "sacct", NO_ACCOUNTS)
    answer(slurm, "squeue", FORGOTTEN)
    assert read_status(folder).stages[0].state == "UNKNOWN"
    ended(folder, "17", 0, "crashed", "stopped: 3 failures", 100.0, 160.0)
    assert read_status(folder).stages[0].state == "FAILED"
    ended(folder, "17", 1, "done", "finished", 200.0, 260.0)
    assert read_status(folder).stages[0].state == "COMPLETED"
    assert resume(folder) == ["primary is finished"]


def test_without_accounting_only_the_elements_that_did_not_finish_are_submitted_again(
    tmp_path: Path, slurm: Path
) -> None:
    folder = run(tmp_path, array=3)
    for index, kind in enumerate(("done", "crashed", "done")):
        (folder / "job" / f"17_{index}").symlink_to(f"{20 + index}")
        decision = "finished" if kind == "done" else "stopped: 3 failures"
        ended(folder, f"{20 + index}", 0, kind, decision, 100.0, 3700.0, stage=f"element-{index}")
    answer(slurm, "sacct", NO_ACCOUNTS)
    answer(slurm, "squeue", FORGOTTEN)
    answer(slurm, "sbatch", f'echo 30; echo "$@" > {tmp_path}/asked')
    (stage,) = read_status(folder).stages
    assert (stage.state, stage.gpu_hours) == ("2 COMPLETED, 1 FAILED", 3 * 8)
    resume(folder)
    assert "--array=1%2" in (tmp_path / "asked").read_text()


def test_alarms_since_the_newest_checkpoint_are_those_of_the_log_and_the_rows(tmp_path: Path, slurm: Path) -> None:
    folder = run(tmp_path)
    answer(slurm, "sacct", "true")
    answer(slurm, "squeue", "echo '17|primary|RUNNING|None|n[1-2]|2026-11-26T00:48:06|23:00'")
    (folder / "job" / "primary.yaml").write_text("train: {steps: 100, alarms: {consecutive: 2}}\n")
    name = "video/level2/mean_cosine"
    checkpoint(folder, 20, strikes={name: 2}, since={name: 10})
    rows = [{"step": step, "loss": 1.0} | ({f"diag/{name}": 0.99} if step % 10 == 0 else {}) for step in range(1, 30)]
    write_rows(folder, rows)
    (folder / "job" / "17").mkdir()
    log = folder / "job" / "17" / "17_0_log.out"
    old = "ALARM at step 20: video level 2: mean_cosine 0.99 is above 0.95 in 2 evaluations in a row: constant\n"
    new = "ALARM at step 30: image level 1: rankme 1.2 is below 3 in 2 evaluations in a row: narrow\n"
    lost = "ALARM at step 28: image source slow: the loader waits for it\n"  # of a start that was killed after it
    early = "ALARM at step 15: image source slow: the loader waits for it\n"
    data = "ALARM at step 25: video source rotten: 3 of 9 clips could not be decoded\n"
    log.write_text(early + old + data)
    assert said(read_status(folder)).count("ALARM") == 2, "the checkpoint's is the last evaluation so far"
    assert f"collapse: {name} breaks its rule since step 10" in said(read_status(folder))
    write_rows(folder, [*rows, {"step": 30, "loss": 1.0, f"diag/{name}": 0.5}])
    log.write_text(early + old + lost + data + new)
    words = said(read_status(folder))
    assert "ALARM image level 1: rankme 1.2 is below 3" in words
    assert "ALARM video source rotten: 3 of 9 clips could not be decoded (step 25)" in words
    assert words.count("ALARM") == 2, "what no longer stands, or was made by a start that is lost, is not said"


def write_rows(folder: Path, rows: list[dict[str, float]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
