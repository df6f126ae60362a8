"""One rank of one run: the place where the parts are put together.

torchrun --nproc-per-node 2 -m launch.train --recipe debug [--stage primary] [--resume] [key=value ...]
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from data_pipeline.config import DataConfig
from data_pipeline.dataset import ClipDataset
from data_pipeline.figures import DataFigures
from data_pipeline.loader import build_loader
from evals.results import update_summary
from launch.config import RunConfig, load_config, load_for_resume, numbers_hash
from launch.export import export_run
from launch.init_from import load_initial_weights, optimizer_checkpoint
from launch.plan import refuse_if_too_large
from launch.preflight import PreflightError, check_all_reduce
from launch.prepare import prepare_data
from launch.segments import NoteKind
from vjepa.batch import MicroBatch
from vjepa.config import ConfigError, to_yaml
from vjepa.masking.collate import MaskCollator
from vjepa.nn.predictor import Predictor
from vjepa.objectives import JEPA, build_objective
from vjepa.objectives.build import load_teacher
from vjepa.objectives.checks import freeze_unused
from vjepa.train.checkpoint import committed
from vjepa.train.distributed import World, init_world, leave_process
from vjepa.train.record import Interrupted
from vjepa.train.run_dir import RunDir, RunInUseError
from vjepa.train.signals import StopFlag, StoppedEarly, catch_stop_signals
from vjepa.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
log = logging.getLogger(__name__)


def train(config: RunConfig, *, resume: bool, stop: StopFlag, store: Store | None = None) -> None:
    """Run one stage on this rank, to its end or to an agreed stop; `store` is where a launcher has the ranks meet."""
    torch.set_num_threads(config.train.threads)
    timeout = timedelta(seconds=config.train.collective_timeout_s)
    with init_world(config.train.device, timeout, store=store) as world, closing(RunDir(config.run_dir)) as run:
        if store is not None:
            say(world, check_all_reduce(world))
        num_micro_batches = config.check(world.size)
        world.on_main(lambda: _open_run(run, config, resume))
        world.on_main(lambda: check_memory(config, world))
        is_new = world.on_main(lambda: not (resume and committed(run.checkpoints)))
        batch = config.train.batch.as_dict()
        objective = build_objective(
            config.objective, config.model, config.predictor, seed=config.train.seed, device="meta"
        )
        frozen = freeze_unused(objective, list(batch))
        data_figures = DataFigures(config.data)
        trainer = Trainer(
            config.train,
            objective,
            _batches(config, world, num_micro_batches, data_figures),
            num_micro_batches=num_micro_batches,
            world=world,
            run=run,
            max_bad_fraction=config.data.max_bad_fraction,
            title=f"{config.recipe}/{config.stage}",
            config_hash=numbers_hash(config),
            fill=lambda objective: _fill(config, objective, world, is_new=is_new),
            data_counters=data_figures,
        )
        if is_new and (carried := optimizer_checkpoint(config)) is not None:
            trainer.carry_optimizer(carried)
            say(world, f"going on with the optimizer of {carried}")
        if resume:
            step = trainer.resume()
            say(world, f"resumed from step {step}" + ("" if step else f": {run.path} holds no complete checkpoint"))
        say(world, _summary_line(config, world, objective, num_micro_batches, frozen))
        trainer.fit(stop)
        if objective.cache is not None:
            say(world, objective.cache.summary())
        weights, predictor = trainer.export_state(), trainer.export_predictor()  # of shards: all ranks take part
        world.on_main(lambda: _finish(config, run, trainer, weights, predictor))


def check_memory(config: RunConfig, world: World) -> None:
    """Refuse now, with what would fit, what would end in an out-of-memory error minutes later."""
    if config.check_memory and world.device.type == "cuda":
        memory = torch.cuda.get_device_properties(world.device).total_memory
        refuse_if_too_large(config, world.size, memory)


def _fill(config: RunConfig, objective: JEPA, world: World, *, is_new: bool) -> None:
    """The values a run starts from: drawn from its seed, or those of `init_from`."""
    objective.initialise(seed=config.train.seed, weight_std=config.model.init_std)
    load_teacher(objective, clips=None if config.objective.teacher.cache is None else _clips(config))
    if config.init_from is not None and is_new:
        taken = load_initial_weights(objective, config.init_from, world, predictor=config.init_predictor)
        say(world, f"starting from {taken}")


def _open_run(run: RunDir, config: RunConfig, resume: bool) -> None:
    if not resume:
        run.refuse_existing()
    run.lock()
    if not resume:
        run.refuse_existing()  # the process that held the lock may have begun a run
    prepare_data(config)
    run.describe(to_yaml(config), ROOT)


def _batches(
    config: RunConfig, world: World, num_micro_batches: int, data_figures: DataFigures
) -> Callable[[int, int], Generator[MicroBatch]]:
    """The loader's stream from any step on, with masks drawn in its workers; `data_figures` watches it."""
    batch = config.train.batch.as_dict()
    collate = MaskCollator(
        config.masks,
        seed=config.train.seed,
        batch=batch,
        patch_size=config.model.patch_size,
        tubelet_size=config.model.tubelet_size,
    )

    data = _trained_data(config)

    def stream(first: int, end: int) -> Generator[MicroBatch]:
        loader = build_loader(
            data,
            seed=config.train.seed,
            batch={str(modality): size for modality, size in batch.items()},
            world=world.size,
            rank=world.rank,
            accumulate=num_micro_batches,
            start_step=first,
            stop_step=end,
            collate=collate,
        )
        data_figures.watch(loader.dataset, loader.events)
        yield from cast(Iterable[MicroBatch], loader)

    return stream


