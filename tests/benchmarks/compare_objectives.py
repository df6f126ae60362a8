"""Every objective on the demo's data for the same operations: one table, with an untrained encoder and pixels beside.

    python -m tests.benchmarks.compare_objectives --out runs/objectives [--steps 2500] [--seeds 3] [--jobs 2]
        [--only NAME ...] [key=value ...]

The budget is what the recipe itself (V-JEPA 2.1) takes for --steps steps by its own count of operations (JEPA.flops,
the mean over sampled masks, teacher included). Every other objective gets the steps that cost as much, its schedules
scaled with them; two stages share the budget. Probes ask clips of their own (DEVELOPMENT), as in the ablations.
Finished trainings are not run again: stopped, the command continues. OUT/table.json has what the table shows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from data_pipeline.prepare.digits import DigitsConfig, make_digits
from evals.datasets import LabelledClips
from evals.features import EncoderFeatures, FeatureSource, PixelFeatures, read_features
from evals.labelled_suite import read_splits, run_suite
from evals.protocol import RGB, TRAINED, UNTRAINED, EvalConfig
from evals.suites import MOTION
from launch.config import RunConfig, load_config
from launch.judge import standing_alarms, task_scores
from launch.planner import Planner
from launch.processes import Trainings, training
from launch.report_run import read_run
from launch.shorten import at_length
from tests.benchmarks.ablations import DEVELOPMENT
from vjepa.config import build_models
from vjepa.hub import from_pretrained
from vjepa.nn.encoder import Encoder
from vjepa.objectives import build_objective
from vjepa.train.diagnostics import mean_cosine, rankme
from vjepa.train.memory_trace import fake_micro_batch
from vjepa.train.run_dir import write_text

RECIPE, STAGE = "demo", "primary"
ROWS = 4096  # token features that cosine and RankMe are taken of
TASKS = {
    "motion_knn": "k-NN",
    "motion": "motion",
    "motion_msm": "motion_msm",
    "segmentation": "segmentation",
    "direction_segmentation": "direction_seg.",
}


@dataclass(frozen=True)
class Training:
    """One training over the demo's recipe: named options, then what else it needs there."""

    options: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """An objective of the table."""

    name: str
    says: str
    training: Training = Training()
    before: Training | None = None
    """An earlier stage; `{before}` in the later one's overrides is its run directory."""
    share_before: float = 0.5
    """The earlier stage's share of the operations."""


# What options need at the demo's size: views that differ (it crops nothing), a predictor as small as its own, masks of
# their own alone, as many clips a step, and a weight of SIGReg for a batch of 16, above the one that a bisection finds
# (31.6, tests/benchmarks/bisection.py), which holds for 400 steps and not for 1,685.
VIEWS = (
    "data.video.clip.scale_min=0.3",
    "data.video.clip.local.size=16",
    "train.batch.image=0",
)
OWN_MASKS = ("mask.video.tube=null", "mask.video.future=null", "mask.per_step=null")
TEACHER = "objective.teacher.path={before}/exports/primary"
ENTRIES = [
    Entry("vjepa21", "V-JEPA 2.1 (the demo's recipe)"),
    Entry("vjepa2", "V-JEPA 2", Training(("vjepa2",), ("objective.momentum=0.99",))),
    Entry("ijepa", "I-JEPA on clips", Training(("ijepa",), (*OWN_MASKS, "train.batch.video=16"))),
    Entry("sigreg", "online target, SIGReg", Training(("sigreg",), ("objective.terms.sigreg.weight=118",))),
    Entry("vicreg", "online target, VICReg", Training(("vicreg",))),
    Entry("visreg", "online target, VISReg", Training(("visreg",))),
    Entry("lejepa", "LeJEPA", Training(("lejepa",), VIEWS)),
    Entry(
        "levjepa", "LeVJEPA (a quarter of the tokens kept)", Training(("levjepa",), (*VIEWS, "mask.views.keep=0.25"))
    ),
    Entry("salt", "SALT", Training(("salt",), (TEACHER,)), Training(("salt_teacher",))),
    Entry(
        "distill", "distillation from V-JEPA 2.1", Training(("distill",), (TEACHER, "predictor.depth=2")), Training()
    ),
]


# -------------------------------------------------------------------------------------------- settings of a training


@dataclass(frozen=True)
class Comparison:
    """What all trainings share."""

    out: Path
    data: Path
    steps: int
    overrides: tuple[str, ...] = ()
    probes: EvalConfig = field(default_factory=EvalConfig)

    def common(self) -> list[str]:
        return [
            f"data.video.sources.digits.path={self.data / 'train'}",
            *("prepare.digits=none", "train.tensorboard=false", "train.checkpoint.keep=1", "report=false"),
        ]

    def config(self, training: Training, overrides: Sequence[str] = ()) -> RunConfig:
        settings = [*self.common(), *training.overrides, *self.overrides, *overrides]
        return load_config(RECIPE, STAGE, settings, options=training.options)

    @cached_property
    def budget(self) -> float:
        """Floating-point operations of the recipe itself over --steps steps."""
        return self.steps * flops_per_step(self.config(Training()))

    def arguments(self, training: Training, share: float, folder: Path, seed: int) -> list[str]:
        """The command line of a training that spends this share of the budget."""
        config = self.config(training)
        steps = max(1, round(share * self.budget / flops_per_step(config)))
        options = [f"--option={name}" for name in training.options]
        own = [f"run_dir={folder}", f"train.seed={seed}", *at_length(config, steps)]
        settings = [*self.common(), *own, *training.overrides, *self.overrides]
        return ["--recipe", RECIPE, "--stage", STAGE, *options, *settings]


