"""What each part of the demo's recipe is worth: every variant at full length, with three training seeds.

    python -m tests.benchmarks.ablations --out runs/ablations [--seeds 3] [--jobs 2] [--only NAME ...] [key=value ...]

Variants are the demo recipe with one thing changed. They are scored on probe clips of their own (DEVELOPMENT), so that
the set that `make demo` reports stays unseen while parts are chosen. A training that is done is not done again: the
command continues where it was stopped. The table is printed as Markdown for evals/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.prepare.digits import DigitsConfig, make_digits
from evals.features import EncoderFeatures, PixelFeatures
from evals.labelled_suite import read_splits, score_source
from evals.protocol import EvalConfig
from evals.suites import MOTION
from launch.config import RunConfig, load_config
from launch.prepare import make_real_shards
from vjepa.config import build_models
from vjepa.hub import from_pretrained

ROOT = Path(__file__).resolve().parents[2]
DEVELOPMENT = 77  # probe seed of the clips that recipes are compared on
COLUMNS = {
    "motion": "motion",
    "motion_msm": "motion_msm",
    "motion_knn": "motion_knn",
    "segmentation": "segmentation",
    "segmentation_static": "static IoU",
    "direction_segmentation": "direction_seg.",
    "object_segmentation": "object_seg.",
    "class_msm": "class_msm",
}


@dataclass(frozen=True)
class Variant:
    """The demo recipe with one thing changed."""

    name: str
    says: str
    overrides: tuple[str, ...] = ()


def variants(out: Path) -> list[Variant]:
    context = "objective.terms.context_prediction"
    real = ("--option=real_clips", f"data.video.sources.real.path={out / 'real'}", "prepare.real=none")
    return [
        Variant("reference", "the demo's recipe"),
        Variant("no_context_loss", "without context loss (lambda 0)", (f"{context}.lambda_video=0",)),
        Variant("constant_lambda", "lambda .5 from the first step", (f"{context}.warmup_end=0",)),
        Variant("no_deep_supervision", "without deep supervision (last level only)", ("model.levels=[4]",)),
        Variant("no_ema", "without EMA (the target is the encoder)", ("objective.momentum=0",)),
        Variant("tubes_only", "tubes only, no future mask", ("mask.video.future=null",)),
        Variant("prefix", "prefix instead of random truncation", ("mask.truncate=prefix",)),
        Variant("no_absolute_position", "without absolute positions", ("model.absolute_position=0",)),
        Variant(
            "never_repeated",
            "no clip is seen twice",
            (f"data.video.sources.digits.path={out / 'digits_never_repeated' / 'train'}",),
        ),
        Variant("real_clips", "a quarter of the clips are real video", real),
    ]


def prepare(out: Path, config: RunConfig, wanted: Sequence[Variant]) -> None:
    """The labelled set, and the data that single variants ask for."""
    make_digits(out / "digits", DigitsConfig(probe_seed=DEVELOPMENT))
    names = {variant.name for variant in wanted}
    if "never_repeated" in names:
        clips = config.train.steps * config.train.batch.video
        sizes = DigitsConfig(train_clips=clips, probe_train_clips=40, test_clips=40, probe_seed=DEVELOPMENT)
        make_digits(out / "digits_never_repeated", sizes)
    if "real_clips" in names and not (out / "real" / "manifest.json").is_file():
        make_real_shards(out / "real")


def run(out: Path, variant: Variant, seed: int, overrides: Sequence[str]) -> None:
    """Train one variant with one seed and score its encoder, unless it has been done."""
    folder = out / variant.name / f"seed{seed}"
    scores = folder / "scores.json"
    if scores.is_file():
        return
    command = [sys.executable, "-m", "launch.train", "--recipe", "demo", f"run_dir={folder}", f"train.seed={seed}"]
    command += [f"data.video.sources.digits.path={out / 'digits' / 'train'}", "train.tensorboard=false"]
    command += ["train.checkpoint.every=1000000", "report=false", *variant.overrides, *overrides]
    if (folder / "config.yaml").exists():
        command.append("--resume")
    begin = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log:
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)
    seconds = time.monotonic() - begin
    evaluate = [sys.executable, "-m", "tests.benchmarks.ablations", "--out", str(out), "--score", str(folder)]
    subprocess.run(evaluate, cwd=ROOT, check=True)
    print(f"{variant.name}, seed {seed}: trained in {seconds:.0f} s; {scores.read_text().strip()}", flush=True)


def score(out: Path, folder: Path) -> None:
    """Write scores.json of a finished training; `untrained` and `rgb` are folders of the out directory without one."""
    config = load_config("demo", "primary")
    encoder = config.model.encoder_config()
    train, test = read_splits(MOTION, out / "digits", patch_size=encoder.patch_size, tubelet_size=encoder.tubelet_size)
    if folder.parent.name == "rgb":
        source = PixelFeatures(encoder.patch_size, encoder.tubelet_size)
    elif folder.parent.name == "untrained":
        seed = int(folder.name.removeprefix("seed"))
        source = EncoderFeatures("untrained", build_models(config.model, config.predictor, seed=seed)[0])
    else:
        source = EncoderFeatures("trained", from_pretrained(folder / "exports" / "primary"))
    found: dict[str, list[float]] = {}
    for each in score_source(MOTION, source, train, test, EvalConfig()):
        found.setdefault(each.task, []).append(each.value)
    folder.mkdir(parents=True, exist_ok=True)
    means = {task: round(statistics.fmean(found[task]), 4) for task in COLUMNS}
    (folder / "scores.json").write_text(json.dumps(means) + "\n")


def table(out: Path, wanted: Sequence[Variant]) -> str:
    """Markdown: mean ± sample standard deviation over training seeds."""
    lines = [f"| | n | {' | '.join(COLUMNS.values())} |", "|---|---|" + "---|" * len(COLUMNS)]
    for variant in wanted:
        found = [json.loads(path.read_text()) for path in sorted((out / variant.name).glob("seed*/scores.json"))]
        if found:
            cells = [_cell([scores[task] for scores in found]) for task in COLUMNS]
            lines.append(f"| {variant.says} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    digits = [f"{statistics.fmean(values):.3f}", *([f"{statistics.stdev(values):.3f}"] if len(values) > 1 else [])]
    return " ± ".join(number.removeprefix("0") for number in digits)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for data, runs and scores")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at a time")
    parser.add_argument("--only", nargs="*", help="names of variants (default: all)")
    parser.add_argument("--score", type=Path, help=argparse.SUPPRESS)  # one finished training, in its own process
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all variants")
    options = parser.parse_intermixed_args()
    out = options.out.resolve()
    if options.score:
        score(out, options.score)
        return
    wanted = [variant for variant in variants(out) if not options.only or variant.name in options.only]
    begin = time.monotonic()
    prepare(out, load_config("demo", "primary", options.overrides), wanted)
    references = [Variant("rgb", "RGB + position"), Variant("untrained", "untrained")]
    for reference, seeds in zip(references, (1, options.seeds), strict=True):
        for seed in range(seeds):
            if not (out / reference.name / f"seed{seed}" / "scores.json").is_file():
                score(out, out / reference.name / f"seed{seed}")
    with ThreadPoolExecutor(options.jobs) as pool:
        order = [(variant, seed) for seed in range(options.seeds) for variant in wanted]
        pending = [pool.submit(run, out, variant, seed, options.overrides) for variant, seed in order]
        for future in pending:
            future.result()
    print(table(out, [*references, *wanted]))
    print(f"{time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