def _trained_data(config: RunConfig) -> DataConfig:
    """The data of the modalities that are trained on."""
    left_out = [name for name in config.data.modalities() if name not in config.train.batch.as_dict()]
    return replace(config.data, **{name: replace(getattr(config.data, name), sources={}) for name in left_out})


def _clips(config: RunConfig) -> dict[str, dict[str, str]]:
    """What decides the pixels of every ordinal, by modality; of a webdataset stream nothing does, and it is refused."""
    dataset = ClipDataset(_trained_data(config), seed=config.train.seed)
    for modality, sources in dataset.info().items():
        for name, source in sources.items():
            if not source["exact"]:
                raise ValueError(
                    f"objective.teacher.cache={config.objective.teacher.cache}: data.{modality}.sources.{name} is a "
                    "webdataset stream, in which a clip's place names no clip: ingest it, or leave the cache out"
                )
    return dataset.identity()


def _finish(
    config: RunConfig, run: RunDir, trainer: Trainer, weights: Mapping[str, Tensor], predictor: Predictor | None
) -> None:
    """Export target encoder and predictor and note the figures in the summary, once the last step is saved."""
    export_run(run.path, config, weights, predictor, steps=trainer.step)
    loss = trainer.recorder.final_loss if trainer.step else None
    figures = {
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 3),
        "final_loss": loss,
    }

    def note(summary: dict[str, Any]) -> None:
        before = dict(summary)  # other stages of a chain, evaluations of checkpoints
        summary.clear()
        summary["recipe"] = config.recipe
        summary["stages"] = before.get("stages", {}) | {config.stage: figures}
        summary["evals"] = before.get("evals", [])
        summary |= {name: value for name, value in before.items() if name not in summary}

    path = update_summary(config.summary_folder(run.path), note)
    print(f"done: {trainer.step} steps" + ("" if loss is None else f", final loss {loss:.4f}") + f"; {path}")