def flops_per_step(config: RunConfig) -> float:
    """The objective's own count, the mean over the masks that the planner samples."""
    planner = Planner(config)
    objective = build_objective(config.objective, config.model, config.predictor, seed=0, device="meta")
    with torch.device("meta"):
        return sum(
            size * statistics.fmean(objective.flops(fake_micro_batch({m: clip}, planner.encoder)) for clip in clips)
            for (m, clips), size in zip(planner.clips.items(), planner.batch.values(), strict=True)
        )


def filled(training: Training, before: Path) -> Training:
    return Training(training.options, tuple(text.replace("{before}", str(before)) for text in training.overrides))


# ------------------------------------------------------------------------------------------------------- one training


class TrainingFailed(RuntimeError):
    """A training ended with an error or a signal; the message names its log."""


def run_entry(comparison: Comparison, entry: Entry, seed: int, trainings: Trainings) -> None:
    """Train an entry with one seed and write result.json, unless it is there."""
    folder = comparison.out / entry.name / f"seed{seed}"
    if (folder / "result.json").is_file():
        return
    runs = [folder / "run"]
    stages = [(entry.training, 1.0)]
    if entry.before is not None:
        runs = [folder / "before", folder / "run"]
        stages = [(entry.before, entry.share_before), (filled(entry.training, runs[0]), 1 - entry.share_before)]
    for (part, share), run in zip(stages, runs, strict=True):
        _train(comparison, part, share, run, seed, trainings)
    result = measure(comparison, stages[-1][0], runs, seed)
    write_text(folder / "result.json", json.dumps(result, indent=2) + "\n")
    print(
        f"{entry.name}, seed {seed}: {result['seconds']:.0f} s, {result['steps']} steps, {result['health']}", flush=True
    )


def _train(comparison: Comparison, part: Training, share: float, run: Path, seed: int, trainings: Trainings) -> None:
    if (run / "summary.json").is_file():
        return
    command = training(*comparison.arguments(part, share, run, seed))
    command += ["--resume"] if (run / "config.yaml").exists() else []
    run.mkdir(parents=True, exist_ok=True)
    with (run / "log.txt").open("a") as log:
        if status := trainings.run(command, log=log):
            raise TrainingFailed(f"{run} ended with status {status}: see {run / 'log.txt'}")


def measure(comparison: Comparison, part: Training, runs: Sequence[Path], seed: int) -> dict[str, Any]:
    """What the table shows of one training; of two stages, operations, steps and seconds together."""
    finished = [read_run(run) for run in runs]
    last = finished[-1]
    alarms = standing_alarms(last)
    spent = [
        sum(row["tflops_per_second"] * row["step_seconds"] for row in run.rows) / len(run.rows) for run in finished
    ]
    steps = [run.config.train.steps for run in finished]
    objective = build_objective(last.config.objective, last.config.model, last.config.predictor, seed=0, device="meta")
    encoder = from_pretrained(last.export)
    return {
        "health": "not judged" if alarms is None else f"{len(alarms)} alarms" if alarms else "healthy",
        "alarms": alarms,
        "copies": 1 + (objective.target_encoder is not None) + (objective.average is not None),
        "parameters": sum(parameter.numel() for parameter in objective.parameters()),
        "terms": list(objective.terms),
        "steps": " + ".join(map(str, steps)),
        "tflop": sum(mean * count for mean, count in zip(spent, steps, strict=True)),
        "seconds": sum(run.summary["stages"][STAGE]["seconds"] for run in finished),
        "seed": seed,
        **describe_features(EncoderFeatures(TRAINED, encoder), encoder, comparison),
    }


def describe_features(source: FeatureSource, encoder: Encoder, comparison: Comparison) -> dict[str, Any]:
    """Scores, mean cosine and RankMe of features; truths lie on the grid of the encoder's tokens."""
    grid = {"patch_size": encoder.patch_size, "tubelet_size": encoder.tubelet_size}
    train, test = read_splits(MOTION, comparison.data, **grid)
    scores = task_scores(run_suite(MOTION, [source], train, test, comparison.probes, stage=STAGE))
    rows = token_rows(source, test)
    return {
        "scores": {task: round(scores[task], 4) for task in TASKS},
        "mean_cosine": round(mean_cosine(rows).item(), 4),
        "rankme": round(rankme(rows).item(), 2),
        "dim": rows.shape[1],
    }


