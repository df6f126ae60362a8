"""One training step at the cooldown's real grid on a CPU: 64 frames at 384 px are 32 x 24 x 24 = 18,432 tokens a clip.

    python -m tests.benchmarks.cooldown_grid [--out FOLDER] [key=value ...]

The debug recipe's own chain on clips that its maker renders: a step of `primary`, then one of `cooldown` with frozen
teacher, student, predictor and both masks, each in a process of its own. Printed are the tokens, the seconds of the
step, those of the whole process on clock and processor, and the most memory that it ever held. Overrides are those of
the cooldown. model.attention=matmul would hold every square of 18,432 scores; sdpa, which is taken in fp32, holds none.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from launch.config import load_config
from vjepa.config import build_models

ONE_STEP = ("train.steps=1", "data.workers=0")
GRID = (
    "data.video.clip={frames: 64, fps: 4.0, size: 384}",
    "data.image.clip.size=512",
    "train.batch={video: 1, image: 1}",
    "mask.group={video: 1, image: 1}",
)
GIB = 2**20  # in kilobytes, which wait4 counts on Linux


@dataclass(frozen=True)
class Measured:
    """A stage of one step, a process of its own."""

    row: dict[str, float]  # of metrics.jsonl
    seconds: float
    processor_seconds: float
    peak_gib: float  # resident


def run(stage: str, folder: Path, *overrides: str) -> Measured:
    """Train a stage of the debug recipe for one step."""
    command = [sys.executable, "-m", "launch.train", "--recipe", "debug", "--stage", stage, f"run_dir={folder / stage}"]
    begin = time.perf_counter()
    process = subprocess.Popen([*command, *ONE_STEP, *overrides], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"error: {stage} ended with status {process.returncode}")
    rows = (folder / stage / "metrics.jsonl").read_text().splitlines()
    return Measured(json.loads(rows[-1]), seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / GIB)


def count_tokens(overrides: list[str]) -> tuple[int, int]:
    """Of a video clip and of an image, as the tokenizers cut them."""
    config = load_config("debug", "cooldown", ["run_dir=unused", "objective.target=ema", *GRID, *overrides])
    encoder = build_models(config.model, config.predictor, seed=0, device="meta")[0]
    clips = (config.data.video.clip, config.data.image.clip)
    shapes = [(1, 3, clip.frames, clip.size, clip.size) for clip in clips]
    counts = [encoder.tokenizer(torch.empty(shape, device="meta")).shape[1] for shape in shapes]
    return counts[0], counts[1]


def measure(folder: Path, overrides: list[str]) -> str:
    """The figures, in words."""
    video, image = count_tokens(overrides)
    run("primary", folder)
    weights = folder / "primary" / "exports" / "primary"
    start = (f"objective.teacher.path={weights}", f"init_from={weights}")
    sources = [f"data.{kind}.sources.debug.path={folder / 'primary' / 'data'}" for kind in ("video", "image")]
    found = run("cooldown", folder, *GRID, *start, *sources, *overrides)
    return (
        f"{video:,} tokens of a video clip, {image:,} of an image: loss {found.row['loss']:.4f}, step "
        f"{found.row['step_seconds']:.1f} s; process {found.seconds:.1f} s, {found.processor_seconds:.1f} s of "
        f"processor, peak resident memory {found.peak_gib:.2f} GiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the two runs (default: one that is removed)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the cooldown")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        print(measure(options.out or Path(folder), options.overrides))


if __name__ == "__main__":
    main()
