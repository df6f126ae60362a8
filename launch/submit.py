"""Start a run: here in the foreground, or on SLURM.

python launch/submit.py --stage primary [--recipe NAME] [--cluster auto|local|slurm] [--option NAME] [--dry-run]
                        [--resume] [key=value ...]
python launch/submit.py --stage primary --cluster slurm [--profile NAME|FILE] [--nodes N] [--time MIN] ... [--dry-run]
                        [--resume] [key=value ...]
python launch/submit.py --stage primary,cooldown,evals [--eval-every N] ... [key=value | STAGE.key=value ...]
python launch/submit.py status|logs|cancel|resume RUN
python launch/submit.py prepare TOOL --slices N [--jobs N] [--profile NAME|FILE] ... -- ARGUMENTS OF THE TOOL
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

LOOKING = ("status", "logs", "cancel", "resume")
if __name__ == "__main__" and sys.argv[1:2] and sys.argv[1] in LOOKING:  # before torch is imported: in a moment
    from launch.watch import main as watch

    raise SystemExit(watch(sys.argv[1:]))

from launch import slurm_chain
from launch.chain import ChainRequest, is_chain, plan_chain, read_stages, run_chain_locally
from launch.cluster import die_with, run_locally
from launch.cluster_profile import add_profile_arguments, data_overrides, describe_profile
from launch.config import RunConfig
from launch.destination import Site, choose_recipe, choose_site
from launch.job_array import dry_run_sweep, submit_sweep
from launch.plan import plan
from launch.planned_job import dry_run as dry_run_slurm
from launch.planner import DEFAULT_CARD, DEFAULT_MFU, MEMORY_GB
from launch.prepare_slices import prepare
from launch.report_single import build_report
from launch.scheduler import SchedulerError
from launch.slurm_submit import ask_scheduler, refuse_queued, submit_stage
from launch.sweep import add_sweep_arguments, read_sweep, refuse_without_sweep
from launch.sweep_runs import dry_run as describe_sweep
from launch.sweep_runs import run_sweep
from launch.train import add_run_arguments, load
from vjepa.config import ConfigError, config_hash, to_yaml
from vjepa.objectives import build_objective
from vjepa.train.run_dir import RunDir, write_text


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


def dry_run(config: RunConfig, arguments: argparse.Namespace, site: Site) -> int:
    """Print configuration, plan and job script; status 2 where the devices are too small or SLURM cannot start it."""
    print(describe(config))
    gpus = site.profile.gpus_per_node * site.profile.nodes if site.is_slurm else 0
    try:
        text, refusal = plan(
            config,
            gpus=arguments.gpus or gpus or None,
            card=arguments.card,
            gpu_memory=arguments.gpu_memory,
            mfu=arguments.mfu,
        )
    except ConfigError as error:
        text, refusal = "", error
    print(f"\n{text}" if text else "")
    if refusal is not None:
        print(f"error: {refusal}", file=sys.stderr)
    status = dry_run_slurm(config, site.profile, site.profile_name) if site.is_slurm else 0
    return 2 if refusal is not None else status


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python launch/submit.py", description=__doc__)
    add_run_arguments(parser, recipe_required=False)
    parser.add_argument("--cluster", choices=("auto", "local", "slurm"), default="auto", help="where to run")
    parser.add_argument("--owner", type=int, metavar="PID", help="end, with the run, when this process is gone")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and the plan, and stop"
    )
    parser.add_argument(
        "--eval-every", type=int, metavar="N", help="on SLURM: evaluate checkpoints every N steps, as jobs of their own"
    )
    add_profile_arguments(parser)
    add_sweep_arguments(parser)
    shape = parser.add_argument_group("device shape, for the plan of --dry-run; what cannot fit it is refused")
    shape.add_argument("--gpus", type=int, metavar="N", help="ranks of the run, one for each GPU")
    shape.add_argument("--card", help=f"one of {', '.join(MEMORY_GB)} (default: {DEFAULT_CARD})")
    shape.add_argument("--gpu-memory", type=float, metavar="GB", help="of each GPU, as sold")
    shape.add_argument(
        "--mfu", type=float, default=DEFAULT_MFU, help="assumed share of the card's peak (default: %(default)s)"
    )
    return parser


def sweep(arguments: argparse.Namespace, site: Site) -> int:
    """Several short runs in place of one."""
    asked = read_sweep(arguments)
    how = {"jobs": arguments.jobs or 1, "resume": arguments.resume}
    if arguments.dry_run:
        describe_sweep(asked)
        return dry_run_sweep(asked, site.profile, site.profile_name, **how) if site.is_slurm else 0
    if site.is_slurm:
        print("\n".join(submit_sweep(asked, site.profile, site.profile_name, **how)))
        return 0
    return run_sweep(asked, **how)


def load_for(site: Site, arguments: argparse.Namespace, *, is_recipe_asked: bool) -> RunConfig:
    """The configuration, with the cluster's data where the recipe has none, checked for the ranks it will have."""
    config = load(arguments, is_recipe_asked=is_recipe_asked)
    if site.is_slurm:
        additions = data_overrides(site.profile, config.missing_modalities())
        if not Path(config.run_dir).is_absolute():  # a job's folder must not depend on where it is started from
            additions.append(f"run_dir={Path(config.run_dir).resolve()}")
        arguments.overrides += additions
        config = load(arguments, is_recipe_asked=is_recipe_asked)
    config.check(site.world, needs_sources=not arguments.dry_run)
    return config


