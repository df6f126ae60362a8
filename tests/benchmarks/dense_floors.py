"""What dense evaluations give without learning: floors of CamVid and of a folder of RGB-D, and an untrained encoder.

    python -m tests.benchmarks.dense_floors [--data DIR] [--only camvid rgbd] [--model vit_small] [--cache DIR]

Exits with status 1 where a floor is further from the reference (evaluation.md 5.1) than it may be: 1.5 points of mIoU,
.02 m of RMSE. evals/README.md quotes the table.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import vjepa
from evals import floors
from evals.dense_config import load_depth, load_segmentation
from evals.dense_features import LevelFeatures, RgbPosition
from evals.protocol import UNTRAINED, Score
from evals.references import RgbPatches
from evals.tasks import linear_depth, linear_segmentation

DATA = Path(__file__).parents[3] / "shared" / "data"
POINTS, METRES = 0.015, 0.02
SHOWN = ("mIoU", "accuracy", "RMSE", "AbsRel", "delta1")


@dataclass(frozen=True)
class Entry:
    """One row: how it is measured, and what the reference has, if anything."""

    name: str
    measure: Callable[[], list[Score]]
    reference: float | None = None
    tolerance: float | None = None
    """How far from it the headline may be; None: it is shown only."""


def camvid(root: Path, model: str, overrides: Sequence[str]) -> Iterator[Entry]:
    config = load_segmentation("camvid", [f"data.root={root}", *overrides])
    splits = linear_segmentation.open_splits(config)

    def floor() -> list[Score]:
        return floors.location_prior(*splits, config)

    yield Entry("location prior", floor, 0.170, POINTS)
    yield Entry("RGB", lambda: linear_segmentation.evaluate(RgbPatches(cells=8), config, splits=splits), 0.122)
    yield Entry(
        "RGB + position", lambda: linear_segmentation.evaluate(RgbPosition(), config, splits=splits), 0.203, POINTS
    )
    yield Entry(f"untrained {model}", lambda: linear_segmentation.evaluate(_untrained(model), config, splits=splits))


def rgbd(root: Path, model: str, overrides: Sequence[str]) -> Iterator[Entry]:
    config = load_depth("rgbd", [f"data.root={root}", *overrides])
    splits = linear_depth.open_splits(config)
    yield Entry("constant", lambda: floors.constant_depth(*splits, config), 0.709, METRES)
    yield Entry("location mean", lambda: floors.location_mean(*splits, config), 0.525, METRES)
    yield Entry("RGB", lambda: linear_depth.evaluate(RgbPatches(cells=8), config, splits=splits), 0.656)
    yield Entry("RGB + position", lambda: linear_depth.evaluate(RgbPosition(), config, splits=splits), 0.574, METRES)
    yield Entry(f"untrained {model}", lambda: linear_depth.evaluate(_untrained(model), config, splits=splits))


SETS = {"camvid": (camvid, "camvid"), "rgbd": (rgbd, "rgbd_7scenes")}


def _untrained(model: str) -> LevelFeatures:
    return LevelFeatures(UNTRAINED, vjepa.create_model(model).eval())


def measure(entry: Entry) -> bool:
    """Print a row; False where it is too far from the reference."""
    begin = time.monotonic()
    scores = {score.metric: score.value for score in entry.measure()}
    headline = next(iter(scores.values()))
    numbers = "  ".join(f"{name} {scores[name]:.3f}" for name in SHOWN if name in scores)
    beside = "" if entry.reference is None else f"  (reference {entry.reference:.3f})"
    is_near = entry.reference is None or entry.tolerance is None or abs(headline - entry.reference) <= entry.tolerance
    verdict = "" if is_near else "  TOO FAR"
    print(f"  {entry.name:24}{numbers}{beside}{verdict}  {time.monotonic() - begin:.0f} s", flush=True)
    return is_near


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.dense_floors", description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=DATA, help=f"folder with camvid/ and rgbd_7scenes/ (default: {DATA})"
    )
    parser.add_argument("--only", nargs="+", choices=sorted(SETS), default=sorted(SETS))
    parser.add_argument("--model", choices=vjepa.list_models(), default="vit_small", help="of the untrained encoder")
    parser.add_argument("--cache", type=Path, help="folder for features (default: computed each time)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings in place of the recipes'")
    options = parser.parse_args(arguments)
    overrides = [*([f"cache.folder={options.cache}"] if options.cache else []), *options.overrides]
    is_near = True
    for name in options.only:
        entries, folder = SETS[name]
        root = options.data / folder
        if not root.is_dir():
            print(f"{name}: {root} is not there, skipped")
            continue
        print(f"{name}, {root}", flush=True)
        for entry in entries(root, options.model, overrides):
            is_near &= measure(entry)
    return 0 if is_near else 1


if __name__ == "__main__":
    sys.exit(main())
