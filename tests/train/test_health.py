"""A step that is not sound is skipped, goes back to a checkpoint, or ends the run, as its policy says."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launch import replay
from tests.masking.test_collate import FakeSample
from tests.masking.test_token_drop import collate
from tests.train.test_trainer import DebugRun, numbers, rows, saved_steps
from vjepa.batch import MicroBatch
from vjepa.masking.blocks import BlockMaskConfig
from vjepa.masking.collate import MaskConfig, ViewsConfig
from vjepa.objectives.jepa import JEPA, Result
from vjepa.train import checkpoint
from vjepa.train.health import Health, HealthConfig, NonFiniteError, SpikeError
from vjepa.train.incident import read_micro_batches, write_micro_batches
from vjepa.train.trainer import Trainer

SKIP = "train.health.non_finite=skip"
ROLL_BACK = "train.health.non_finite=roll_back"


class Poison:
    """Multiplies the loss of chosen data steps, whatever the training step that sees them; remembers who saw what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, factors: dict[int, float]) -> None:
        self.seen: list[tuple[int, int]] = []  # (training step, data step), both from 0
        self.updates: list[int] = []
        forward, update = JEPA.forward, Trainer._update

        def poisoned(objective: JEPA, micro_batch: MicroBatch, step: int, *rest: Any) -> Result:
            result = forward(objective, micro_batch, step, *rest)
            data_step = micro_batch["video"].step
            self.seen.append((step, data_step))
            loss = result.loss * factors.get(data_step, 1.0)
            return Result(loss, result.metrics | {"loss": loss.detach()}, result.outputs)

        def counted(trainer: Trainer, grad_norm: Tensor) -> None:
            self.updates.append(trainer.step)
            update(trainer, grad_norm)

        monkeypatch.setattr(JEPA, "forward", poisoned)
        monkeypatch.setattr(Trainer, "_update", counted)


def judged(config: HealthConfig, losses: list[float]) -> list[str | None]:
    health = Health(config)
    found = []
    for step, loss in enumerate(losses, 1):
        trouble = health.judge(step, {"loss": loss, "grad_norm": 1.0}, is_finite=math.isfinite(loss))
        found.append(trouble and f"{trouble.kind} {trouble.policy}")
    return found


# ------------------------------------------------------------------------------------------------------------ judging


def test_a_loss_far_above_the_window_is_a_spike_and_leaves_no_trace_in_the_window() -> None:
    steady = [1.0 + 0.01 * (-1) ** step for step in range(30)]
    found = judged(HealthConfig(spike="skip", spike_std=10.0), [*steady, 1.09, 1.2, 1.2, 1.0])
    assert found == [None] * 30 + [None, "spike skip", "spike skip", None]


def test_a_slow_rise_or_a_fall_is_no_spike() -> None:
    config = HealthConfig(spike="stop", window=30)
    assert judged(config, [1.0 + 0.01 * step for step in range(200)]) == [None] * 200
    assert judged(config, [1.0] * 40 + [0.1] * 5) == [None] * 45


def test_nothing_is_a_spike_before_there_is_a_measure() -> None:
    assert judged(HealthConfig(spike="stop"), [1.0] * 29 + [50.0]) == [None] * 30


def test_spikes_are_ignored_unless_asked_for() -> None:
    assert judged(HealthConfig(), [1.0] * 40 + [50.0]) == [None] * 41


def test_skipping_in_a_row_has_an_end() -> None:
    config = HealthConfig(non_finite="skip", max_skipped=2)
    assert judged(config, [1.0, math.nan, math.nan, 1.0]) == [None, *["non_finite skip"] * 2, None]
    assert judged(config, [math.nan] * 3)[-1] == "non_finite stop"


def test_the_judge_goes_on_where_it_was_saved() -> None:
    first, second = Health(HealthConfig(spike="stop")), Health(HealthConfig(spike="stop"))
    for step in range(40):
        first.judge(step, {"loss": 1.0 + 0.001 * (step % 3), "grad_norm": 1.0}, is_finite=True)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    row = {"loss": 3.0, "grad_norm": 1.0}
    assert second.judge(41, row, is_finite=True) == first.judge(41, row, is_finite=True) is not None


