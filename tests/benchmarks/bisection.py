"""Does a bisection of SIGReg's weight end where a grid says that it should? Acceptance on the demo's data.

    python -m tests.benchmarks.bisection --out runs/bisection [--steps 600] [--low 1e-3 --high 1e3] [key=value ...]

Two sweeps of `--recipe demo --option sigreg` over the same range: a grid of 12, then a bisection of at most 6. A value
of the grid is good where its run is healthy and its score (the mean of the suite's nine probes) within MARGIN of the
best healthy one's; the good range is what lies between good neighbours around that best. Stopped, it continues.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KEY = "objective.terms.sigreg.weight"
MARGIN = 0.02
SUBMIT = Path(__file__).resolve().parents[2] / "launch" / "submit.py"


def sweep(folder: Path, method: str, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Run one sweep, or what is left of it; its runs in the order they were decided on."""
    command = [sys.executable, str(SUBMIT), "--recipe", "demo", "--option", "sigreg", "--sweep", KEY, "--resume"]
    subprocess.run([*command, "--method", method, f"run_dir={folder}", *arguments], check=True)
    return list(json.loads((folder / "sweep.json").read_text())["runs"].values())


def weight(run: dict[str, Any]) -> float:
    return float(run["values"][KEY])


def is_healthy(run: dict[str, Any]) -> bool:
    return run["status"] == "finished" and run["alarms"] == []


def good_range(grid: Sequence[dict[str, Any]], margin: float = MARGIN) -> tuple[float, float]:
    """From the lowest to the highest of the good neighbours around the grid's best healthy run."""
    ordered = sorted(grid, key=weight)
    best = max((run for run in ordered if is_healthy(run)), key=lambda run: run["score"])
    is_good = [is_healthy(run) and run["score"] >= best["score"] - margin for run in ordered]
    start = place = ordered.index(best)
    while start > 0 and is_good[start - 1]:
        start -= 1
    while place + 1 < len(ordered) and is_good[place + 1]:
        place += 1
    return weight(ordered[start]), weight(ordered[place])


def table(grid: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]], good: tuple[float, float]) -> str:
    """Markdown: all runs by weight; a bisection's with their place in its path."""
    rows = [(run, "grid") for run in grid]
    rows += [(run, f"bisection {place}: {run['decision']}") for place, run in enumerate(found, 1)]
    lines = ["| weight | run | alarms | score | good |", "|---|---|---|---|---|"]
    for run, name in sorted(rows, key=lambda row: weight(row[0])):
        inside = "yes" if good[0] <= weight(run) <= good[1] else ""
        alarms = "failed" if run["alarms"] is None else len(run["alarms"])
        score = "" if run["score"] is None else f"{run['score']:.4f}"
        lines.append(f"| {weight(run):g} | {name} | {alarms} | {score} | {inside} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", default="600")
    parser.add_argument("--low", default="1e-3")
    parser.add_argument("--high", default="1e3")
    parser.add_argument("--jobs", default="1", help="of the grid")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    begin = time.monotonic()
    shared = ["--range", options.low, options.high, "--steps", options.steps, *options.overrides]
    grid = sweep(options.out / "grid", "grid", ["--runs", "12", "--jobs", options.jobs, *shared])
    found = sweep(options.out / "bisection", "bisect", ["--runs", "6", *shared])
    good = good_range(grid)
    print(f"\n{table(grid, found, good)}\n")
    chosen = max((run for run in found if is_healthy(run)), key=lambda run: run["score"])
    first = next(place for place, run in enumerate(found, 1) if good[0] <= weight(run) <= good[1])
    is_inside = good[0] <= weight(chosen) <= good[1]
    seconds = [run["seconds"] for run in itertools.chain(grid, found)]
    print(f"good range of the grid: {good[0]:g} to {good[1]:g} (margin {MARGIN})")
    print(f"bisection: {len(found)} runs, chose {weight(chosen):g}, {'inside' if is_inside else 'OUTSIDE'} the range")
    print(f"its first value inside: run {first}; seconds of training a run {min(seconds):.0f} to {max(seconds):.0f}")
    print(f"{time.monotonic() - begin:.0f} s in all")
    raise SystemExit(0 if is_inside and len(found) <= 6 else 1)


if __name__ == "__main__":
    main()
