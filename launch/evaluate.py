"""From finished runs to the table: the suites of their recipe on the frozen encoder, its references, and on the way.

    python -m launch.evaluate RUN [RUN ...] [--jobs N] [--reuse]
    python -m launch.evaluate RUN --step N             (one checkpoint, while the training may still go on)

Rows go to RUN/evals/results.jsonl and RUN/summary.json of the first run (in a chain: the chain's), and into its
report. Of a chain's folder all stages are evaluated, each beside the one before it. Several runs are trainings of one
recipe with different seeds: the table has their spread. Checkpoints that are there give the curve; with --reuse those
that were evaluated on the way are not evaluated again.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from evals.datasets import LabelledClips
from evals.features import EncoderFeatures, FeatureSource, PixelFeatures, read_features
from evals.labelled_suite import read_splits, run_suite
from evals.protocol import RGB, RGB_DIFFERENCE, TRAINED, UNTRAINED, EvalConfig, Row
from evals.results import RESULTS, append_results, merge_summary, print_curve, print_table, read_summary_rows
from evals.suites import SUITES
from evals.tasks import segmentation
from evals.visualize import masks_figure
from launch.chain import ChainRequest
from launch.config import RunConfig, SuiteConfig, load_for_resume, numbers_hash
from launch.report import build_reports
from vjepa.config import ModelConfig, build_models
from vjepa.hub import from_pretrained
from vjepa.nn.encoder import Encoder
from vjepa.train import checkpoint
from vjepa.train.run_dir import RunDir

NUM_PICTURED = 4  # clips in the picture of predicted masks


class EvaluationError(ValueError):
    """Runs that cannot be evaluated; the message says which and what to do."""


@dataclass(frozen=True)
class Job:
    """One set of features to be asked all questions of a suite."""

    run: Path
    suite: str
    model: str
    step: int | None
    settings: SuiteConfig  # of the suite

    def __str__(self) -> str:
        of = "" if self.model in (RGB, RGB_DIFFERENCE) else f" of {self.run}"
        return f"{self.model}{of}" + ("" if self.step is None else f" at step {self.step}")


@dataclass(frozen=True)
class Stage:
    """Finished trainings of one stage, which differ in their seed alone."""

    runs: Sequence[Path]
    configs: Sequence[RunConfig]

    @classmethod
    def read(cls, runs: Sequence[Path]) -> Stage:
        configs = [read_config(run) for run in runs]
        _refuse_different(runs, configs)
        return cls(runs, configs)

    @property
    def config(self) -> RunConfig:
        """Of all, but for the seed."""
        return self.configs[0]


def evaluate(runs: Sequence[Path], *, jobs: int = 1, reuse: bool = False) -> list[Row]:
    """All suites of the runs' recipe, `jobs` feature sets at a time; rows are saved with the first run and printed.

    Of a chain's folder all stages are asked whatever one of them names, and share a table. With `reuse`, checkpoints
    that were evaluated on the way are not evaluated again.
    """
    stages = [Stage.read(each) for each in _stages(runs)]
    suites = {name: settings for stage in stages for name, settings in stage.config.suites().items()}
    if not suites:
        raise EvaluationError(
            f"{', '.join(map(str, runs))}: no evaluation is named: add evals.SUITE.data=FOLDER to the config.yaml "
            f"({', '.join(sorted(SUITES))})"
        )
    return [row for name, settings in suites.items() for row in _evaluate_suite(name, settings, stages, jobs, reuse)]


def _stages(runs: Sequence[Path]) -> list[Sequence[Path]]:
    """The runs of each stage: of chains those in their folders, else one stage."""
    chains = [run for run in runs if ChainRequest.is_in(run)]
    if not chains:
        return [runs]
    requests = [ChainRequest.read(run) for run in runs] if len(chains) == len(runs) else []
    if len({request.trainings for request in requests}) != 1:
        raise EvaluationError(
            f"{', '.join(map(str, runs))}: these are not chains of the same stages: evaluate them apart"
        )
    return [[run / stage for run in runs] for stage in requests[0].trainings]


def _evaluate_suite(suite: str, settings: SuiteConfig, stages: Sequence[Stage], at_once: int, reuse: bool) -> list[Row]:
    """All stages in one table."""
    begin = time.monotonic()
    known = [row for stage in stages if reuse for row in _on_the_way(suite, stage)]
    done = {(row.stage, row.training_seed, row.step) for row in known}
    found = _run_all(list(_jobs(suite, settings, stages, done)), at_once)
    for stage in stages:
        _save(stage.runs[0], stage.config, [row for row in found if row.stage == stage.config.stage])
        if suite in stage.config.suites():  # for the stage's own page
            _picture(stage.runs[0], stage.config, suite, settings)
    rows = [*found, *known]
    train, test = _splits(suite, settings.data, *_cut(stages[0].config))
    title = f"{suite}: probes on {len(train)} clips, {len(test)} test clips, {time.monotonic() - begin:.0f} s"
    print_table(rows, title=title)
    for stage in stages:
        own = [row for row in rows if row.stage == stage.config.stage]
        print_curve(own, total_steps=stage.config.train.steps, of=stage.config.stage if len(stages) > 1 else "")
    return rows


def score_trained(run: Path, step: int | None = None) -> list[Row]:
    """All suites of a run's recipe on its exported encoder, or on that of a checkpoint, without references.

    The rows are saved with the run.
    """
    config = read_config(run, is_finished=step is None)
    if not config.suites():
        raise EvaluationError(f"{run} names no evaluation: add evals.SUITE.data=FOLDER to its config.yaml")
    if step is not None and step not in dict(checkpoint.committed(RunDir(run).checkpoints)):
        raise EvaluationError(f"{run} has no complete checkpoint of step {step}: see {RunDir(run).checkpoints}")
    rows = [
        row for suite, settings in config.suites().items() for row in _score(Job(run, suite, TRAINED, step, settings))
    ]
    _save(run, config, rows)
    return rows


def _save(run: Path, config: RunConfig, rows: Sequence[Row]) -> None:
    append_results(run, rows)
    merge_summary(config.summary_folder(run), rows)


def read_config(run: Path, *, is_finished: bool = True) -> RunConfig:
    """The configuration of a run that is finished, unless that does not matter."""
    stored = RunDir(run).config
    if not stored.is_file():
        raise EvaluationError(f"{stored} does not exist: give the directory of a run")
    config = load_for_resume(stored, [])
    if is_finished and not (run / "exports" / config.stage / "config.json").is_file():
        raise EvaluationError(f"{run} has no exports/{config.stage}: train it to its end first (--resume)")
    return config


def _refuse_different(runs: Sequence[Path], configs: Sequence[RunConfig]) -> None:
    """Several runs share a table only as trainings of the same recipe with different seeds."""
    seeds = [config.train.seed for config in configs]
    if len(set(seeds)) < len(seeds):
        raise EvaluationError(f"{', '.join(map(str, runs))}: seeds {seeds} repeat; a table has one run for each")
    for run, config in zip(runs, configs, strict=True):
        if _apart_from_seed(config) != _apart_from_seed(configs[0]):
            raise EvaluationError(f"{run} and {runs[0]} differ in more than their seed: evaluate them apart")


def _apart_from_seed(config: RunConfig) -> tuple[object, ...]:
    """What trainings of one table have in common; exports of its own chain are each training's own."""
    own = f"{Path(config.run_dir).parent}/"

    def within(path: str | None) -> str | None:
        return path.removeprefix(own) if path is not None and config.in_chain else path

    teacher = replace(config.objective.teacher, path=within(config.objective.teacher.path))
    objective = replace(config.objective, teacher=teacher)
    train = replace(config.train, seed=0)
    alike = replace(config, train=train, objective=objective, init_from=within(config.init_from))
    return numbers_hash(alike), config.evals


