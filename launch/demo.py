"""`make demo`: data, the stages of the demo's chain, their evaluations, report; with --seeds N, N chains in one table.

    python -m launch.demo [--seeds N] [--run-dir runs/demo] [--jobs N] [key=value | STAGE.key=value ...]

The first chain lies in RUN_DIR, the others beside it as RUN_DIR-seed1, RUN_DIR-seed2, ... What lay there before is
moved aside, never removed. Nothing here that the commands it runs cannot do one by one.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launch.chain import ChainRequest, plan_chain
from launch.evaluate import evaluate
from launch.prepare import prepare_data
from launch.processes import Trainings, training
from launch.report import build_reports
from vjepa.config import ConfigError

RECIPE = "demo"
STAGES = ("primary", "cooldown", "distill")


def run_demo(run_dir: Path, *, seeds: int, jobs: int, overrides: Sequence[str] = ()) -> int:
    """All of it; 0, or the exit status of the first chain that failed or was stopped."""
    begin = time.monotonic()
    for field in ("run_dir", "train.seed", "report"):
        if any(override.startswith(f"{field}=") for override in overrides):
            raise ConfigError(f"the demo sets {field} itself: use --run-dir and --seeds")
    runs = [run_dir if seed == 0 else run_dir.with_name(f"{run_dir.name}-seed{seed}") for seed in range(seeds)]
    request = ChainRequest(RECIPE, STAGES, overrides=(*overrides, f"run_dir={run_dir}/new"))
    planned = plan_chain(request, resume=False)  # refused before anything is moved
    for run in runs:
        _move_aside(run)
    for config in planned.configs.values():
        prepare_data(config)  # once for all seeds
    took = {"data": time.monotonic() - begin}
    if status := _train(runs, jobs, overrides):
        return status
    took["training"] = time.monotonic() - begin - sum(took.values())
    evaluate(runs, jobs=jobs)
    took["evaluations"] = time.monotonic() - begin - sum(took.values())
    print(f"report: {build_reports(run_dir)}")
    took["report"] = time.monotonic() - begin - sum(took.values())
    parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in took.items())
    print(f"demo: {time.monotonic() - begin:.0f} s in all ({parts})")
    return 0


def _move_aside(run: Path) -> None:
    if run.exists():
        old = run.with_name(f"{run.name}-before-{time.strftime('%Y%m%d-%H%M%S')}")
        run.rename(old)
        print(f"demo: moved the earlier {run} to {old}", flush=True)


def _train(runs: Sequence[Path], jobs: int, overrides: Sequence[str]) -> int:
    """One process for each chain, `jobs` at a time; a failure or a signal ends those that run and starts no more."""

    def train(seed: int) -> int:
        settings = [f"run_dir={runs[seed]}", f"train.seed={seed}", "report=false", *overrides]
        command = training("--recipe", RECIPE, "--stage", ",".join(STAGES), *settings)
        status = trainings.run(command, prefix=f"seed {seed} | " if len(runs) > 1 else "")
        if status:
            trainings.stop(signal.SIGTERM)
        return status

    with Trainings() as trainings, ThreadPoolExecutor(jobs) as pool:
        return next((status for status in pool.map(train, range(len(runs))) if status), 0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="chains, with seeds 0, 1, ... (default: 1)")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time (default: cores)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.steps=100")
    options = parser.parse_args(arguments)
    if min(options.seeds, options.jobs) < 1:
        parser.error("--seeds and --jobs must be at least 1")
    try:
        return run_demo(options.run_dir, seeds=options.seeds, jobs=options.jobs, overrides=options.overrides)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
