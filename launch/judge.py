"""Is a finished run healthy, and how good is it? What sweeps and comparisons of objectives ask of each run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from evals.protocol import Row
from evals.suites import SUITES
from launch.evaluate import score_trained
from launch.report_run import Run
from vjepa.train.config import TrainConfig
from vjepa.train.diagnostics import METRIC_KEY, CollapseAlarms

GAP = "cross_sample_gap"
GAP_SHARE = 4  # the last quarter of a run's evaluations


def num_judged(config: TrainConfig) -> int:
    """How many evaluations of its diagnostics a run makes after the warm-up of its alarms."""
    every, first = config.diagnostics_every, config.alarms.warmup_steps
    return sum(step >= first for step in {1, *range(every, config.steps + 1, every)})


def standing_alarms(run: Run) -> dict[str, str] | None:
    """The alarms that stand at a run's end, by measure; None where too few evaluations follow the warm-up to tell."""
    alarms = run.config.train.alarms
    watch, standing, judged = CollapseAlarms(alarms), {}, 0
    for row in run.rows:
        if any(METRIC_KEY.fullmatch(key) for key in row):
            standing = watch.observe_named(row["step"], row)
            judged += row["step"] >= alarms.warmup_steps
    return standing if judged >= alarms.consecutive else None


def task_scores(rows: Iterable[Row]) -> dict[str, float]:
    """The headline number of every task, the mean over its probes; negative where lower is better."""
    headlines = {task.name for suite in SUITES.values() for task in suite.tasks}
    values: dict[str, list[float]] = {}
    for row in rows:
        if row.task in headlines:
            values.setdefault(row.task, []).append(row.value if row.higher_is_better else -row.value)
    return {task: statistics.fmean(found) for task, found in values.items()}


def mean_gap(run: Run) -> float | None:
    """The cross-sample gap over levels and the last quarter of the evaluations; None where it was not measured.

    A stand-in for probes: how much more a prediction fits its own clip than another one.
    """
    found = [[value for key, value in row.items() if _is_gap(key)] for row in run.rows]
    measured = [statistics.fmean(values) for values in found if values]
    return statistics.fmean(measured[-max(1, len(measured) // GAP_SHARE) :]) if measured else None


def _is_gap(key: str) -> bool:
    match = METRIC_KEY.fullmatch(key)
    return match is not None and match["metric"] == GAP


def scores_of(run: Run) -> dict[str, float]:
    """What the run's suites say of its encoder, task by task; without suites its cross-sample gap."""
    if run.config.suites():
        return task_scores(score_trained(run.folder))
    gap = mean_gap(run)
    return {} if gap is None else {GAP: gap}