def _jobs(
    suite: str, settings: SuiteConfig, stages: Sequence[Stage], done: set[tuple[str, int | None, int | None]]
) -> Iterator[Job]:
    """Long ones first: the pixels, which no training changes, once; then every run's encoder, untrained to trained.

    An untrained encoder that two stages share is asked once.
    """
    yield Job(stages[0].runs[0], suite, RGB_DIFFERENCE, None, settings)
    yield Job(stages[0].runs[0], suite, RGB, None, settings)
    seen: list[tuple[int, ModelConfig]] = []
    for stage in stages:
        for run, config in zip(stage.runs, stage.configs, strict=True):
            yield Job(run, suite, TRAINED, None, settings)
            initial = (config.train.seed, config.model)
            if initial not in seen:
                seen.append(initial)
                yield Job(run, suite, UNTRAINED, None, settings)
            for step, _ in checkpoint.committed(RunDir(run).checkpoints) if settings.curve else ():
                if step < config.train.steps and (config.stage, config.train.seed, step) not in done:
                    yield Job(run, suite, TRAINED, step, settings)


def _on_the_way(suite: str, stage: Stage) -> list[Row]:
    """The rows of checkpoints that were evaluated before the runs ended."""
    tasks = [task.name for task in SUITES[suite].tasks]
    return [
        row
        for run, config in zip(stage.runs, stage.configs, strict=True)
        for row in read_summary_rows(config.summary_folder(run))
        if (row.stage, row.training_seed) == (config.stage, config.train.seed) and row.step is not None
        if any(row.task == task or row.task.startswith(f"{task}_") for task in tasks)
    ]


