"""A run of no step through the front door: exported, and without the report of a training that was not."""

from pathlib import Path

import pytest

from launch.config import load_config
from launch.submit import run_here
from vjepa.hub import predictor_from_pretrained


def test_a_run_of_no_step_exports_and_has_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    asked = [f"run_dir={run}", "train.steps=0", "data.workers=0", "report=true"]
    assert run_here(load_config("debug", "primary", asked), resume=False) == 0
    assert "report:" not in capsys.readouterr().out
    assert predictor_from_pretrained(run / "exports" / "primary") is not None
    assert not (run / "checkpoints").exists() or not list((run / "checkpoints").iterdir())
