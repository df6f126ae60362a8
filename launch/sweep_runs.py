"""Carrying a sweep out: the runs one after another or several at a time, each trained and judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path

from launch.judge import scores_of, standing_alarms
from launch.prepare import prepare_data
from launch.processes import Trainings, training
from launch.report_run import read_run
from launch.search import SweepError, Trial, Values, best_of, bisect, verdict
from launch.sweep import MEAN, Sweep, run_name
from launch.sweep_record import Record, words
from vjepa.train.run_dir import RunDir


class SweepStopped(Exception):
    """A signal ended the sweep; its runs saved first."""

    def __init__(self, signum: int) -> None:
        super().__init__("stopped: continue with --resume")
        self.signum = signum


Runner = Callable[[str, Values], Trial]
"""Trains and judges one run, by its name and values; raises SweepStopped."""


def sweep_values(record: Record, runner: Runner, *, jobs: int = 1) -> Trial | None:
    """Run what `record` has not finished, and record it; the best healthy run, None where there is none.

    Raises SweepStopped after a signal, SweepError where a bisection meets a run whose health cannot be judged.
    """
    known = record.finished()
    if known:
        print(f"resumed: {len(known)} finished runs in {record.path}", flush=True)

    def run_once(name: str, values: Values) -> Trial:
        return known[name] if name in known and known[name].values == values else runner(name, values)

    method = _bisect if record.sweep.method == "bisect" else _all
    for name, trial, decision in method(record.sweep, run_once, jobs):
        record.add(name, trial, decision)
    best = best_of(record.trials)
    record.close(best)
    return best


def _bisect(sweep: Sweep, runner: Runner, jobs: int) -> Iterator[tuple[str, Trial, str]]:
    trials: list[Trial] = []
    while len(trials) < sweep.runs:
        value, why = bisect(sweep.axes[0], trials)
        if value is None:
            print(f"end: {why}", flush=True)
            return
        values = {sweep.axes[0].key: value}
        print(f"run {len(trials) + 1} of at most {sweep.runs}: {words(values)} ({why})", flush=True)
        name = run_name(len(trials), values)
        trial = runner(name, values)
        if trial.status == "finished" and trial.alarms is None:
            raise SweepError(f"{name} logged no diagnostics that tell its health: use --method grid or random")
        decision = verdict(trials, trial)
        trials.append(trial)
        yield name, trial, decision


def _all(sweep: Sweep, runner: Runner, jobs: int) -> Iterator[tuple[str, Trial, str]]:
    """All planned runs, `jobs` at a time, as they end; a signal lets those that run save first."""
    points = sweep.planned()
    print(f"{len(points)} runs of {sweep.steps} steps, {jobs} at a time", flush=True)
    stopped: SweepStopped | None = None
    with ThreadPoolExecutor(jobs) as pool:
        names = [run_name(index, values) for index, values in enumerate(points)]
        futures = {pool.submit(runner, name, values): name for name, values in zip(names, points, strict=True)}
        for future in as_completed(futures):
            try:
                yield futures[future], future.result(), ""
            except SweepStopped as error:
                stopped = error
    if stopped is not None:
        raise stopped


class RealRuns:
    """Trains a run in a process of its own under the sweep's folder, unless it is finished, and judges it."""

    def __init__(self, sweep: Sweep, trainings: Trainings) -> None:
        self.sweep, self.trainings = sweep, trainings

    def __call__(self, name: str, values: Values) -> Trial:
        folder = self.sweep.folder / name
        if not (folder / "summary.json").is_file() and (status := self._train(name, values, folder)):
            if self.trainings.stopped_by is not None:
                raise SweepStopped(self.trainings.stopped_by)
            return Trial(values, "failed", None, note=f"status {status}: {_last_words(folder / 'log.txt')}")
        try:
            return self._judge(values, folder)
        except (ValueError, RuntimeError, OSError) as error:
            return Trial(values, "failed", None, note=f"trained, but not judged: {error}")

    def _judge(self, values: Values, folder: Path) -> Trial:
        run = read_run(folder)
        alarms = standing_alarms(run)
        scores = scores_of(run)
        return Trial(
            values,
            alarms=None if alarms is None else tuple(alarms),
            score=_score(scores, self.sweep.score),
            scores={task: round(score, 4) for task, score in scores.items()},
            seconds=run.summary["stages"][self.sweep.stage]["seconds"],
        )

    def _train(self, name: str, values: Values, folder: Path) -> int:
        arguments = ["--recipe", self.sweep.recipe, "--stage", self.sweep.stage]
        arguments += [f"--option={option}" for option in self.sweep.options]
        arguments += ["--resume"] if (folder / "config.yaml").exists() else []
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("a") as log:
            return self.trainings.run(training(*arguments, *self.sweep.arguments(values, name)), log=log)


def _score(scores: dict[str, float], wanted: str) -> float | None:
    if wanted != MEAN:
        return scores.get(wanted)
    return sum(scores.values()) / len(scores) if scores else None


def _last_words(log: Path) -> str:
    """The line of a log that says what went wrong."""
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["nothing was printed"])[-1]


def run_sweep(sweep: Sweep, *, jobs: int, resume: bool) -> int:
    """The whole of it, with real runs; the exit status."""
    with closing(RunDir(sweep.folder)) as held, Trainings() as trainings:
        held.lock()
        record = Record(sweep, resume=resume)
        first = sweep.planned()[0]
        config = sweep.config(first, run_name(0, first))
        prepare_data(config)  # once, before runs that would all make it
        for suite, settings in config.suites().items():
            if not Path(settings.data).is_dir():
                raise SweepError(f"evals.{suite}.data={settings.data} does not exist: the runs could not be scored")
        try:
            best = sweep_values(record, RealRuns(sweep, trainings), jobs=jobs)
        except SweepStopped as stopped:
            print(stopped)
            return 128 + stopped.signum
    return 0 if best is not None else 1


def dry_run(sweep: Sweep) -> int:
    """Print what would be run."""
    print(f"{sweep.method}: at most {sweep.runs} runs of {sweep.steps} steps under {sweep.folder}")
    for index, values in enumerate(sweep.planned()[: 1 if sweep.method == "bisect" else None]):
        print(f"  {run_name(index, values)}: {words(values)}")
    print(f"schedules: {' '.join(sweep.scaled)}")
    return 0