def token_rows(source: FeatureSource, clips: LabelledClips) -> torch.Tensor:
    """Token features [at most ROWS, D], evenly from all clips."""
    tokens = read_features(source, clips, ["tokens"]).features["tokens"].flatten(0, 3)
    return tokens[torch.linspace(0, len(tokens) - 1, min(ROWS, len(tokens))).long()]


def reference(comparison: Comparison, name: str, seed: int) -> None:
    """Write result.json of an encoder that was not trained, or of pixels."""
    path = comparison.out / name / f"seed{seed}" / "result.json"
    if path.is_file():
        return
    config = comparison.config(Training())
    encoder, _ = build_models(config.model, config.predictor, seed=seed)
    pixels = PixelFeatures(encoder.patch_size, encoder.tubelet_size)
    source = pixels if name == RGB else EncoderFeatures(UNTRAINED, encoder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(describe_features(source, encoder, comparison) | {"seed": seed}, indent=2) + "\n")


# ----------------------------------------------------------------------------------------------------------- the table


def table(results: Mapping[str, Sequence[Mapping[str, Any]]], says: Mapping[str, str]) -> str:
    """Markdown: mean ± sample standard deviation over training seeds; health is counted."""
    names = ["n", "health", "cosine", "RankMe", *TASKS.values(), "encoders", "parameters", "terms", "steps", "seconds"]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, found in results.items():
        if found:
            lines.append(f"| {says.get(name, name)} | {' | '.join(_cells(found))} |")
    return "\n".join(lines)


def _cells(found: Sequence[Mapping[str, Any]]) -> list[str]:
    first = found[0]
    measured = [_spread([one["mean_cosine"] for one in found], 2), _spread([one["rankme"] for one in found], 1)]
    measured[-1] += f" of {first['dim']}"
    scores = [_spread([one["scores"][task] for one in found], 3) for task in TASKS]
    if "health" not in first:
        return [str(len(found)), "", *measured, *scores, *[""] * 5]
    seconds = f"{statistics.fmean(one['seconds'] for one in found):.0f}"
    sizes = [str(first["copies"]), f"{first['parameters']:,}", ", ".join(first["terms"]), first["steps"], seconds]
    return [str(len(found)), health(found), *measured, *scores, *sizes]


def health(found: Sequence[Mapping[str, Any]]) -> str:
    """How many of the trainings ended without a standing alarm."""
    judged = [one for one in found if one["alarms"] is not None]
    well = sum(not one["alarms"] for one in judged)
    return f"{well} of {len(judged)} healthy" if judged else "not judged"


def _spread(values: Sequence[float], digits: int) -> str:
    numbers = [statistics.fmean(values), *([statistics.stdev(values)] if len(values) > 1 else [])]
    return " ± ".join(f"{number:.{digits}f}".removeprefix("0") for number in numbers)


def read_results(out: Path, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    return {name: [json.loads(p.read_text()) for p in sorted((out / name).glob("seed*/result.json"))] for name in names}


def compare(comparison: Comparison, entries: Sequence[Entry], *, seeds: int, jobs: int) -> str:
    """Run what is not done and return the table; failed trainings are named after all others have ended.

    Raises TrainingFailed after a signal.
    """
    torch.set_num_threads(1)
    for seed in range(seeds):
        reference(comparison, UNTRAINED, seed)
    reference(comparison, RGB, 0)
    failed = []
    with Trainings() as trainings, ThreadPoolExecutor(jobs) as pool:
        order = [(entry, seed) for seed in range(seeds) for entry in entries]
        pending = [pool.submit(run_entry, comparison, entry, seed, trainings) for entry, seed in order]
        for future in pending:
            try:
                future.result()
            except (TrainingFailed, ValueError) as error:
                failed.append(str(error))
        if trainings.stopped_by is not None:
            raise TrainingFailed("stopped: the same command continues")
    results = read_results(comparison.out, [RGB, UNTRAINED, *(entry.name for entry in entries)])
    write_text(comparison.out / "table.json", json.dumps({"steps": comparison.steps, "results": results}, indent=2))
    says = {entry.name: entry.says for entry in entries} | {RGB: "pixels + position"}
    return "\n".join([table(results, says), *(f"FAILED: {text}" for text in failed)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for data, runs and results")
    parser.add_argument("--steps", type=int, default=2500, help="of the recipe itself: the budget")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at a time")
    parser.add_argument("--only", nargs="*", choices=[entry.name for entry in ENTRIES], help="default: all")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all trainings")
    options = parser.parse_intermixed_args()
    begin = time.monotonic()
    out = options.out.resolve()
    data = make_digits(out / "digits", DigitsConfig(probe_seed=DEVELOPMENT))
    comparison = Comparison(out, data, options.steps, tuple(options.overrides))
    entries = [entry for entry in ENTRIES if not options.only or entry.name in options.only]
    try:
        print(compare(comparison, entries, seeds=options.seeds, jobs=options.jobs))
    except TrainingFailed as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
