"""The trainer's promises: batch splits do not matter, nothing non-finite is saved, and a stop loses nothing."""

import json
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.filesystem import FileSystemReader

import vjepa
from data_pipeline.dataset import ClipDataset
from data_pipeline.decode import DecodeError
from data_pipeline.in_flight import Attempt
from launch.config import load_config
from launch.export import export_run
from tests.benchmarks.campaign import numbers as numbers_of
from vjepa.config import build_models
from vjepa.objectives.jepa import JEPA
from vjepa.objectives.terms import MaskedPrediction, Outputs
from vjepa.train import record
from vjepa.train.checkpoint import committed
from vjepa.train.health import NonFiniteError
from vjepa.train.record import BadDataError, Interrupted
from vjepa.train.representation import INFORMATION
from vjepa.train.run_dir import RunDirError
from vjepa.train.signals import StopFlag
from vjepa.train.trainer import Trainer

DebugRun = Callable[..., Path]


def rows(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def numbers(run_dir: Path) -> list[dict[str, float]]:
    """All that is logged but the timings."""
    return [numbers_of(row) for row in rows(run_dir)]


def saved_steps(run_dir: Path) -> list[int]:
    return [step for step, _ in committed(run_dir / "checkpoints")]


@pytest.fixture(scope="module")
def whole(debug_run: DebugRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps of the debug recipe; its schedules, like all, depend on the number of steps only."""
    return debug_run(tmp_path_factory.mktemp("whole") / "run", "train.steps=20")


# ------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("micro", [2, 4])
def test_micro_batches_give_the_losses_of_the_whole_batch(
    debug_run: DebugRun, whole: Path, tmp_path: Path, micro: int
) -> None:
    split = [f"train.micro_batch.{modality}={micro}" for modality in ("video", "image")]
    found = rows(debug_run(tmp_path / "run", "train.steps=20", *split))
    assert len(found) == 20
    for mine, theirs in zip(found, rows(whole), strict=True):
        for name in ("loss", "loss/masked_prediction", "loss/context_prediction/image"):
            assert mine[name] == pytest.approx(theirs[name], abs=2e-6), f"{name} at step {mine['step']}"
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_the_loss_is_the_weighted_sum_of_its_terms(whole: Path) -> None:
    for row in rows(whole):
        terms = [name.split("/")[1:] for name in row if name.startswith("weight/")]
        total = sum(0.5 * row[f"weight/{name}/{m}"] * row[f"loss/{name}/{m}"] for name, m in terms)
        assert row["loss"] == pytest.approx(total, abs=1e-6)


def test_every_logged_row_has_the_numbers_that_tools_rely_on(whole: Path) -> None:
    assert [row["step"] for row in rows(whole)] == list(range(1, 21))
    needed = {"step", "loss", "loss/masked_prediction", "loss/context_prediction", "lr", "clips_per_second"}
    assert all(needed <= row.keys() for row in rows(whole))
    assert all(row["clips_per_second"] > 0 for row in rows(whole))


def test_diagnostics_cover_both_modalities_and_all_levels(whole: Path) -> None:
    predictability = ("target_prediction_cosine", "cross_sample_gap", "nmse", "position_decodability")
    measures = (*INFORMATION, *(f"context_{name}" for name in INFORMATION), *predictability)
    wanted = {"diag/ema_distance"} | {
        f"diag/{modality}/level{level}/{measure}"
        for modality in ("video", "image")
        for level in (1, 2, 3, 4)
        for measure in measures
    }
    with_diagnostics = {row["step"]: row for row in rows(whole) if any(name.startswith("diag/") for name in row)}
    assert sorted(with_diagnostics) == [1, 10, 20]
    for row in with_diagnostics.values():
        assert {name for name in row if name.startswith("diag/")} == wanted
        assert all(torch.isfinite(torch.tensor(row[name])) for name in wanted)


def test_every_trainable_parameter_gets_a_gradient_in_every_step(
    debug_run: DebugRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without: list[list[str]] = []
    gradient_norm = Trainer._gradient_norm

    def look(self: Trainer) -> Tensor:
        named = self.objective.named_parameters()
        without.append([name for name, p in named if p.requires_grad and (p.grad is None or not p.grad.any())])
        return gradient_norm(self)

    monkeypatch.setattr(Trainer, "_gradient_norm", look)
    debug_run(tmp_path / "run", "train.steps=8", "objective.terms.context_prediction={warmup_start: 0, warmup_end: 0}")
    # Mask tokens start at zero, and so does nothing else: a gradient of exactly zero would be a dead parameter.
    assert without == [[]] * 8


@pytest.mark.parametrize(("absent", "present"), [("image", "video"), ("video", "image")])
def test_one_modality_alone_trains(debug_run: DebugRun, tmp_path: Path, absent: str, present: str) -> None:
    found = rows(debug_run(tmp_path / "run", "train.steps=3", f"train.batch.{absent}=0"))
    assert len(found) == 3
    assert f"loss/masked_prediction/{present}" in found[0]
    assert not [name for row in found for name in row if absent in name.split("/")]
    assert found[0]["loss"] == pytest.approx(found[0][f"loss/masked_prediction/{present}"], abs=1e-6)


# ------------------------------------------------------------------------------------------- stopping and going on


class StopAt(StopFlag):
    """A stop flag that is set as if a signal had come during a step."""

    def __init__(self, step: int, signum: int) -> None:
        super().__init__()
        self.left, self.signum = step, signum

    def as_list(self) -> list[float]:
        self.left -= 1
        if self.left == 0:
            self.set(self.signum)
        return super().as_list()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_saves_and_the_resumed_run_goes_on_bit_identically(
    debug_run: DebugRun, whole: Path, tmp_path: Path, signum: int
) -> None:
    with pytest.raises(Interrupted, match=r"at step \d+, saved: continue with --resume") as stopped:
        debug_run(tmp_path / "run", "train.steps=20", stop=StopAt(7, signum))
    assert stopped.value.signum == signum
    newest = saved_steps(tmp_path / "run")[-1]
    assert newest in (7, 8)
    assert rows(tmp_path / "run")[-1]["step"] == newest
    debug_run(tmp_path / "run", "train.steps=20", resume=True)
    assert numbers(tmp_path / "run") == numbers(whole)
    weights = "exports/primary/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (whole / weights).read_bytes()


def test_resuming_a_finished_run_changes_nothing(debug_run: DebugRun, whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes(), (whole / "summary.json").read_bytes()
    debug_run(whole, "train.steps=20", resume=True)
    assert ((whole / "metrics.jsonl").read_bytes(), (whole / "summary.json").read_bytes()) == before


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_run_goes_on_from_the_one_before(
    debug_run: DebugRun, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = debug_run(tmp_path / "run", "train.steps=20")
    newest = run / "checkpoints" / "step_00000020"
    data = bytearray((newest / "dcp" / "__0_0.distcp").read_bytes())
    data[1000] ^= 1
    (newest / "dcp" / "__0_0.distcp").write_bytes(data)
    debug_run(run, "train.steps=20", resume=True)
    assert "step_00000020 is damaged (dcp/__0_0.distcp does not have the content" in caplog.text
    assert saved_steps(run) == [5, 10, 15, 20]
    assert numbers(run) == numbers(whole)


def test_a_second_run_in_the_same_folder_is_refused_and_harms_nothing(debug_run: DebugRun, whole: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in whole.rglob("*") if path.is_file())
    with pytest.raises(RunDirError, match="holds a run already"):
        debug_run(whole, "train.steps=20")
    assert sorted((path, path.stat().st_mtime_ns) for path in whole.rglob("*") if path.is_file()) == before


def test_checkpoints_hold_all_and_only_finite_numbers(whole: Path) -> None:
    assert saved_steps(whole) == [5, 10, 15, 20]
    meta = json.loads((whole / "checkpoints" / "step_00000020" / "meta.json").read_text())
    assert (meta["step"], meta["world_size"], meta["recorder"]["samples_seen"]) == (20, 1, 20 * 24)


# ------------------------------------------------------------------------------------------------------ what goes wrong


def poison(monkeypatch: pytest.MonkeyPatch, step: int, *, through: str) -> None:
    """Make the step numbered `step` from 1 not finite, in its loss or only in a gradient."""
    calls = 0
    term = MaskedPrediction.__call__

    def poisoned(self: MaskedPrediction, outputs: Outputs) -> Tensor:
        nonlocal calls
        calls += outputs.modality == "video"
        value = term(self, outputs)
        if calls != step:
            return value
        if through == "gradient":
            value.register_hook(lambda gradient: gradient * float("nan"))
            return value
        return value * float(through)

    monkeypatch.setattr(MaskedPrediction, "__call__", poisoned)


@pytest.mark.parametrize(
    ("step", "through"),
    [(3, "nan"), (3, "inf"), (3, "gradient"), (5, "nan"), (10, "nan"), (12, "nan")],
    ids=lambda value: str(value),
)
def test_a_step_that_is_not_finite_stops_the_run_before_anything_of_it_is_saved(
    debug_run: DebugRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, through: str
) -> None:
    """Step 5 is saved at once, 10 also has diagnostics, 12 is the last one."""
    with monkeypatch.context() as patch:
        poison(patch, step, through=through)
        with pytest.raises(NonFiniteError, match=rf"step {step}: .*not finite.*video:debug/.*--resume"):
            debug_run(tmp_path / "run", "train.steps=12")
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, step))
    assert saved_steps(tmp_path / "run") == [s for s in (5, 10) if s < step]
    assert not list((tmp_path / "run").rglob("*.partial"))
    told = json.loads((tmp_path / "run" / f"incidents/step_{step:08d}/incident.json").read_text())
    assert len(told["keys"]["0"]) == 24
    debug_run(tmp_path / "run", "train.steps=12", resume=True)  # what caused it is gone
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 13))


def test_features_that_are_not_finite_stop_a_step_with_diagnostics_by_name(
    debug_run: DebugRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = JEPA.forward

    def poisoned(self: JEPA, micro_batch: Any, step: int, *rest: Any) -> Any:
        if step == 9:
            with torch.no_grad():
                next(self.exported.parameters()).fill_(float("nan"))
        return forward(self, micro_batch, step, *rest)

    monkeypatch.setattr(JEPA, "forward", poisoned)
    with pytest.raises(NonFiniteError, match=r"step 10: .*not finite.*debug/"):
        debug_run(tmp_path / "run", "train.steps=12")
    assert saved_steps(tmp_path / "run") == [5]


def break_records(monkeypatch: pytest.MonkeyPatch, is_bad: Callable[[int], bool]) -> None:
    load = ClipDataset._load

    def broken(self: ClipDataset, attempt: Attempt, *rest: Any) -> Any:
        if attempt.number == 0 and is_bad(attempt.ordinal):
            raise DecodeError("cut short")
        return load(self, attempt, *rest)

    monkeypatch.setattr(ClipDataset, "_load", broken)


def test_bad_samples_are_named_once_each(debug_run: DebugRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_records(monkeypatch, lambda ordinal: ordinal == 17)
    run = debug_run(tmp_path / "run", "train.steps=5")
    bad = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["modality"], row["ordinal"], row["reason"]) for row in bad] == [
        (2, "video", 17, "cut short"),
        (2, "image", 17, "cut short"),
    ]
    assert all(row["key"] and row["source"] == "debug" for row in bad)


def test_too_many_bad_samples_stop_the_run(
    debug_run: DebugRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_records(monkeypatch, lambda ordinal: ordinal % 4 == 0)
    with pytest.raises(BadDataError, match=r"\d+ of 216 samples \(25.0%\).*data\.max_bad_fraction=5.0%.*bad_samples"):
        debug_run(tmp_path / "run", "train.steps=20")
    assert record.CEILING_FROM == 200


def test_the_ceiling_can_be_raised(debug_run: DebugRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_records(monkeypatch, lambda ordinal: ordinal % 4 == 0)
    run = debug_run(tmp_path / "run", "train.steps=10", "data.max_bad_fraction=0.3")
    assert len((run / "bad_samples.jsonl").read_text().splitlines()) == 10 * 2 * 3
    assert json.loads((run / "checkpoints/step_00000010/meta.json").read_text())["recorder"]["bad_seen"] == 60


def test_the_exported_encoder_is_the_target_of_the_last_checkpoint(whole: Path, tmp_path: Path) -> None:
    exported = vjepa.from_pretrained(whole / "exports" / "primary").state_dict()
    stored = {f"model.target.encoder.{name}": torch.zeros_like(value) for name, value in exported.items()}
    reader = FileSystemReader(whole / "checkpoints" / "step_00000020" / "dcp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        state_dict_loader.load(stored, storage_reader=reader, no_dist=True)
    assert len(exported) > 50
    for name, value in exported.items():
        assert torch.equal(value, stored[f"model.target.encoder.{name}"]), name
    untrained, _ = build_models(*_model_settings(), seed=0)
    again = export_run(tmp_path, load_config("debug", "primary"), untrained.state_dict())
    first = next(iter(exported))
    assert not torch.equal(vjepa.from_pretrained(again).state_dict()[first], exported[first])


def _model_settings() -> tuple[Any, Any]:
    config = load_config("debug", "primary")
    return config.model, config.predictor