def _summary_line(
    config: RunConfig, world: World, objective: JEPA, num_micro_batches: int, frozen: Sequence[str]
) -> str:
    counts = {"encoder": objective.encoder, "predictor": objective.predictor, "heads": objective.heads}
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in counts.items() if module is not None}
    parameters = " and ".join(f"{name} {size:,}" for name, size in sizes.items() if size)
    batch = ", ".join(f"{size} {modality}" for modality, size in config.train.batch.as_dict().items())
    return (
        f"{config.recipe}/{config.stage}: {parameters} parameters, target {config.objective.target}, {world.size} "
        f"rank(s) on {world.device.type}, global batch {batch}, {num_micro_batches} micro-batch(es) per step, "
        f"{config.train.precision}" + (f"; not trained: {', '.join(frozen)}" if frozen else "")
    )


def say(world: World, text: str) -> None:
    """One line for people, once."""
    if world.is_main:
        print(text, flush=True)


def add_run_arguments(parser: argparse.ArgumentParser, *, recipe_required: bool = True) -> None:
    """The arguments that every way of starting a run shares."""
    parser.add_argument("--recipe", required=recipe_required, help="folder under launch/recipes")
    parser.add_argument("--stage", default="primary", help="stage of the recipe")
    parser.add_argument("--option", action="append", default=[], help="file under launch/recipes/options, may repeat")
    parser.add_argument("--resume", action="store_true", help="continue the run in run_dir from its newest checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.steps=1000")


def load(arguments: argparse.Namespace, *, is_recipe_asked: bool = True) -> RunConfig:
    """The configuration asked for: of a new run, or of the one to resume, which knows its recipe if none is asked."""
    config = load_config(arguments.recipe, arguments.stage, arguments.overrides, options=arguments.option)
    held = RunDir(config.run_dir)
    if not arguments.resume:
        return config
    if held.config.is_file():
        recipe = config.recipe if is_recipe_asked else None
        return load_for_resume(held.config, arguments.overrides, recipe, arguments.stage, options=arguments.option)
    if held.checkpoints.exists():
        raise ConfigError(
            f"{held.config} is missing, but {held.checkpoints} exists: put the run's configuration back, then --resume"
        )
    return config


class Note(Protocol):
    """Takes down how a rank has ended, for a launcher; `kind` as in launch/segments.py."""

    def __call__(
        self, kind: NoteKind, text: str, *, step: int | None = None, signum: int = 0, culprit: str | None = None
    ) -> None: ...


def no_note(kind: NoteKind, text: str, *, step: int | None = None, signum: int = 0, culprit: str | None = None) -> None:
    """Nobody asks."""


def run(config: RunConfig, *, resume: bool, store: Store | None = None, note: Note = no_note) -> int:
    """Train and turn what can go wrong into one line and an exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("submitit").setLevel(logging.WARNING)
    with catch_stop_signals() as stop:
        try:
            train(config, resume=resume, stop=stop, store=store)
        except (Interrupted, StoppedEarly) as stopped:
            print(stopped, flush=True)
            step = stopped.step if isinstance(stopped, Interrupted) else None
            note("interrupted", signal.Signals(stopped.signum).name, step=step, signum=stopped.signum)
            return 128 + stopped.signum
        except (ValueError, RuntimeError, OSError) as error:
            log.debug("", exc_info=True)
            print(f"error: {str(error).strip()} (run_dir={config.run_dir})", file=sys.stderr, flush=True)
            note_error(note, error)
            return 1
        note("done", f"{config.train.steps} steps", step=config.train.steps)
    return 0


def note_error(note: Note, error: Exception) -> None:
    """What a person must mend is refused; what may go better another time, or on another node, is not."""
    text = f"{type(error).__name__}: {str(error).strip()}"
    if isinstance(error, PreflightError):
        note("preflight", str(error), culprit=error.culprit)
    elif isinstance(error, ValueError) and not isinstance(error, RunInUseError):
        note("refused", text)
    else:
        note("error", text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.train", description=__doc__)
    add_run_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = load(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run(config, resume=arguments.resume)


if __name__ == "__main__":
    leave_process(main())
