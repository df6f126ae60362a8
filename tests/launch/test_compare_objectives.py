"""The comparison of objectives: equal operations, two stages, what is done is not done again, and its table."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import pytest

from data_pipeline.prepare.digits import DigitsConfig, make_digits
from evals.protocol import EvalConfig, FitConfig
from launch.processes import Trainings
from launch.submit import parser
from launch.train import load, train
from tests.benchmarks.compare_objectives import (
    ENTRIES,
    RGB,
    UNTRAINED,
    Comparison,
    Entry,
    Training,
    TrainingFailed,
    compare,
    flops_per_step,
    run_entry,
    table,
)
from vjepa.train.signals import StopFlag


class InThisProcess(Trainings):
    """Trainings without the seconds that a process takes to start; those of a name fail."""

    def __init__(self, fails: str = "\0") -> None:
        super().__init__()
        self.commands: list[list[str]] = []
        self.fails = fails

    def run(self, command: Sequence[str], *, prefix: str = "", log: IO[str] | None = None) -> int:
        self.commands.append(list(command))
        if any(self.fails in word for word in command):
            return 1
        arguments = parser().parse_intermixed_args(command[command.index("--recipe") :])
        train(load(arguments), resume=arguments.resume, stop=StopFlag())
        return 0


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("comparison")
    data = make_digits(folder / "digits", DigitsConfig(train_clips=64, probe_train_clips=40, test_clips=20))
    probes = EvalConfig(seeds=(0,), fit=FitConfig(steps=3))
    return Comparison(folder, data, 4, ("data.workers=0", "train.diagnostics_every=1"), probes)


def entry(name: str) -> Entry:
    return next(entry for entry in ENTRIES if entry.name == name)


def value(arguments: Sequence[str], key: str) -> int:
    return int(next(word.removeprefix(f"{key}=") for word in arguments if word.startswith(f"{key}=")))


def test_every_objective_gets_the_steps_that_cost_what_the_recipe_costs(comparison: Comparison) -> None:
    long = Comparison(comparison.out, comparison.data, steps=2500)
    sigreg = entry("sigreg").training
    arguments = long.arguments(sigreg, 1.0, Path("run"), 0)
    steps = value(arguments, "train.steps")
    assert steps < 2500, "whole clips go through the encoder with gradient"
    assert steps * flops_per_step(long.config(sigreg)) == pytest.approx(long.budget, rel=1e-3)
    assert value(arguments, "train.optim.lr.warmup_steps") == round(250 * steps / 2500)
    assert value(arguments, "objective.terms.context_prediction.warmup_end") == steps
    assert value(long.arguments(sigreg, 0.5, Path("run"), 0), "train.steps") == pytest.approx(steps / 2, abs=1)


def test_the_entries_are_ones_that_the_demo_takes(comparison: Comparison) -> None:
    for one in ENTRIES:
        for part in (one.before, one.training):
            if part is not None and not any("{before}" in text for text in part.overrides):
                comparison.config(part).check()


def test_two_stages_are_trained_once_measured_and_not_done_again(comparison: Comparison) -> None:
    trainings = InThisProcess()
    run_entry(comparison, entry("salt"), 1, trainings)
    first, second = trainings.commands
    assert "--option=salt_teacher" in first
    before = comparison.out / "salt" / "seed1" / "before"
    assert f"objective.teacher.path={before}/exports/primary" in second
    result = json.loads((comparison.out / "salt" / "seed1" / "result.json").read_text())
    assert result["copies"] == 2, "the student and its frozen teacher"
    assert result["terms"] == ["masked_prediction"]
    assert result["steps"] == f"{value(first, 'train.steps')} + {value(second, 'train.steps')}"
    assert result["alarms"] is not None
    assert 0 < result["scores"]["segmentation"] < 1
    assert 1 <= result["rankme"] <= result["dim"] == 64
    run_entry(comparison, entry("salt"), 1, trainings)
    assert len(trainings.commands) == 2


def test_a_failed_training_is_named_and_the_next_command_goes_on_in_its_folder(comparison: Comparison) -> None:
    with pytest.raises(TrainingFailed, match=r"lejepa/seed0/run ended with status 1: see .*log.txt"):
        run_entry(comparison, entry("lejepa"), 0, InThisProcess(fails="lejepa"))
    trainings = InThisProcess()
    run_entry(comparison, entry("lejepa"), 0, trainings)
    result = json.loads((comparison.out / "lejepa" / "seed0" / "result.json").read_text())
    assert (result["copies"], result["terms"]) == (1, ["invariance", "sigreg"])


def test_the_whole_comparison_has_references_and_writes_its_table(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.benchmarks.compare_objectives.Trainings", lambda: InThisProcess(fails="broken"))
    broken = Entry("broken", "one that fails", Training(overrides=("objective.momentum=0.99", "run_dir=broken")))
    text = compare(comparison, [entry("vjepa21"), broken], seeds=1, jobs=1)
    assert "| pixels + position | 1 |  | " in text
    assert "| untrained | 1 |  | " in text
    assert "| V-JEPA 2.1 (the demo's recipe) | 1 | " in text
    assert "masked_prediction, context_prediction | 4 | " in text
    assert text.splitlines()[-1].startswith(f"FAILED: {comparison.out}/broken/seed0/run ended with status 1")
    stored = json.loads((comparison.out / "table.json").read_text())
    assert set(stored["results"]) == {RGB, UNTRAINED, "vjepa21", "broken"}
    assert stored["results"]["vjepa21"][0]["tflop"] == pytest.approx(comparison.budget / 1e12, rel=0.5)


def test_the_table_has_means_and_spreads_and_counts_health() -> None:
    def result(seed: int, motion: float, alarms: dict[str, str] | None) -> dict[str, object]:
        scores = dict.fromkeys(("motion_knn", "motion_msm", "segmentation", "direction_segmentation"), 0.5)
        known = {"alarms": alarms, "copies": 2, "parameters": 1000, "terms": ["a", "b"], "steps": "7", "seconds": 3.2}
        measured = {"mean_cosine": -0.25, "rankme": 9.0, "dim": 64, "scores": scores | {"motion": motion}}
        return known | measured | {"seed": seed, "health": ""}

    found = [result(0, 0.8, {}), result(1, 0.9, {"video/level2/rankme": "low"}), result(2, 1.0, None)]
    row = table({"x": found, "y": []}, {"x": "one"}).splitlines()[-1]
    assert row == (
        "| one | 3 | 1 of 2 healthy | -0.25 ± .00 | 9.0 ± .0 of 64 | .500 ± .000 | .900 ± .100 | .500 ± .000 | "
        ".500 ± .000 | .500 ± .000 | 2 | 1,000 | a, b | 7 | 3 |"
    )