def _run_all(jobs: Sequence[Job], at_once: int) -> list[Row]:
    """The rows of all jobs, in the order of the table's columns."""
    scored: list[list[Row]] = []
    if at_once == 1:
        scored = [_announce(job, _score(job)) for job in jobs]
    else:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        with ProcessPoolExecutor(min(at_once, len(jobs)), mp_context=context) as pool:
            scored = [_announce(job, rows) for job, rows in zip(jobs, pool.map(_score, jobs), strict=True)]
    return [row for rows in scored for row in rows]


def _announce(job: Job, rows: list[Row]) -> list[Row]:
    print(f"evaluated {job}", flush=True)
    return rows


def _score(job: Job) -> list[Row]:
    """One job's rows; the labelled clips stay in the process for the next job."""
    config = read_config(job.run, is_finished=job.step is None)
    torch.set_num_threads(config.train.threads)
    train, test = _splits(job.suite, job.settings.data, *_cut(config))
    return run_suite(
        SUITES[job.suite],
        [_source(job, config)],
        train,
        test,
        _eval_config(job.settings),
        stage=config.stage,
        step=job.step,
        training_seed=config.train.seed,
    )


def _eval_config(settings: SuiteConfig) -> EvalConfig:
    return EvalConfig(seeds=tuple(range(settings.seeds)))


def _cut(config: RunConfig) -> tuple[int, int]:
    """Patch and tubelet size."""
    encoder = config.model.encoder_config()
    return encoder.patch_size, encoder.tubelet_size


@functools.lru_cache(maxsize=2)
def _splits(suite: str, data: str, patch_size: int, tubelet_size: int) -> tuple[LabelledClips, LabelledClips]:
    return read_splits(SUITES[suite], data, patch_size=patch_size, tubelet_size=tubelet_size)


def _source(job: Job, config: RunConfig) -> FeatureSource:
    if job.model in (RGB, RGB_DIFFERENCE):
        return PixelFeatures(*_cut(config), difference=job.model == RGB_DIFFERENCE)
    return EncoderFeatures(job.model, _encoder(job, config))


def _encoder(job: Job, config: RunConfig) -> Encoder:
    """The exported encoder, the one the run started from, or that of one of its checkpoints."""
    if job.model == TRAINED and job.step is None:
        return from_pretrained(job.run / "exports" / config.stage)
    encoder, _ = build_models(config.model, config.predictor, seed=config.train.seed)
    if job.step is not None:
        path = checkpoint.checkpoint_path(RunDir(job.run).checkpoints, job.step)
        checkpoint.load_module(path, encoder, config.objective.exported)
    return encoder


def _picture(run: Path, config: RunConfig, name: str, settings: SuiteConfig) -> None:
    """RUN/evals/SUITE_predicted_masks.png: what the segmentation probe says of a few test clips."""
    suite = SUITES[name]
    task = next((task for task in suite.tasks if task.kind == "segmentation"), None)
    if task is None:
        return
    train, test = _splits(name, settings.data, *_cut(config))
    shown = LabelledClips(
        test.clips[:NUM_PICTURED],
        {label: values[:NUM_PICTURED] for label, values in test.labels.items()},
        test.keys[:NUM_PICTURED],
    )
    predicted = {}
    for model in (TRAINED, UNTRAINED, RGB):
        source = _source(Job(run, name, model, None, settings), config)
        fitted_on, asked = (read_features(source, part, ["tokens"]) for part in (train, shown))
        predicted[model] = segmentation.predict(task, fitted_on, asked, _eval_config(settings), seed=0)
    figure = masks_figure(shown.clips, shown.labels[task.label], predicted, task.classes)
    figure.savefig(run / RESULTS.parent / f"{name}_predicted_masks.png")


def _evaluate_on_the_way(runs: Sequence[Path], step: int) -> None:
    """One checkpoint, with a line for every task."""
    if len(runs) > 1:
        raise EvaluationError("--step evaluates a checkpoint of one run: give one")
    for row in score_trained(runs[0], step):
        print(f"step {step}: {row.task} ({row.probe}, seed {row.seed}) {row.metric} {row.value:.4f}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.evaluate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directory of a finished run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="feature sets at a time (default: cores)")
    parser.add_argument("--reuse", action="store_true", help="do not evaluate again what was evaluated on the way")
    parser.add_argument("--step", type=int, help="evaluate this checkpoint of one run, which need not be finished")
    options = parser.parse_args(arguments)
    try:
        if options.step is not None:
            _evaluate_on_the_way(options.runs, options.step)
            return
        evaluate(options.runs, jobs=options.jobs, reuse=options.reuse)
        print(f"report: {build_reports(options.runs[0])}")
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
