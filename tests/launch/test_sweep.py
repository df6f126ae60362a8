"""Sweeps: what a command asks for and what is refused, record and resume with known runs, and one real sweep."""

import json
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from evals.protocol import Row
from launch.config import load_config
from launch.judge import mean_gap, standing_alarms, task_scores
from launch.processes import Trainings
from launch.report_run import Run
from launch.search import SweepError, Trial, Values
from launch.shorten import at_length
from launch.submit import main as submit
from launch.submit import parser
from launch.sweep import Sweep, read_sweep
from launch.sweep_record import Record
from launch.sweep_runs import SweepStopped, sweep_values
from vjepa.config import ConfigError

KEY = "objective.terms.sigreg.weight"
DEMO = ("--recipe", "demo", "--option", "sigreg")


def asked(*arguments: str) -> Sweep:
    return read_sweep(parser().parse_intermixed_args(arguments))


# ---------------------------------------------------------------------------------------------------- what is asked


def test_a_key_alone_is_bisected_three_decades_around_its_value_in_runs_of_a_sixth() -> None:
    sweep = asked(*DEMO, "--sweep", KEY)
    (axis,) = sweep.axes
    assert (axis.low, axis.high) == pytest.approx((6e-4, 600))
    assert (sweep.method, sweep.runs, sweep.steps) == ("bisect", 6, 2500 // 6)


def test_a_key_that_the_recipe_leaves_at_its_default_has_a_range_too() -> None:
    (axis,) = asked("--recipe", "demo", "--sweep", "objective.terms.context_prediction.lambda_image").axes
    assert (axis.low, axis.high) == pytest.approx((0.7e-3, 0.7e3))
    (axis,) = asked(
        "--recipe", "demo", "--sweep", "train.optim.lr.warmup_steps", "--method", "grid", "--runs", "3"
    ).axes
    assert (axis.low, axis.high, axis.is_whole) == (1, 250_000, True)


def test_the_schedules_of_the_runs_are_scaled_and_what_the_user_sets_stays(tmp_path: Path) -> None:
    sweep = asked(
        *DEMO, "--sweep", KEY, "--steps", "500", f"run_dir={tmp_path}", "train.optim.lr.warmup_steps=7", "train.seed=3"
    )
    config = sweep.config({KEY: "2"}, "01_weight=2")
    assert config.train.steps == 500
    assert config.train.optim.lr.warmup_steps == 7
    assert config.train.alarms.warmup_steps == 250
    assert config.train.diagnostics_every == 25
    assert config.objective.terms["context_prediction"]["warmup_end"] == 500
    assert config.objective.terms["sigreg"]["weight"] == 2
    assert config.run_dir == str(tmp_path / "01_weight=2")
    command = sweep.command({KEY: "2"})
    assert f"--option=sigreg train.optim.lr.warmup_steps=7 train.seed=3 {KEY}=2 run_dir=" in command
    assert "train.steps" not in command, "the training itself has the recipe's length"


def test_train_steps_says_the_same_as_steps() -> None:
    assert asked(*DEMO, "--sweep", KEY, "train.steps=400") == asked(*DEMO, "--sweep", KEY, "--steps", "400")
    with pytest.raises(SweepError, match=r"--steps 300 and train.steps=400 differ"):
        asked(*DEMO, "--sweep", KEY, "--steps", "300", "train.steps=400")


def test_defaults_of_terms_are_scaled_as_well() -> None:
    """V-JEPA 2.1's ramp of lambda lies in the term's defaults, not in a recipe that does not set it."""
    config = load_config("debug", "primary", ["objective.terms.context_prediction=null", "train.steps=45000"])
    assert not any("warmup_end" in override for override in at_length(config, 15_000))
    config = load_config("vit_large", "primary", ["train.steps=45000"])
    assert {
        "objective.terms.context_prediction.warmup_start=5000",
        "objective.terms.context_prediction.warmup_end=10000",
    } <= set(at_length(config, 15_000))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--sweep", f"{KEY}=1,2", "--method", "bisect"), "bisect takes one key with a range of positive"),
        (("--sweep", f"{KEY}=0..2", "--method", "bisect"), "bisect takes one key with a range of positive"),
        (("--sweep", KEY, "--sweep", "train.seed=1..9", "--method", "bisect"), "bisect takes one key"),
        (("--sweep", KEY, "--jobs", "2"), "--jobs: a bisection decides after every run"),
        (("--sweep", KEY, "--runs", "0"), "must be at least 1"),
        (("--sweep", KEY, f"{KEY}=1"), "both swept and set"),
        (("--sweep", KEY, "--sweep", KEY), "given twice"),
        (("--sweep", KEY, "report=true"), "report is set by the sweep"),
        (("--sweep", "train.steps=10,20"), "train.steps is set by the sweep"),
        (("--sweep", KEY, "train.seed"), "'train.seed' is no override: write key=value"),
        (("--sweep", "train.optim.lr.start"), r"is 0\.0 in this recipe: give --range"),
        (("--sweep", "no.such.key"), "is None in this recipe: give --range"),
        (("--sweep", "train.seed=1,2", "--range", "1", "2"), "--range is for one --sweep KEY without values"),
        (("--sweep", KEY, "--range", "2", "1"), "low end must lie below"),
        (("--sweep", KEY, "train.steps=0"), "must be a whole number of at least 1"),
        (("--sweep", KEY, "--score", "depth"), "--score depth is none of this recipe's: motion, "),
        (("--sweep", KEY, "train.alarms.warmup_steps=1000"), "needs 2 evaluations after the warm-up"),
        (("--sweep", "train.optim.lr.pek=1,2"), "pek"),
        (("--sweep", "mask.truncate=random,sideways"), "sideways"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(arguments: tuple[str, ...], told: str) -> None:
    with pytest.raises((SweepError, ConfigError), match=told):
        asked(*DEMO, *arguments)


def test_settings_of_a_sweep_are_refused_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(["--recipe", "debug", "--runs", "3", "--method", "grid"]) == 2
    assert capsys.readouterr().err == "error: --method, --runs: only with --sweep KEY\n"


def test_a_dry_run_lists_the_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    grid = ["--sweep", "train.seed=1,2", "--sweep", f"{KEY}=0.1..10", "--runs", "6", "--dry-run"]
    assert submit([*DEMO, *grid, f"run_dir={tmp_path / 'none'}"]) == 0
    said = capsys.readouterr().out
    assert f"  05_seed=2,weight=1: train.seed=2 {KEY}=1\n" in said
    assert not (tmp_path / "none").exists()


# ------------------------------------------------------------------------------------------ record, resume, failures


class KnownRuns:
    """Runs with a known response to the weight; some fail, and a signal comes after so many."""

    def __init__(self, *, cliff: float = 1.0, fails: tuple[float, ...] = (), stop_after: int | None = None) -> None:
        self.cliff, self.fails, self.stop_after = cliff, fails, stop_after
        self.started: list[str] = []

    def __call__(self, name: str, values: Values) -> Trial:
        if len(self.started) == self.stop_after:
            raise SweepStopped(signal.SIGTERM)
        self.started.append(name)
        weight = float(values[KEY])
        if weight in self.fails:
            return Trial(values, "failed", None, note="status 1: error: loss is nan")
        alarms = ("video/level4/rankme",) if weight < self.cliff else ()
        return Trial(values, alarms=alarms, score=0.5 - 0.01 * abs(weight - 20) ** 0.5, scores={"motion": 0.5})


def bisection(folder: Path, runs: int = 6) -> Sweep:
    return asked(*DEMO, "--sweep", KEY, "--range", "1e-3", "1e3", "--runs", str(runs), f"run_dir={folder}")


def stored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sweep.json").read_text())


def test_a_bisection_prints_and_writes_its_path_and_the_command_of_its_choice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = sweep_values(Record(bisection(tmp_path), resume=False), KnownRuns(cliff=5.0))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"run 1 of at most 6: {KEY}=1 (the middle of the range)"
    assert said[1].endswith(
        "unhealthy (1 alarms: video/level4/rankme), score 0.4564, 0 s; too low: collapse alarms stand"
    )
    assert said[3].endswith("healthy, score 0.4659, 0 s; healthy, the first: its neighbours decide")
    assert best is not None
    content = stored(tmp_path)
    assert len(content["runs"]) == 6
    assert content["runs"]["01_weight=1"]["decision"] == "too low: collapse alarms stand"
    assert content["chosen"]["values"] == dict(best.values)
    assert said[-1].startswith(f"chosen: {KEY}={best.values[KEY]} (score ")
    assert said[-1].endswith(content["chosen"]["command"])
    assert f"python launch/submit.py --recipe demo --stage primary --option=sigreg {KEY}=" in said[-1]


def test_a_stopped_sweep_goes_on_where_it_was_and_runs_nothing_twice(tmp_path: Path) -> None:
    whole = sweep_values(Record(bisection(tmp_path / "whole"), resume=False), KnownRuns())
    first, second = KnownRuns(stop_after=3), KnownRuns()
    with pytest.raises(SweepStopped):
        sweep_values(Record(bisection(tmp_path / "cut"), resume=False), first)
    assert len(stored(tmp_path / "cut")["runs"]) == 3
    resumed = sweep_values(Record(bisection(tmp_path / "cut"), resume=True), second)
    assert resumed == whole
    assert [*first.started, *second.started] == list(stored(tmp_path / "whole")["runs"])
    assert stored(tmp_path / "cut")["runs"] == stored(tmp_path / "whole")["runs"]


def test_more_runs_continue_a_bisection(tmp_path: Path) -> None:
    sweep_values(Record(bisection(tmp_path, runs=2), resume=False), KnownRuns())
    later = KnownRuns()
    sweep_values(Record(bisection(tmp_path, runs=4), resume=True), later)
    assert [name[:3] for name in later.started] == ["03_", "04_"]


def test_a_failed_run_is_named_and_does_not_end_the_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = sweep_values(Record(bisection(tmp_path), resume=False), KnownRuns(cliff=0.05, fails=(1.0,)))
    said = capsys.readouterr().out
    assert f"{KEY}=1: FAILED (status 1: error: loss is nan); failed: taken for too high" in said
    assert f"failed: 01_weight=1 (logs: {tmp_path}/NAME/log.txt; --resume tries them again)" in said
    assert best is not None
    assert best.value < 1
    again = KnownRuns(cliff=0.05)
    sweep_values(Record(bisection(tmp_path), resume=True), again)
    assert again.started[0] == "01_weight=1", "what failed is tried again"


def test_without_a_healthy_run_nothing_is_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep_values(Record(bisection(tmp_path), resume=False), KnownRuns(cliff=1e9)) is None
    assert capsys.readouterr().out.splitlines()[-1].startswith("no run is healthy: widen the range")
    assert stored(tmp_path)["chosen"] is None


def test_another_command_is_no_continuation(tmp_path: Path) -> None:
    Record(bisection(tmp_path), resume=False).add("01_weight=1", KnownRuns()("01_weight=1", {KEY: "1"}), "")
    with pytest.raises(SweepError, match=r"sweep.json exists: continue that sweep with --resume"):
        Record(bisection(tmp_path), resume=False)
    other = asked(*DEMO, "--sweep", KEY, "--range", "1e-3", "10", f"run_dir={tmp_path}")
    with pytest.raises(SweepError, match=r"the command changes sweep: .*1000.* -> .*10\.0"):
        Record(other, resume=True)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(SweepError, match="is not readable"):
        Record(bisection(tmp_path), resume=True)


def test_a_grid_runs_several_at_a_time_and_all_of_them_before_a_signal_ends_it(tmp_path: Path) -> None:
    sweep = asked(*DEMO, "--sweep", f"{KEY}=1,5,20,100", "--jobs", "3", f"run_dir={tmp_path}")
    together, most = 0, 0
    lock, are_three = threading.Lock(), threading.Event()

    def runner(name: str, values: Values) -> Trial:
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
            if together == 3:
                are_three.set()
        assert are_three.wait(120)
        time.sleep(0.05)  # a fourth one too many would come meanwhile
        with lock:
            together -= 1
        return KnownRuns()(name, values)

    best = sweep_values(Record(sweep, resume=False), runner, jobs=3)
    assert most == 3
    assert best is not None
    assert best.values == {KEY: "20"}
    assert list(stored(tmp_path)["runs"]) == ["01_weight=1", "02_weight=5", "03_weight=20", "04_weight=100"]
    cut = asked(*DEMO, "--sweep", f"{KEY}=1,5,20,100", f"run_dir={tmp_path / 'cut'}")
    with pytest.raises(SweepStopped):
        sweep_values(Record(cut, resume=False), KnownRuns(stop_after=2))
    assert len(stored(tmp_path / "cut")["runs"]) == 2


# ------------------------------------------------------------------------------------------------ health and scores


def run_with(rows: Sequence[Mapping[str, float]], *overrides: str) -> Run:
    config = load_config("debug", "primary", ["train.alarms.warmup_steps=5", "train.diagnostics_every=5", *overrides])
    return Run(Path("nowhere"), config, [dict(row) for row in rows])


def measured(step: int, rank: float, gap: float = 0.5) -> dict[str, float]:
    return {"step": step, "diag/video/level2/rankme": rank, "diag/video/level4/cross_sample_gap": gap}


def test_alarms_stand_only_where_the_last_evaluations_raise_them() -> None:
    low, well = 1.5, 9.0
    assert standing_alarms(run_with([measured(5, low), measured(10, low), measured(15, well)])) == {}
    found = standing_alarms(run_with([measured(5, well), measured(10, low), measured(15, low), {"step": 16}]))
    assert found is not None
    assert list(found) == ["video/level2/rankme"]
    assert standing_alarms(run_with([measured(5, well), measured(10, well), measured(15, low)])) == {}, "once is none"


def test_health_is_not_judged_by_fewer_evaluations_than_an_alarm_takes() -> None:
    rows = [measured(1, 1.0), measured(35, 9.0), measured(40, 1.0)]
    assert standing_alarms(run_with(rows, "train.alarms.warmup_steps=36")) is None
    assert standing_alarms(run_with(rows, "train.alarms.warmup_steps=35")) == {}
    assert standing_alarms(run_with([{"step": step} for step in range(40)])) is None, "nothing was measured"


def test_a_bisection_ends_where_a_run_logged_no_diagnostics(tmp_path: Path) -> None:
    def blind(name: str, values: Values) -> Trial:
        return Trial(values, alarms=None, score=0.5)

    with pytest.raises(SweepError, match="01_weight=1 logged no diagnostics that tell its health"):
        sweep_values(Record(bisection(tmp_path), resume=False), blind)


def test_without_probes_the_gap_of_the_last_quarter_is_the_score() -> None:
    rows = [measured(step, 9.0, gap=step / 100) for step in range(5, 45, 5)]
    assert mean_gap(run_with([*rows, {"step": 41}])) == pytest.approx((0.35 + 0.40) / 2)
    assert mean_gap(run_with([{"step": 1}])) is None


def test_scores_are_the_headlines_of_the_tasks_over_their_probes() -> None:
    def row(task: str, value: float, seed: int = 0, better: bool = True) -> Row:
        return Row("primary", task, "linear", "accuracy", better, "trained", seed, value)

    rows = [row("motion", 0.4), row("motion", 0.6, 1), row("segmentation", 0.3, better=False)]
    rows.append(row("segmentation_moving", 0.9))
    assert task_scores(rows) == pytest.approx({"motion": 0.5, "segmentation": -0.3}), "classes are no headlines"


# -------------------------------------------------------------------------------------------------------- processes


def test_a_signal_reaches_what_runs_and_nothing_is_started_after_it(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); print('up', flush=True); time.sleep(600)"
    )
    log = tmp_path / "log"
    with Trainings() as trainings, log.open("w") as file:

        def interrupt() -> None:
            while not log.read_text():
                time.sleep(0.01)
            trainings.stop(signal.SIGTERM)

        thread = threading.Thread(target=interrupt)
        thread.start()
        assert trainings.run([sys.executable, "-c", code], log=file) == 7
        thread.join()
        assert trainings.run([sys.executable, "-c", "print('never')"], log=file) == 128 + signal.SIGTERM
    assert log.read_text() == "up\n"


# --------------------------------------------------------------------------------------------------- one real sweep


def test_a_real_bisection_trains_judges_records_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs of the debug recipe, the second in a second segment; without probes the gap is the score."""
    arguments = ["--recipe", "debug", "--option", "sigreg", "--sweep", KEY, "--steps", "6", f"run_dir={tmp_path}"]
    arguments += ["train.alarms.warmup_steps=2", "train.diagnostics_every=2", "train.alarms.min_cross_sample_gap=-9"]
    assert submit([*arguments, "--runs", "1"]) in (0, 1)
    first = stored(tmp_path)["runs"]
    assert list(first) == ["01_weight=0.6"]
    assert submit([*arguments, "--runs", "2", "--resume"]) in (0, 1)
    said = capsys.readouterr().out
    assert "resumed: 1 finished runs" in said
    runs = stored(tmp_path)["runs"]
    assert len(runs) == 2
    assert runs["01_weight=0.6"] == first["01_weight=0.6"]
    for name, run in runs.items():
        assert run["status"] == "finished", run
        assert run["alarms"] is not None
        assert set(run["scores"]) == {"cross_sample_gap"}
        assert len((tmp_path / name / "metrics.jsonl").read_text().splitlines()) == 6
        assert (tmp_path / name / "log.txt").read_text().count("done: 6 steps") == 1
