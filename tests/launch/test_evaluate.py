"""From finished runs to the table, and the demo's whole way, on a digits set of a few clips."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_pipeline.prepare.digits import DigitsConfig, make_digits
from evals.results import read_summary_rows
from launch.config import load_config
from launch.demo import STAGES
from launch.evaluate import EvaluationError, Job, _encoder, evaluate, read_config
from launch.train import train
from vjepa.config import build_models
from vjepa.hub import from_pretrained
from vjepa.train.signals import StopFlag

TASKS = ("motion", "segmentation", "fine_motion", "fine_segmentation")
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
    settings = config.suites()["motion"]
    untrained = _encoder(Job(run, "motion", "untrained", None, settings), config).state_dict()
    halfway = _encoder(Job(run, "motion", "trained", 2, settings), config).state_dict()
    finished = _encoder(Job(run, "motion", "trained", None, settings), config).state_dict()
    at_the_end = _encoder(Job(run, "motion", "trained", 4, settings), config).state_dict()
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
    with pytest.raises(EvaluationError, match="no evaluation is named"):
        evaluate([silent])


def test_the_demo_trains_evaluates_and_reports_and_moves_what_was_there(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "precious").touch()
    command = [sys.executable, "-m", "launch.demo", "--run-dir", str(tmp_path / "demo"), "--seeds", "2"]
    fine = [f"cooldown.evals.fine_motion={{data: {digits}, seeds: 1, curve: false}}", "evals.motion.curve=false"]
    done = subprocess.run(
        [*command, *SMALL, *sources(digits), *fine], cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 1 | done: 4 steps" in done.stdout
    assert "over 2 trainings" in done.stdout
    page = (tmp_path / "demo" / "report" / "index.html").read_text()
    assert all(f'href="../{stage}/report/index.html"' in page for stage in STAGES)
    assert all((tmp_path / "demo" / stage / "report" / "index.html").is_file() for stage in STAGES)
    rows = read_summary_rows(tmp_path / "demo")
    assert {row.training_seed for row in rows} == {0, 1, None}
    assert {(row.stage, row.task) for row in rows} >= {(stage, task) for stage in STAGES for task in TASKS}
    (moved,) = tmp_path.glob("demo-before-*")
    assert (moved / "precious").exists()
