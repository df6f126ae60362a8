"""Alarms name the level that collapsed and what to change, and a run warns, stops or goes back as it was told."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from launch.config import load_for_resume
from tests.train.collapsing import alarms_of_a_rank, collapsed, noted_alarms
from tests.train.ranks import on_ranks
from tests.train.test_health import Poison
from tests.train.test_trainer import DebugRun, numbers, rows, saved_steps
from vjepa.train import checkpoint
from vjepa.train.diagnostics import RULES, AlarmConfig, CollapseAlarms, CollapseError
from vjepa.train.remedies import prevention

HEALTHY = {
    "scale": 1.0,
    "feature_std": 0.6,
    "mean_cosine": 0.5,
    "rankme": 40.0,
    "covariance_rank": 20.0,
    "participation_ratio": 9.0,
    "isotropy": 0.1,
    "alpha_req": 1.2,
    "dead_share": 0.0,
    "lidar": 12.0,
    "nmse": 0.5,
    "cross_sample_gap": 0.2,
    "position_decodability": 0.95,
    "target_prediction_cosine": 0.7,
}
BROKEN = {
    "mean_cosine": 0.97,
    "rankme": 19.0,
    "feature_std": 0.05,
    "covariance_rank": 9.0,
    "dead_share": 0.6,
    "lidar": 5.0,
    "nmse": 1.1,
    "cross_sample_gap": 0.01,
}


def row(values: Mapping[str, float], place: str = "video/level4", prefix: str = "") -> dict[str, float]:
    return {f"diag/{place}/{prefix}{name}": value for name, value in values.items()} | {"diag/ema_distance": 9.0}


def text(metric: str, held_by: tuple[str, ...] = (), prefix: str = "", **changed: float) -> str:
    """What is said of one measure that falls."""
    alarms = CollapseAlarms(AlarmConfig(warmup_steps=0, consecutive=1), held_by)
    assert alarms.observe(0, row(HEALTHY, prefix=prefix)) == []
    (said,) = alarms.observe(10, row(HEALTHY | {metric: BROKEN[metric]} | changed, prefix=prefix))
    return said


# ---------------------------------------------------------------------------------------------------- rules and words


@pytest.mark.parametrize("prefix", ["", "context_"])
@pytest.mark.parametrize("metric", BROKEN)
def test_each_rule_is_broken_by_its_measure_alone_and_says_what_to_change(metric: str, prefix: str) -> None:
    assert set(BROKEN) == set(RULES)
    said = text(metric, prefix=prefix)
    assert said.startswith(f"video level 4: {prefix}{metric} {BROKEN[metric]:.4g} is ")
    assert RULES[metric].meaning in said
    assert ("the trained encoder's own" in said) == bool(prefix)
    assert ("its EMA target is next" in text(metric, ("ema",), prefix)) == bool(prefix)
    assert said.endswith("start again from a checkpoint before the fall")


@pytest.mark.parametrize(
    ("metric", "held_by", "said"),
    [
        ("mean_cosine", ("ema",), "lower train.optim.lr.peak or raise objective.momentum"),
        ("mean_cosine", ("sigreg",), "raise objective.terms.sigreg.weight"),
        ("feature_std", ("vicreg",), "raise objective.terms.vicreg.variance"),
        ("covariance_rank", ("vicreg",), "raise objective.terms.vicreg.covariance"),
        ("cross_sample_gap", ("sigreg",), "embedding.pool=place asks clips apart"),
        ("nmse", ("ema",), "the target may move faster than the predictor learns"),
        ("nmse", ("sigreg",), "lower objective.terms.sigreg.weight"),
        ("rankme", ("online",), "nothing holds the features up"),
        ("rankme", ("ema", "sigreg"), "objective.momentum (0.99 to 0.9995 are known to learn); raise objective.terms"),
    ],
)
def test_the_advice_is_that_of_what_was_to_prevent_it(metric: str, held_by: tuple[str, ...], said: str) -> None:
    assert said in text(metric, held_by)
    assert said not in text(metric)


def test_what_prevents_collapse_is_read_off_the_objective() -> None:
    predictions = {"masked_prediction", "context_prediction"}
    assert prevention("ema", predictions) == ("ema",)
    assert prevention("ema", predictions | {"sigreg"}) == ("ema", "sigreg")
    assert prevention("online", predictions | {"vicreg"}) == ("vicreg",)
    assert prevention("online", predictions) == ("online",)
    assert prevention("online", predictions | {"another"}) == ()
    assert prevention("frozen", predictions) == ("frozen",)
    assert prevention("none", {"invariance", "sigreg"}) == ("sigreg",)


def test_a_small_gap_is_called_positional_where_tokens_know_their_place() -> None:
    assert "positional collapse, tokens know their place (R2 0.95) and not their clip" in text("cross_sample_gap")
    assert "positional" not in text("cross_sample_gap", position_decodability=0.5)
    alarms = CollapseAlarms(AlarmConfig(warmup_steps=0, consecutive=1))
    constant = HEALTHY | {"cross_sample_gap": 0.0, "mean_cosine": 0.99}
    assert not any("positional" in said for said in alarms.observe(0, row(constant)))


def test_the_first_strike_is_remembered_resumed_and_forgotten() -> None:
    alarms = CollapseAlarms(AlarmConfig(warmup_steps=0))
    bad = HEALTHY | {"nmse": 2.0}
    for step, values in enumerate([HEALTHY, bad, HEALTHY, bad]):
        assert alarms.observe(10 * step, row(values)) == []
    resumed = CollapseAlarms(AlarmConfig(warmup_steps=0))
    resumed.load_state_dict(json.loads(json.dumps(alarms.state_dict())))
    for each in (alarms, resumed):
        named = each.observe_named(40, row(bad))
        assert list(named) == ["video/level4/nmse"]
        assert each.broken_since(named) == 30
    alarms.reset_strikes()
    assert alarms.observe(50, row(bad)) == []
    assert alarms.observe(60, row(HEALTHY | {"rankme": 19.0})) == [], "a strike against the best value of before"
    assert alarms.observe(70, row(HEALTHY | {"rankme": 19.0}))


@pytest.mark.parametrize("wrong", [{"covariance_rank_drop": 1.0}, {"lidar_drop": -0.1}, {"max_dead_share": 0.0}])
def test_impossible_limits_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"alarms\.{next(iter(wrong))}"):
        AlarmConfig(**wrong)  # pyright: ignore[reportArgumentType]


# --------------------------------------------------------------------------------------------------------- whole runs

# Nothing has been learned after so few steps: ranks still fall from those of random features, and predictions are bad.
EARLY = (
    "train.steps=20",
    "train.diagnostics_every=4",
    "train.checkpoint.keep=20",
    "train.alarms={warmup_steps: 2, rankme_drop: 0.1, covariance_rank_drop: 0.1}",
    "train.alarms={min_cross_sample_gap: -1.0, max_nmse: 3.0}",
)
STOP, ROLL_BACK = (f"train.alarms.on_collapse={policy}" for policy in ("stop", "roll_back"))


def named(found: list[tuple[int, dict[str, str]]]) -> dict[int, set[str]]:
    """The measures of the alarms that stood, by step."""
    return {step: set(alarms) for step, alarms in found if alarms}


def test_an_intermediate_level_that_collapses_is_named_and_no_other_is(
    debug_run: DebugRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with collapsed(1, range(6, 100)), noted_alarms() as found:
        debug_run(tmp_path / "run", *EARLY)
    assert set(named(found)) == {12, 16, 20}, "evaluations at 8 and 12 are the first two that break a rule"
    measures = {f"{prefix}{name}" for prefix in ("", "context_") for name in ("mean_cosine", "rankme", "feature_std")}
    for alarms in named(found).values():
        assert {name.rpartition("/")[0] for name in alarms} == {"video/level2", "image/level2"}
        assert {f"{modality}/level2/{name}" for modality in ("video", "image") for name in measures} <= alarms
    told = capsys.readouterr().out
    assert "ALARM at step 12: video level 2: mean_cosine 1 is above 0.95 in 2 evaluations in a row" in told
    assert "lower train.optim.lr.peak or raise objective.momentum" in told
    assert set(re.findall(r"ALARM at step \d+: (\w+ level \d)", told)) == {"video level 2", "image level 2"}


def test_a_healthy_run_raises_no_alarm(debug_run: DebugRun, tmp_path: Path) -> None:
    with noted_alarms() as found:
        debug_run(tmp_path / "run", *EARLY, STOP)
    assert len(found) == 20
    assert not named(found)


def test_a_run_that_is_to_stop_stops_and_goes_on_when_told_to(debug_run: DebugRun, tmp_path: Path) -> None:
    with collapsed(1, range(6, 100)):
        with pytest.raises(
            CollapseError, match=r"step 12: features look collapsed\. video level 2: .*=stop; with warn"
        ):
            debug_run(tmp_path / "run", *EARLY, STOP)
        assert saved_steps(tmp_path / "run") == [5, 10]
        held = load_for_resume(tmp_path / "run" / "config.yaml", ["train.alarms.on_collapse=warn"])
        assert held.train.alarms.on_collapse == "warn"
        debug_run(tmp_path / "run", *EARLY, resume=True)
    assert [found["step"] for found in rows(tmp_path / "run")] == list(range(1, 21))


@pytest.mark.parametrize(("also", "collapsed_steps"), [("null", [15]), ("11", [11, 15])])
def test_a_roll_back_goes_behind_the_first_evaluation_that_broke_a_rule(
    debug_run: DebugRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, also: str, collapsed_steps: list[int]
) -> None:
    """Broken at 12 and 16. The checkpoint of 11 steps holds the weights that were measured at 12: it is none."""
    poison = Poison(monkeypatch, {})
    with collapsed(1, range(11, 16)), noted_alarms() as found:
        run = debug_run(tmp_path / "run", *EARLY, ROLL_BACK, f"train.checkpoint.milestone_every={also}")
    assert set(named(found)) == {16}
    aside = sorted(path.name for path in (run / "checkpoints").glob("*.collapsed"))
    assert aside == [f"step_{step:08d}.collapsed" for step in collapsed_steps]
    final = dict(poison.seen)
    assert [final[step] for step in range(20)] == [*range(10), *range(16, 26)]
    assert [found["step"] for found in rows(run)] == list(range(1, 21))
    meta = checkpoint.read_meta(run / "checkpoints" / "step_00000020")
    assert (meta["roll_backs"], meta["detour"]) == (1, 6)
    assert not any(meta["recorder"]["alarms"]["strikes"].values())


def test_a_run_that_went_back_is_resumed_bit_for_bit(debug_run: DebugRun, tmp_path: Path) -> None:
    with collapsed(1, [*range(11, 16), 20, 21]):  # after the roll back data step 21 is measured: one strike at step 16
        whole = debug_run(tmp_path / "whole", *EARLY, ROLL_BACK)
        run = debug_run(tmp_path / "run", *EARLY, ROLL_BACK)
        (run / "checkpoints" / "step_00000020").rename(run / "aside")
        debug_run(run, *EARLY, ROLL_BACK, resume=True)
    assert numbers(run) == numbers(whole)
    metas = [checkpoint.read_meta(each / "checkpoints" / "step_00000020") for each in (run, whole)]
    for meta in metas:
        del meta["seconds"]
    assert metas[0] == metas[1]
    assert len(metas[0]["recorder"]["alarms"]["best"]) > 50


def test_after_a_roll_back_strikes_are_counted_anew(debug_run: DebugRun, tmp_path: Path) -> None:
    """Level 3 has a strike at step 8, which the checkpoint of step 10 holds, and one more at step 12 after it."""
    with collapsed(1, range(11, 16)), collapsed(2, [7, 17]):
        run = debug_run(tmp_path / "run", *EARLY, ROLL_BACK)
    before, last = (checkpoint.read_meta(run / "checkpoints" / f"step_{step:08d}") for step in (10, 20))
    assert before["recorder"]["alarms"]["strikes"]["video/level3/rankme"] == 1
    assert last["roll_backs"] == 1


def test_without_a_checkpoint_from_before_there_is_no_way_back(debug_run: DebugRun, tmp_path: Path) -> None:
    with (
        collapsed(1, range(3, 100)),
        pytest.raises(CollapseError, match=r"step 8: .*No roll back: there is no checkpoint of fewer than 3 steps"),
    ):
        debug_run(tmp_path / "run", *EARLY, ROLL_BACK)
    assert not list((tmp_path / "run" / "checkpoints").glob("*.collapsed"))


def test_going_back_has_an_end(debug_run: DebugRun, tmp_path: Path) -> None:
    with (
        collapsed(1, range(8, 100)),
        pytest.raises(CollapseError, match="No roll back: 1 roll backs were made before"),
    ):
        debug_run(tmp_path / "run", *EARLY, ROLL_BACK, "train.health.max_roll_backs=1")


@pytest.mark.distributed
def test_two_ranks_see_the_same_alarms_and_go_back_together(debug_shards: Path, tmp_path: Path) -> None:
    arguments = (tmp_path / "run", debug_shards, 1, range(11, 16), *EARLY, ROLL_BACK)
    first, second = on_ranks(2, alarms_of_a_rank, *arguments)
    assert first == second
    assert set(named(first)) == {16}
    assert {name.rpartition("/")[0] for name in named(first)[16]} == {"video/level2", "image/level2"}
    assert [found["step"] for found in rows(tmp_path / "run")] == list(range(1, 21))
    meta = checkpoint.read_meta(tmp_path / "run" / "checkpoints" / "step_00000020")
    assert (meta["roll_backs"], meta["detour"], meta["world_size"]) == (1, 6, 2)
