"""Start a run: here in the foreground, or (later) on SLURM.

python launch/submit.py --stage primary [--recipe NAME] [--cluster auto|local|slurm] [--option NAME] [--dry-run]
                        [--resume] [key=value ...]
python launch/submit.py --recipe NAME --sweep KEY[=a,b,c | =LOW..HIGH] [--method bisect|grid|random] [--range LOW HIGH]
                        [--runs N] [--steps N] [--jobs N] [--score TASK] [--resume] run_dir=DIR [key=value ...]
python launch/submit.py --recipe NAME --dry-run [--gpus N] [--card H100 | --gpu-memory GB] [--mfu 0.4]
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

# Run by path, Python puts launch/ first on sys.path: put the checkout there instead.
sys.path[0] = str(Path(__file__).resolve().parents[1])
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the seconds of imports: end, without a traceback

from launch.cluster import die_with, run_locally
from launch.config import RunConfig
from launch.plan import plan
from launch.planner import DEFAULT_CARD, DEFAULT_MFU, MEMORY_GB
from launch.report import build_report
from launch.sweep import add_sweep_arguments, read_sweep, refuse_without_sweep
from launch.sweep_runs import dry_run as dry_run_sweep
from launch.sweep_runs import run_sweep
from launch.train import add_run_arguments, load
from vjepa.config import ConfigError, config_hash, to_yaml
from vjepa.objectives import build_objective
from vjepa.train.run_dir import RunDir

DEFAULT_RECIPE = "demo"


def choose_cluster(asked: str) -> str:
    """Where to run, and one line that says why; SLURM is refused until it is built."""
    if asked == "slurm":
        raise ConfigError(
            "--cluster slurm is not built yet: run `torchrun --nproc-per-node N -m launch.train ...` inside your own "
            "sbatch script, or use --cluster local"
        )
    return "local"


def choose_recipe(asked: str | None) -> tuple[str, str]:
    """The recipe, and why it."""
    if asked is not None:
        return asked, "asked for"
    return DEFAULT_RECIPE, "the default where no cluster profile names data; another: --recipe vit_gigantic"


def describe(config: RunConfig) -> str:
    """What --dry-run prints first: the resolved configuration and the parameter counts."""
    objective = build_objective(config.objective, config.model, config.predictor, seed=0, device="meta")
    parts = {"encoder": objective.encoder, "predictor": objective.predictor, "heads": objective.heads}
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}
    lines = [f"{name}: {size:,} parameters" for name, size in sizes.items() if size]
    yaml = to_yaml(config)
    lines += [
        f"configuration {config_hash(yaml)}",
        *(f"not ready to start: {text}" for text in config.missing_sources()),
    ]
    return "\n".join([yaml.rstrip(), "", *lines])


def dry_run(config: RunConfig, arguments: argparse.Namespace) -> int:
    """Print configuration and plan; status 2 where the device shape asked for is too small."""
    print(describe(config))
    try:
        text, refusal = plan(
            config,
            gpus=arguments.gpus,
            card=arguments.card,
            gpu_memory=arguments.gpu_memory,
            mfu=arguments.mfu,
        )
    except ConfigError as error:
        text, refusal = "", error
    print(f"\n{text}" if text else "")
    if refusal is not None:
        print(f"error: {refusal}", file=sys.stderr)
    return 2 if refusal is not None else 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python launch/submit.py", description=__doc__)
    add_run_arguments(parser, recipe_required=False)
    parser.add_argument("--cluster", choices=("auto", "local", "slurm"), default="auto", help="where to run")
    parser.add_argument("--owner", type=int, metavar="PID", help="end, with the run, when this process is gone")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and the plan, and stop"
    )
    add_sweep_arguments(parser)
    shape = parser.add_argument_group("device shape, for the plan of --dry-run; what cannot fit it is refused")
    shape.add_argument("--gpus", type=int, metavar="N", help="ranks of the run, one for each GPU")
    shape.add_argument("--card", help=f"one of {', '.join(MEMORY_GB)} (default: {DEFAULT_CARD})")
    shape.add_argument("--gpu-memory", type=float, metavar="GB", help="of each GPU, as sold")
    shape.add_argument(
        "--mfu", type=float, default=DEFAULT_MFU, help="assumed share of the card's peak (default: %(default)s)"
    )
    return parser


def sweep(arguments: argparse.Namespace) -> int:
    """Several short runs in place of one."""
    asked = read_sweep(arguments)
    if arguments.dry_run:
        return dry_run_sweep(asked)
    return run_sweep(asked, jobs=arguments.jobs or 1, resume=arguments.resume)


def _open(run: RunDir, *, resume: bool) -> None:
    """Refuse here, in a moment, what the run's process would refuse after its start-up."""
    if not resume:
        run.refuse_existing()
    run.make()


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_intermixed_args(argv)
    try:
        cluster = choose_cluster(arguments.cluster)
        asked = arguments.recipe
        arguments.recipe, why = choose_recipe(asked)
        if arguments.sweep:
            if arguments.owner is not None:
                die_with(arguments.owner)
            return sweep(arguments)
        refuse_without_sweep(arguments)
        config = load(arguments, is_recipe_asked=asked is not None)
        if config.recipe != arguments.recipe and asked is None:
            why = "the run's own"
        config.check(needs_sources=not arguments.dry_run)
        if not arguments.dry_run:
            _open(RunDir(config.run_dir), resume=arguments.resume)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.owner is not None:
        die_with(arguments.owner)
    print(f"recipe {config.recipe} ({why}), stage {config.stage}, on this machine ({cluster})", flush=True)
    if arguments.dry_run:
        return dry_run(config, arguments)
    status = run_locally(config, resume=arguments.resume)
    if status == 0 and config.report:
        print(f"report: {build_report(Path(config.run_dir))}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
