"""From finished runs to the table, and the demo's whole way, on a digits set of a few clips."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data_pipeline.prepare.digits import DigitsConfig, make_digits
from evals.results import read_summary_rows
from launch.config import load_config
from launch.evaluate import EvaluationError, Job, _encoder, evaluate, read_config
from launch.train import train
from vjepa.config import build_models
from vjepa.hub import from_pretrained
from vjepa.train.signals import StopFlag

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = ("train.steps=4", "train.checkpoint.every=2", "train.log_every=1", "data.workers=0", "evals.motion.seeds=1")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = DigitsConfig(train_clips=64, probe_train_clips=40, test_clips=20)
    return make_digits(tmp_path_factory.mktemp("demo") / "digits", config)


def sources(digits: Path) -> list[str]:
    return [f"data.video.sources.digits.path={digits / 'train'}", f"evals.motion.data={digits}"]


def finished_run(folder: Path, digits: Path, *overrides: str) -> Path:
    wanted = [*SMALL, *sources(digits), f"run_dir={folder}", *overrides]
    train(load_config("demo", "primary", wanted), resume=False, stop=StopFlag())
    return folder


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs") / "run", digits)


def test_a_run_gets_its_table_its_curve_and_its_picture(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = evaluate([run])
    assert read_summary_rows(run) == sorted(rows, key=lambda row: row.step is not None)
    assert {(row.model, row.step) for row in rows} == {
        *((model, None) for model in ("trained", "untrained", "rgb", "rgb_difference")),
        ("trained", 2),
    }
    assert {row.training_seed for row in rows if row.model in ("trained", "untrained")} == {0}
    assert (run / "evals" / "motion_predicted_masks.png").stat().st_size > 1000
    summary = json.loads((run / "summary.json").read_text())
    assert summary["stages"]["primary"]["steps"] == 4, "what training wrote stays"
    printed = capsys.readouterr().out
    assert "probes on 40 clips, 20 test clips" in printed
    assert "50 %" in printed


def test_the_encoder_of_a_checkpoint_is_the_target_of_that_step(run: Path) -> None:
    config = read_config(run)
    untrained = _encoder(Job(run, "motion", "untrained"), config).state_dict()
    halfway = _encoder(Job(run, "motion", "trained", step=2), config).state_dict()
    finished = _encoder(Job(run, "motion", "trained"), config).state_dict()
    at_the_end = _encoder(Job(run, "motion", "trained", step=4), config).state_dict()
    initial, _ = build_models(config.model, config.predictor, seed=config.train.seed)
    name = "blocks.0.mlp.fc1.weight"
    assert torch.equal(untrained[name], initial.state_dict()[name])
    assert not torch.equal(halfway[name], untrained[name])
    assert not torch.equal(halfway[name], finished[name])
    assert all(torch.equal(at_the_end[key], finished[key]) for key in finished), "the export is the last target"
    assert from_pretrained(run / "exports/primary").config == initial.config


def test_several_trainings_share_a_table(run: Path, digits: Path, tmp_path: Path) -> None:
    other = finished_run(tmp_path / "other", digits, "train.seed=1", "train.checkpoint.every=4")
    rows = evaluate([run, other], jobs=2)
    of_encoders = {(row.model, row.step, row.training_seed) for row in rows if row.task == "motion"}
    assert of_encoders == {
        *((model, None, seed) for model in ("trained", "untrained") for seed in (0, 1)),
        ("trained", 2, 0),
        ("rgb", None, None),
        ("rgb_difference", None, None),
    }


def test_runs_that_cannot_be_evaluated_are_named(run: Path, digits: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"config\.yaml does not exist: give the directory of a run"):
        evaluate([tmp_path])
    with pytest.raises(EvaluationError, match=r"seeds \[0, 0\] repeat"):
        evaluate([run, run])
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(EvaluationError, match="has no exports/primary: train it to its end first"):
        evaluate([tmp_path])
    other = finished_run(tmp_path / "other", digits, "train.seed=1", "train.optim.weight_decay=0.1")
    with pytest.raises(EvaluationError, match="differ in more than their seed"):
        evaluate([run, other])
    silent = finished_run(tmp_path / "silent", digits, "evals.motion=null")
    with pytest.raises(EvaluationError, match="names no evaluation"):
        evaluate([silent])


def test_the_demo_trains_evaluates_and_reports_and_moves_what_was_there(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "precious").touch()
    command = [sys.executable, "-m", "launch.demo", "--run-dir", str(tmp_path / "demo"), "--seeds", "2"]
    done = subprocess.run(
        [*command, *SMALL, *sources(digits)], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 1 | done: 4 steps" in done.stdout
    assert "over 2 trainings" in done.stdout
    assert (tmp_path / "demo" / "report" / "index.html").is_file()
    assert {row.training_seed for row in read_summary_rows(tmp_path / "demo")} == {0, 1, None}
    (moved,) = tmp_path.glob("demo-before-*")
    assert (moved / "precious").exists()


def test_a_failing_training_is_the_demos_status(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.demo", "--run-dir", str(tmp_path / "demo"), "prepare.digits=none"]
    wrong = ["data.video.sources.digits.path=/no/such/shards"]
    done = subprocess.run([*command, *wrong], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "/no/such/shards" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_what_the_demo_sets_itself_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.demo", "--run-dir", str(tmp_path / "demo"), "train.seed=7"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "error: the demo sets train.seed itself: use --run-dir and --seeds\n")


def test_ctrl_c_saves_the_demos_training_and_ends_it(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "demo"
    command = [sys.executable, "-m", "launch.demo", "--run-dir", str(run), *SMALL, *sources(digits), "train.steps=5000"]
    demo = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/*/COMMITTED")):
        assert time.monotonic() < deadline
        assert demo.poll() is None, demo.communicate()
        time.sleep(0.1)
    os.kill(demo.pid, signal.SIGINT)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 128 + signal.SIGINT, output
    assert "saved" in output
    assert not (run / "summary.json").exists()
