"""Crops made on the training device give the run that crops made by workers give, bit for bit on a CPU."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launch import replay
from tests.benchmarks.campaign import numbers
from tests.train.test_health import Poison
from vjepa.train.health import NonFiniteError
from vjepa.train.incident import read_micro_batches

DebugRun = Callable[..., Path]
STEPS = ("train.steps=4", "train.log_every=1")
SPLIT = ("train.micro_batch.video=4", "train.micro_batch.image=4")


def rows(run_dir: Path) -> list[dict[str, float]]:
    return [numbers(json.loads(line)) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("options", "more"),
    [
        pytest.param((), ("data.workers=1",), id="one micro-batch, out of a worker"),
        pytest.param(("lejepa",), SPLIT, id="local views, every batch looked at twice"),
    ],
)
def test_losses_do_not_depend_on_where_crops_are_made(
    debug_run: DebugRun, tmp_path: Path, options: tuple[str, ...], more: tuple[str, ...]
) -> None:
    local = ("data.video.clip.local.size=32", "data.image.clip.local.size=32") if options else ()
    asked = (*STEPS, *more, *local)
    found, wanted = (
        rows(debug_run(tmp_path / on, *asked, f"data.augment_on={on}", options=options)) for on in ("device", "worker")
    )
    assert len(found) == 4
    assert found == wanted


def test_an_incident_keeps_the_pixels_and_can_be_replayed(
    debug_run: DebugRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {}
    for on in ("device", "worker"):
        with monkeypatch.context() as patch:
            Poison(patch, {1: math.nan})
            with pytest.raises(NonFiniteError):
                debug_run(tmp_path / on, *STEPS, f"data.augment_on={on}")
        [kept[on]] = read_micro_batches(tmp_path / on / "incidents" / "step_00000002" / "rank_0.pt")
    for modality, batch in kept["worker"].items():
        assert all(torch.equal(*views) for views in zip(kept["device"][modality].views, batch.views, strict=True))
    assert replay.main([str(tmp_path / "device" / "incidents" / "step_00000002")]) == 0
    assert "finite with these weights" in capsys.readouterr().out