def _open(run: RunDir, *, resume: bool) -> None:
    """Refuse here, in a moment, what the run's process would refuse after its start-up."""
    if not resume:
        run.refuse_existing()
    run.make()


def chain(arguments: argparse.Namespace, site: Site) -> int:
    """Several stages: here one after another, on SLURM as dependent jobs."""
    if arguments.eval_every is not None and not site.is_slurm:
        raise ConfigError("--eval-every is for --cluster slurm; here `evals` evaluates the checkpoints that were kept")
    if arguments.gpus or arguments.card or arguments.gpu_memory:
        raise ConfigError("--gpus, --card and --gpu-memory plan one training: give --stage one stage")
    request = ChainRequest(
        recipe=arguments.recipe,
        stages=read_stages(arguments.stage),
        options=tuple(arguments.option),
        overrides=tuple(arguments.overrides),
        eval_every=arguments.eval_every,
    )
    planned = plan_chain(
        request,
        resume=arguments.resume,
        **({"world": lambda config: site.world} if site.is_slurm else {}),
        more=lambda config: data_overrides(site.profile, config.missing_modalities()),
        needs_sources=not arguments.dry_run,
        is_absolute=site.is_slurm,
    )
    place = f"on SLURM, profile {site.profile_name}" if site.is_slurm else "on this machine"
    print(
        f"recipe {planned.request.recipe}, stages {arguments.stage} in {planned.root}, {place} ({site.why})", flush=True
    )
    print("\n".join(planned.describe()), flush=True)
    if arguments.dry_run:
        return slurm_chain.dry_run(planned, site.profile, site.profile_name) if site.is_slurm else 0
    if not site.is_slurm:
        return run_chain_locally(planned)
    print("\n".join(slurm_chain.describe_jobs(slurm_chain.submit_chain(planned, site.profile, site.profile_name))))
    print(f"what is going on: python launch/submit.py status {planned.root}")
    return 0


def submit(config: RunConfig, site: Site) -> int:
    """Queue the stage and say how to look after it."""
    try:
        refuse_queued(config.run_dir, config.stage)
        done = submit_stage(config, site.profile, site.profile_name)
    except (ValueError, OSError, SchedulerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_text(RunDir(config.run_dir).config, to_yaml(config))  # the run is taken: a second one is refused
    if problem := ask_scheduler(done.order.file("sbatch")):
        print(f"warning: job {done.job} waits, but {problem}", file=sys.stderr)
    print(f"job {done.job} is queued: {describe_profile(site.profile)}; script {done.order.file('sbatch')}")
    return 0


def run_here(config: RunConfig, *, resume: bool) -> int:
    """Train in this machine's processes, in the foreground."""
    status = run_locally(config, resume=resume)
    if status == 0 and config.report and config.train.steps:
        print(f"report: {build_report(Path(config.run_dir))}")
    return status


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] and words[0] in LOOKING:
        from launch.watch import main as watch

        return watch(words)
    if words[:1] == ["prepare"]:
        return prepare(words[1:])
    arguments = parser().parse_intermixed_args(argv)
    if arguments.owner is not None:
        die_with(arguments.owner)
    try:
        site = choose_site(arguments)
        asked = arguments.recipe
        arguments.recipe, why = choose_recipe(asked, site)
        if arguments.sweep:
            return sweep(arguments, site)
        refuse_without_sweep(arguments)
        if is_chain(arguments.stage) or arguments.eval_every is not None:
            return chain(arguments, site)
        config = load_for(site, arguments, is_recipe_asked=asked is not None)
        if config.recipe != arguments.recipe and asked is None:
            why = "the run's own"
        if not arguments.dry_run:
            _open(RunDir(config.run_dir), resume=arguments.resume)
    except (ValueError, OSError, SchedulerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    place = f"on SLURM, profile {site.profile_name}" if site.is_slurm else "on this machine"
    print(f"recipe {config.recipe} ({why}), stage {config.stage}, {place} ({site.why})", flush=True)
    if arguments.dry_run:
        return dry_run(config, arguments, site)
    return submit(config, site) if site.is_slurm else run_here(config, resume=arguments.resume)


if __name__ == "__main__":
    raise SystemExit(main())
