"""Checkpoints are written while training goes on, hold what was there when they were asked for, and fail aloud."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.test_trainer import DebugRun, numbers, saved_steps
from vjepa.train import checkpoint
from vjepa.train.checkpoint import CheckpointConfig, CheckpointError
from vjepa.train.distributed import ALONE
from vjepa.train.saver import Saver


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Saves wait for this event before they write anything."""
    event, save = threading.Event(), checkpoint.save

    def waiting(*arguments: Any) -> Path:
        assert event.wait(300)
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save", waiting)
    return event


def test_what_is_saved_is_what_was_there_though_training_went_on(tmp_path: Path, held: threading.Event) -> None:
    saver = Saver(tmp_path, CheckpointConfig(), ALONE)
    weight, meta = torch.ones(1000), {"numbers": [1]}
    saver.save(5, {"model": {"weight": weight}}, meta)
    weight.zero_()  # training goes on before a byte is written
    meta["numbers"].append(2)
    assert checkpoint.committed(tmp_path) == []
    held.set()
    saver.wait()
    loaded = {"model": {"weight": torch.empty(1000)}}
    assert checkpoint.load(tmp_path / "step_00000005", loaded, ALONE) == {"numbers": [1]}
    assert loaded["model"]["weight"].eq(1).all()


def test_one_save_at_a_time(tmp_path: Path, held: threading.Event) -> None:
    saver = Saver(tmp_path, CheckpointConfig(), ALONE)
    saver.save(5, {"model": {"weight": torch.ones(3)}}, {})
    threading.Timer(0.2, held.set).start()
    saver.save(10, {"model": {"weight": torch.ones(3)}}, {})
    assert [step for step, _ in checkpoint.committed(tmp_path)][:1] == [5], "the first had ended"
    saver.wait()
    assert [step for step, _ in checkpoint.committed(tmp_path)] == [5, 10]


def test_a_save_that_failed_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in its place")
    saver = Saver(tmp_path / "checkpoints", CheckpointConfig(), ALONE)
    saver.save(5, {"model": {"weight": torch.ones(3)}}, {})
    saver.close()
    assert saver.has_failed
    with pytest.raises(CheckpointError, match="step_00000005 could not be written"):
        saver.wait()
    assert not saver.has_failed
    saver.wait()


def test_a_failed_save_stops_the_run_soon_and_not_at_the_next_save(
    debug_run: DebugRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint.save

    def full(root: Path, step: int, *rest: Any) -> Path:
        if step == 20:
            raise CheckpointError("the disk is full")
        return save(root, step, *rest)

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        debug_run(tmp_path / "run", "train.steps=40", "train.checkpoint.every=10")
    assert saved_steps(tmp_path / "run") == [10]
    assert len(numbers(tmp_path / "run")) < 30


@pytest.mark.parametrize("asynchronous", [True, False])
def test_how_it_is_written_changes_no_number(debug_run: DebugRun, tmp_path: Path, asynchronous: bool) -> None:
    setting = f"train.checkpoint.asynchronous={str(asynchronous).lower()}"
    run = debug_run(tmp_path / "run", "train.steps=12", setting)
    assert saved_steps(run) == [5, 10, 12]
    other = debug_run(tmp_path / "other", "train.steps=12")
    assert numbers(run) == numbers(other)
    files = sorted(path.relative_to(run) for path in run.glob("checkpoints/*/dcp/*.distcp"))
    assert files
    assert all((run / file).read_bytes() == (other / file).read_bytes() for file in files)


def test_milestones_stay_for_good(debug_run: DebugRun, tmp_path: Path) -> None:
    """Every fifth step is saved, two stay; the milestones, some of them no fifth step, beside them."""
    settings = ("train.steps=20", "train.checkpoint.keep=2", "train.checkpoint.milestone_every=4")
    run = debug_run(tmp_path / "run", *settings)
    assert saved_steps(run) == [4, 8, 12, 16, 20]
    more = debug_run(tmp_path / "more", *settings[:2], "train.checkpoint.milestone_every=10")
    assert saved_steps(more) == [10, 15, 20]