@pytest.mark.parametrize("wrong", [{"spike_std": 0.0}, {"window": 3}, {"max_skipped": 0}, {"max_roll_backs": 0}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"health.*{next(iter(wrong))}"):
        HealthConfig(**wrong)  # pyright: ignore[reportArgumentType]


# --------------------------------------------------------------------------------------------------- skip and roll back


def test_a_skipped_step_makes_no_update_and_the_run_goes_on(
    debug_run: DebugRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = Poison(monkeypatch, {6: math.nan, 9: math.inf})
    found = rows(debug_run(tmp_path / "run", "train.steps=12", SKIP))
    assert poison.updates == [step for step in range(12) if step not in (6, 9)]
    assert [row["step"] for row in found] == list(range(1, 13))
    assert [row["step"] for row in found if row.get("skipped")] == [7, 10]
    assert all(math.isfinite(value) for row in found for value in row.values())
    assert "loss" not in found[6]
    assert saved_steps(tmp_path / "run") == [5, 10, 12]


def test_skipping_changes_no_number_of_a_sound_run(debug_run: DebugRun, tmp_path: Path) -> None:
    plain = debug_run(tmp_path / "plain", "train.steps=12")
    careful = debug_run(tmp_path / "careful", "train.steps=12", SKIP, "train.health.spike=skip")
    assert numbers(careful) == numbers(plain)


def test_a_run_that_only_skips_stops(debug_run: DebugRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Poison(monkeypatch, dict.fromkeys(range(4, 12), math.nan))
    with pytest.raises(NonFiniteError, match=r"step 8: .*3 steps in a row were skipped before it"):
        debug_run(tmp_path / "run", "train.steps=12", SKIP, "train.health.max_skipped=3")


@pytest.mark.parametrize("fallen", [7, 10, 12])
def test_a_roll_back_goes_on_from_the_checkpoint_without_the_data_that_led_there(
    debug_run: DebugRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fallen: int
) -> None:
    """Step 7 is between checkpoints, 10 is one, 12 is the last step."""
    poison = Poison(monkeypatch, {fallen - 1: math.nan})
    run = debug_run(tmp_path / "run", "train.steps=12", ROLL_BACK)
    before = (fallen - 1) // 5 * 5
    final = dict(poison.seen)  # the last data that each training step saw
    assert [final[step] for step in range(12)] == [*range(before), *range(fallen, fallen + 12 - before)]
    assert [row["step"] for row in rows(run)] == list(range(1, 13))
    meta = checkpoint.read_meta(run / "checkpoints" / "step_00000012")
    assert (meta["roll_backs"], meta["detour"]) == (1, fallen - before)
    assert json.loads((run / "summary.json").read_text())["stages"]["primary"]["steps"] == 12


def test_a_run_that_was_rolled_back_is_resumed_with_its_detour(
    debug_run: DebugRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Poison(monkeypatch, {6: math.nan})
    whole = debug_run(tmp_path / "whole", "train.steps=16", ROLL_BACK)
    run = debug_run(tmp_path / "run", "train.steps=16", ROLL_BACK)
    for path in (run / "checkpoints").glob("step_0000001[56]"):
        path.rename(run / path.name)
    debug_run(run, "train.steps=16", ROLL_BACK, resume=True)
    assert numbers(run) == numbers(whole)


def test_without_a_checkpoint_there_is_no_way_back(
    debug_run: DebugRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Poison(monkeypatch, {2: math.nan})
    with pytest.raises(NonFiniteError, match=r"step 3: .*No roll back: there is no checkpoint yet"):
        debug_run(tmp_path / "run", "train.steps=12", ROLL_BACK)


def test_roll_backs_have_an_end(debug_run: DebugRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Poison(monkeypatch, dict.fromkeys(range(6, 40), math.nan))
    with pytest.raises(NonFiniteError, match="No roll back: 2 roll backs were made before"):
        debug_run(tmp_path / "run", "train.steps=12", ROLL_BACK, "train.health.max_roll_backs=2")
    assert saved_steps(tmp_path / "run") == [5]


@pytest.mark.parametrize("policy", ["stop", "roll_back", "skip"])
def test_a_spike_is_met_as_asked(
    debug_run: DebugRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    poison = Poison(monkeypatch, {33: 100.0})
    settings = ("train.steps=36", f"train.health.spike={policy}", "train.health.window=30")
    if policy == "stop":
        with pytest.raises(SpikeError, match=r"step 34: loss .* is above .*10 standard deviations.*train.health"):
            debug_run(tmp_path / "run", *settings)
        return
    run = debug_run(tmp_path / "run", *settings)
    assert [row["step"] for row in rows(run)] == list(range(1, 37))
    final = dict(poison.seen)
    assert final[35] == (35 if policy == "skip" else 39)


# ------------------------------------------------------------------------------------------------- capture and replay


@pytest.fixture
def fallen(debug_run: DebugRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The incident of a run whose seventh batch is not finite, whatever the weights."""
    with monkeypatch.context() as patch:
        Poison(patch, {6: math.nan})
        with pytest.raises(NonFiniteError, match=r"python -m launch.replay .*incidents/step_00000007"):
            debug_run(tmp_path / "run", "train.steps=12")
    return tmp_path / "run" / "incidents" / "step_00000007"


def test_the_batch_that_was_kept_is_the_one_that_was_seen(
    fallen: Path, debug_run: DebugRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[MicroBatch] = []
    forward = JEPA.forward

    def look(objective: JEPA, micro_batch: MicroBatch, step: int, *rest: Any) -> Result:
        seen.append(micro_batch)
        return forward(objective, micro_batch, step, *rest)

    monkeypatch.setattr(JEPA, "forward", look)
    debug_run(tmp_path / "sound", "train.steps=7")
    [kept] = read_micro_batches(fallen / "rank_0.pt")
    assert kept.keys() == seen[6].keys() == {"video", "image"}
    for modality, batch in seen[6].items():
        mine = kept[modality]
        assert (mine.keys, mine.ordinals, mine.grid, mine.step) == (batch.keys, batch.ordinals, batch.grid, 6)
        assert all(torch.equal(*views) for views in zip(mine.views, batch.views, strict=True))
        for found, wanted in zip(mine.masks, batch.masks, strict=True):
            assert torch.equal(found.context, wanted.context)
            assert torch.equal(found.masked, wanted.masked)


def test_views_kept_tokens_and_shared_contexts_are_kept_with_the_batch(tmp_path: Path) -> None:
    config = MaskConfig(video={"targets": BlockMaskConfig(4, 0.15, kind="multiblock")}, views=ViewsConfig(0.5))
    batch = collate(config, range(4))
    write_micro_batches(tmp_path / "rank_0.pt", [{"video": batch}])
    [kept] = read_micro_batches(tmp_path / "rank_0.pt")
    assert kept["video"].num_global == 2
    assert [mask.context_of for mask in kept["video"].masks] == [None, 0, 0, 0]
    for mine, seen in zip(kept["video"].view_contexts, batch.view_contexts, strict=True):
        assert mine is not None
        assert seen is not None
        assert torch.equal(mine, seen)


def test_a_batch_kept_before_there_were_views_is_read(tmp_path: Path) -> None:
    batch = collate(MaskConfig(), range(4), sample=FakeSample)
    old = {"step": 0, "ordinals": [0, 1, 2, 3], "keys": list(batch.keys), "views": list(batch.views), "grid": [4, 8, 8]}
    masks = [(mask.context, mask.masked) for mask in batch.masks]
    torch.save([{"video": old | {"masks": masks}}], tmp_path / "rank_0.pt")
    [kept] = read_micro_batches(tmp_path / "rank_0.pt")
    assert (kept["video"].num_global, kept["video"].view_contexts) == (1, (None,))
    assert [mask.context_of for mask in kept["video"].masks] == [None, None]


def test_a_replay_gives_the_loss_of_the_step_and_of_each_clip(fallen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main([str(fallen)]) == 0
    told = capsys.readouterr().out
    assert "replayed in fp32 with the weights of" in told
    assert "step_00000005, 1 steps before" in told
    assert "finite with these weights" in told
    assert told.count("video:debug/") + told.count("image:debug/") == replay.MOST_CLIPS


def test_a_replay_names_the_first_layer_that_is_not_finite(
    fallen: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = replay.load_objective

    def broken(*arguments: object) -> tuple[JEPA, str]:
        objective, weights = load(*arguments)  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            objective.encoder.get_parameter("blocks.2.mlp.fc1.bias")[0] = math.inf
        return objective, weights

    monkeypatch.setattr(replay, "load_objective", broken)
    assert replay.main([str(fallen)]) == 0
    told = capsys.readouterr().out
    assert "first output that is not finite: encoder.blocks.2.mlp.fc1" in told
    assert "not finite again" in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["absent"], "is no incident with a kept batch"), (["--checkpoint", "6"], r"--checkpoint 6: .* has \[5\] before")],
)
def test_what_cannot_be_replayed_is_refused(
    fallen: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = [] if arguments == ["absent"] else [str(fallen)]
    assert replay.main([*folder, *arguments]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_checkpoint_of_before_there_were_policies_is_resumed(
    debug_run: DebugRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = debug_run(tmp_path / "whole", "train.steps=10")
    run = debug_run(tmp_path / "run", "train.steps=10")
    (run / "checkpoints" / "step_00000010").rename(tmp_path / "aside")
    load = checkpoint.load

    def load_older(*arguments: Any, **keywords: Any) -> dict[str, Any]:
        meta = load(*arguments, **keywords)
        del meta["detour"], meta["roll_backs"], meta["recorder"]["health"]
        return meta

    monkeypatch.setattr(checkpoint, "load", load_older)
    debug_run(run, "train.steps=10", resume=True)
    assert numbers(run) == numbers(whole)
