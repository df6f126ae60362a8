"""Evaluate frozen models by name, each beside its untrained self and the pixels: one command, one table.

    python -m evals.run --model PATH [--model NAME=PATH ...] --suite dense|global|all|NAME[,NAME] data.root=DIR
    torchrun --nproc-per-node 8 -m evals.run --model PATH --suite dense data.root=DIR
    python -m evals.run --model runs/demo/primary/exports/primary --suite motion --data DIR --out runs/demo

DIR of the first form holds the sets, a folder each. That of the second holds a shard folder for each split of the
suite: for `motion`, DIR/probe_train and DIR/test.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from evals.comparison import compare, print_comparison
from evals.labelled_suite import default_sources, read_pretraining, read_splits, run_suite
from evals.models import load_models
from evals.protocol import EvalConfig
from evals.registry import GROUPS, LOADERS, find
from evals.report import write_report
from evals.results import print_table, save
from evals.suites import SUITES
from vjepa.hub import from_pretrained
from vjepa.nn.init import WEIGHT_STD
from vjepa.train.distributed import World, init_world, leave_process

OUT, STAGE = Path("runs/evals"), "frozen"
NO_MEMORY = (
    "the GPU's memory is full: set a smaller score_batch (attentive), batch_clips (pooled) or batch size of the fit, "
    "fewer heads in its grid, or share it with torchrun; the same command goes on behind what was finished"
)
PATIENCE = timedelta(hours=12)  # shares of ranks differ, and the main rank alone does what is not shared


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evals.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        help="folder of an exported encoder, a released .pt, hf:FOLDER of transformers, py:FILE.py:FUNCTION of your "
        "own or untrained:SIZE, perhaps as NAME=...; may be repeated",
    )
    known = f"{', '.join(GROUPS)}, or names with commas between: {', '.join(LOADERS)}"
    parser.add_argument("--suite", required=True, help=f"which questions: {known}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="data.root=DIR, NAME.key=value of a recipe")
    parser.add_argument("--out", type=Path, help=f"folder that keeps the results (default: {OUT}; with --data: none)")
    parser.add_argument("--stage", help=f"name of the stage in the results (default: {STAGE}; with --data: as trained)")
    parser.add_argument("--skip-missing", action="store_true", help="run the others where sets are not there")
    parser.add_argument("--again", action="store_true", help="measure again what the results hold already")
    parser.add_argument("--report", action="store_true", help="write OUT/report.html: the table and pictures")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if any"
    )
    shards = parser.add_argument_group("one suite on labelled shards")
    shards.add_argument("--data", type=Path, help="the suite's labelled set: a shard folder per split")
    shards.add_argument("--seeds", type=int, default=3, help="times every probe is fitted (default: 3)")
    shards.add_argument(
        "--untrained-seed", type=int, help="initialisation of the untrained encoder (default: as trained, else 0)"
    )
    return parser


def run_shards(options: argparse.Namespace) -> None:
    """One model by one suite on its labelled shards, the hand-made reference of frame differences beside it."""
    if options.suite not in SUITES or len(options.model) > 1 or options.overrides:
        raise ValueError(
            f"--data goes with one of the suites {', '.join(SUITES)}, one --model and no key=value; sets of "
            "recipes are given as data.root=DIR"
        )
    begin, model = time.monotonic(), Path(options.model[0])
    suite, pretraining = SUITES[options.suite], read_pretraining(model)
    stage = options.stage or pretraining.get("stage") or model.stem
    seed = pretraining.get("seed", 0) if options.untrained_seed is None else options.untrained_seed
    encoder = from_pretrained(model, device=options.device)
    train, test = read_splits(suite, options.data, patch_size=encoder.patch_size, tubelet_size=encoder.tubelet_size)
    config = EvalConfig(seeds=tuple(range(options.seeds)))
    init_std = pretraining.get("init_std", WEIGHT_STD)
    sources = default_sources(encoder, seed=seed, init_std=init_std)
    trained_with = pretraining.get("seed")
    rows = run_suite(suite, sources, train, test, config, stage=stage, training_seed=trained_with)
    if options.out:
        save(options.out, rows)
    title = f"{suite.name}: probes on {len(train)} clips, {len(test)} test clips, {time.monotonic() - begin:.0f} s"
    print_table(rows, title=title)


def run_recipes(options: argparse.Namespace, world: World) -> None:
    """All models by all evaluations that were asked for, shared by the ranks; the main one prints and writes."""
    begin, out = time.monotonic(), options.out or OUT
    evaluations = find(options.suite, options.overrides)
    if world.is_main:  # said now where it cannot be, not when there is something to keep
        out.mkdir(parents=True, exist_ok=True)
    models = load_models(options.model, device=world.device)
    found = compare(
        evaluations,
        models,
        out,
        stage=options.stage or STAGE,
        world=world,
        skip_missing=options.skip_missing,
        again=options.again,
        say=lambda line: print(line, file=sys.stderr, flush=True) if world.is_main else None,
    )
    if not world.is_main:
        return
    title = f"{options.suite}: {len(models)} models, {time.monotonic() - begin:.0f} s; rows in {out}"
    print_comparison(found, title=title)
    if options.report:
        print(f"wrote {write_report(found, out, title=title)}")


@contextmanager
def log_shown(*, is_main: bool) -> Iterator[None]:
    """Lines of our log on standard error: how far long loops have come, from the main rank; warnings from all."""
    logger, handler = logging.getLogger("evals"), logging.StreamHandler()
    before = logger.level
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.setLevel(logging.INFO if is_main else logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def device_of(name: str) -> str:
    """The device of this name, `auto` being a GPU if any. ValueError where there is none."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ValueError(f"--device {name}: write cpu, cuda or cuda:NUMBER") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no CUDA device: use --device cpu")
    return name


def is_of_another_rank(error: RuntimeError) -> bool:
    """Whether this rank stopped because another did, which says why itself: a collective found nobody there."""
    return isinstance(error, dist.DistError) or "main rank stopped" in str(error) or "gloo" in str(error)


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_intermixed_args(arguments)
    num_ranks, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    try:
        options.device = device_of(options.device)
        if options.data is None:
            with init_world(options.device, PATIENCE) as world, log_shown(is_main=world.is_main):
                run_recipes(options, world)
        elif num_ranks > 1:
            raise ValueError("--data runs in one process, without torchrun")
        else:
            run_shards(options)
    except (ValueError, OSError) as error:
        print(f"error: {f'rank {rank}: ' if num_ranks > 1 else ''}{error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"error: {f'rank {rank}: ' if num_ranks > 1 else ''}{NO_MEMORY} ({error})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on behind the last evaluation that was finished", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if num_ranks == 1 or not is_of_another_rank(error):
            raise
        print(f"error: rank {rank}: another rank ended ({str(error).splitlines()[0]})", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    leave_process(main())
