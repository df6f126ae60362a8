"""Every way to prevent collapse is a named option over any recipe, and trains."""

import logging
import math
from pathlib import Path

import pytest

from launch.config import RECIPES, load_config
from tests.train.test_trainer import DebugRun, rows
from vjepa.objectives import ObjectiveConfig

OBJECTIVES = ("vjepa2",)


@pytest.mark.parametrize("option", OBJECTIVES)
def test_an_objective_trains_twenty_steps(option: str, debug_run: DebugRun, tmp_path: Path) -> None:
    found = rows(debug_run(tmp_path / "run", "train.steps=20", options=[option]))
    assert [row["step"] for row in found] == list(range(1, 21))
    assert all(math.isfinite(value) for row in found for value in row.values())
    assert found[-1]["loss"] < found[0]["loss"]


@pytest.mark.parametrize("option", OBJECTIVES)
def test_an_option_says_what_it_is_and_when_to_choose_it(option: str) -> None:
    text = (RECIPES / "options" / f"{option}.yaml").read_text()
    assert "arXiv" in text
    assert "When to choose it" in text


def test_vjepa2_supervises_the_last_block_of_whatever_depth() -> None:
    for recipe, depth in (("debug", 4), ("vit_large", 24), ("vit_gigantic", 48)):
        config = load_config(recipe, "primary", ["run_dir=unused"], options=["vjepa2"])
        assert config.model.encoder_config().levels == (depth - 1,)
        assert [name for name, term in config.objective.terms.items() if term is not None] == ["masked_prediction"]


@pytest.mark.parametrize(("momentum", "is_warned"), [(0.9, True), (0.99999, True), (0.99, False), (0.99925, False)])
def test_a_momentum_outside_the_known_range_is_warned_of(
    momentum: float, is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        ObjectiveConfig(momentum=momentum)
        ObjectiveConfig(momentum=0.996, momentum_end=1.0)  # I-JEPA's ramp ends there
    assert bool(caplog.records) is is_warned
