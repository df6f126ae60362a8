"""`python launch/submit.py` as a user meets it: first line, log, exit status, files, Ctrl-C, kill and resume."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.submit import main as submit
from tests.benchmarks.campaign import compare, complete, last_logged, numbers, rows_of, session_members, start
from tests.benchmarks.kill_and_resume import COMMANDS, kill_and_resume

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = ("train.steps=20",)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of 20 steps through submit.py and what it printed."""
    folder = tmp_path_factory.mktemp("submit") / "run"
    return folder, complete(start(COMMANDS["submit"], folder, STEPS))


def test_the_first_line_says_what_runs_where_and_why(finished: tuple[Path, str]) -> None:
    first = finished[1].splitlines()[0]
    assert first.startswith("recipe debug (asked for), stage primary, on this machine (")
    assert first.endswith("; on a cluster: --cluster slurm --profile NAME)")


def test_the_log_is_streamed_without_the_launchers_own_lines(finished: tuple[Path, str]) -> None:
    lines = finished[1].splitlines()
    assert any(line.startswith("debug/primary step 1/20  loss ") for line in lines)
    assert lines[-1].startswith("done: 20 steps, final loss ")
    assert "submitit" not in finished[1]


def test_the_run_directory_holds_what_the_design_names(finished: tuple[Path, str]) -> None:
    names = {path.name for path in finished[0].iterdir()}
    assert {"config.yaml", "command.txt", "environment.json", "metrics.jsonl", "summary.json", "job"} <= names
    assert {path.name for path in (finished[0] / "checkpoints").iterdir()} == {
        f"step_{step:08d}" for step in (5, 10, 15, 20)
    }
    exported = {path.name for path in (finished[0] / "exports/primary").iterdir()}
    assert exported == {
        *("model.safetensors", "predictor.safetensors"),
        *("config.json", "preprocessor_config.json", "README.md"),
    }


def test_the_summary_is_the_documented_one(finished: tuple[Path, str]) -> None:
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert summary.keys() == {"recipe", "stages", "evals"}
    assert summary["recipe"] == "debug"
    assert summary["stages"].keys() == {"primary"}
    stage = summary["stages"]["primary"]
    assert stage.keys() == {"steps", "seconds", "final_loss"}
    assert stage["steps"] == 20
    assert stage["final_loss"] == rows_of(finished[0])[-1]["loss"]
    assert stage["seconds"] == pytest.approx(sum(row["step_seconds"] for row in rows_of(finished[0])), abs=0.01)
    assert summary["evals"] == []


def test_metrics_are_one_finite_object_a_step_at_full_precision(finished: tuple[Path, str]) -> None:
    rows = rows_of(finished[0])
    assert [row["step"] for row in rows] == list(range(1, 21))
    for row in rows:
        assert {"loss", "loss/masked_prediction", "loss/context_prediction", "lr", "clips_per_second"} <= row.keys()
        assert all(math.isfinite(value) for value in row.values())
    assert max(len(repr(row["loss"])) for row in rows) > 12


def test_a_second_start_in_the_same_folder_is_refused_at_once(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(["--recipe", "debug", f"run_dir={finished[0]}"]) == 2
    assert "holds a run already: continue it with --resume" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert submit(["--recipe", "debug", f"run_dir={tmp_path / 'file'}"]) == 2
    assert re.search(r"error: .*/file cannot be written \(.*\): choose another run_dir", capsys.readouterr().err)


def test_a_resume_finds_the_recipe_in_the_folder_and_refuses_another(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--resume", "--dry-run", f"run_dir={finished[0]}"]
    assert submit(arguments) == 0
    assert capsys.readouterr().out.startswith("recipe debug (the run's own), stage primary")
    assert submit([*arguments, "--recipe", "vit_large"]) == 2
    assert "recipe: 'debug' -> 'vit_large'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "told"), [("missing", "is missing, but"), ("empty", "not the configuration of a run")]
)
def test_a_resume_without_the_stored_configuration_is_refused(
    finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, told: str
) -> None:
    (tmp_path / "checkpoints").symlink_to(finished[0] / "checkpoints")
    if damage == "empty":
        (tmp_path / "config.yaml").touch()
    assert submit(["--resume", "--recipe", "debug", f"run_dir={tmp_path}"]) == 2
    assert told in capsys.readouterr().err


def test_a_dry_run_of_the_largest_recipe_counts_parameters_and_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    started = time.process_time()  # other processes' load is not the claim
    assert submit(["--recipe", "vit_gigantic", "--dry-run", f"run_dir={tmp_path / 'run'}"]) == 0
    assert time.process_time() - started < 20, "the plan takes seconds"
    said = capsys.readouterr().out
    assert "encoder: 1,845,216,768 parameters" in said
    assert "  steps: 135000\n" in said
    assert "not ready to start: train.batch.video=3072 but data.video.sources is empty: add data.video.sources" in said
    assert not (tmp_path / "run").exists()


def test_without_a_recipe_the_demo_is_chosen_and_the_other_command_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(["--dry-run"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("recipe demo (the default")
    assert "--recipe vit_gigantic" in first


def test_a_failing_runs_status_and_words_are_those_of_submit(tmp_path: Path) -> None:
    missing = "data.video.sources.debug.path=/no/such/shards"
    command = [*COMMANDS["submit"], f"run_dir={tmp_path}", "prepare.debug=none", missing]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    error = next(line for line in done.stdout.splitlines() if line.startswith("error: "))
    assert "/no/such/shards" in error
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("command", "signum", "to_group"),
    [("submit", signal.SIGINT, True), ("train", signal.SIGTERM, False)],
    ids=["ctrl-c", "sigterm"],
)
def test_a_stopped_run_saves_says_so_and_goes_on_bit_identically(
    finished: tuple[Path, str], tmp_path: Path, command: str, signum: int, to_group: bool
) -> None:
    """Ctrl-C reaches every process of the terminal; `kill` only the one that was named."""
    folder = tmp_path / "run"
    process = start(COMMANDS[command], folder, STEPS)
    while last_logged(folder) < 2:
        assert process.poll() is None
        time.sleep(0.002)
    if to_group:
        os.killpg(process.pid, signum)
    else:
        process.send_signal(signum)
    said = complete(process, status=128 + signum)
    assert session_members(process.pid) == []
    saved = re.search(r"stopped by SIG\w+ at step (\d+), saved: continue with --resume", said)
    assert saved, said
    assert int(saved[1]) < 20
    said = complete(start(COMMANDS["train"], folder, [*STEPS, "--resume"]))
    assert f"resumed from step {saved[1]}\n" in said
    compare(folder, finished[0])
    assert [numbers(row) for row in rows_of(folder)] == [numbers(row) for row in rows_of(finished[0])]


def test_a_killed_run_resumes_from_its_newest_checkpoint_bit_identically(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    kills = kill_and_resume(
        tmp_path / "run", kills=2, seed=3, reference=finished[0], overrides=STEPS, moments=("step", "save")
    )
    assert [kill.moment for kill in kills] == ["step", "save"]
    assert kills[0].logged >= 1


def test_a_run_is_not_left_behind_by_a_second_interrupt_while_it_starts(tmp_path: Path) -> None:
    process = start((sys.executable, "launch/submit.py", "--recipe", "debug"), tmp_path / "run", ["train.steps=5000"])
    while not list((tmp_path / "run").glob("job/*/*_log.out")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.1)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    said = complete(process, status=130)
    assert "Traceback" not in said
    deadline = time.monotonic() + 60
    while session_members(process.pid):
        assert time.monotonic() < deadline, session_members(process.pid)
        time.sleep(0.05)
