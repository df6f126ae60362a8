"""Everything of every stage of a chain checked before the first one starts, as if exports yet to be made were there."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from launch.config import RunConfig, SuiteConfig
from launch.init_from import check_exported, is_exported, optimizer_checkpoint
from vjepa.config import ConfigError
from vjepa.hub import CONFIG, save_config
from vjepa.objectives import JEPA, ObjectiveConfig, build_objective
from vjepa.objectives.checks import freeze_unused


def export_of(config: RunConfig) -> Path:
    """Where a training leaves its encoder."""
    return Path(config.run_dir) / "exports" / config.stage


@contextmanager
def naming(stage: str) -> Iterator[None]:
    """What is refused says which stage it is of."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"stage {stage}: {error}") from error


def check_chain(
    configs: Mapping[str, RunConfig],
    world: Callable[[RunConfig], int],
    *,
    suites: Mapping[str, SuiteConfig] | None,
    needs_sources: bool,
) -> None:
    """Refuse what any stage would refuse hours later; `suites` are the evaluations, None where there are none."""
    with tempfile.TemporaryDirectory() as folder:
        stand_ins: dict[Path, Path] = {}
        for stage, config in configs.items():
            with naming(stage):
                _check_stage(config, stand_ins, world(config), needs_sources=needs_sources)
            _save_stand_in(config, stand_ins, Path(folder) / stage)
            if not (export_of(config) / CONFIG).is_file():
                stand_ins[export_of(config).resolve()] = Path(folder) / stage
            stand_ins[Path(config.run_dir).resolve()] = Path(folder) / stage  # its checkpoints
    if suites is not None:
        _check_evals(configs, suites)


def _save_stand_in(config: RunConfig, stand_ins: Mapping[Path, Path], folder: Path) -> None:
    """What an export says of itself, before there is one."""
    objective = _built(replace(config, objective=_objective(config, stand_ins)))
    predictor = objective.predictor
    told = {}
    if predictor is not None:
        told["predictor"] = asdict(replace(predictor.config, context_head=predictor.trains_context_head))
    save_config(objective.encoder.config, folder, extra=told)


def _built(config: RunConfig) -> JEPA:
    """The objective without its numbers, and with what its steps do not train frozen."""
    objective = build_objective(config.objective, config.model, config.predictor, seed=0, device="meta")
    freeze_unused(objective, list(config.train.batch.as_dict()))
    return objective


def _objective(config: RunConfig, stand_ins: Mapping[Path, Path]) -> ObjectiveConfig:
    """With the stand-in for a teacher that is yet to be made."""
    path = config.objective.teacher.path
    stand_in = None if path is None else stand_ins.get(Path(path).resolve())
    if stand_in is None:
        return config.objective
    return replace(config.objective, teacher=replace(config.objective.teacher, path=str(stand_in)))


def _check_stage(config: RunConfig, stand_ins: Mapping[Path, Path], world: int, *, needs_sources: bool) -> None:
    """As the run itself does, with stand-ins for exports of stages before it."""
    try:
        checked = replace(config, objective=_objective(config, stand_ins))
        checked.check(world, needs_sources=needs_sources)
        if config.init_from is not None:
            _check_start(checked, Path(config.init_from), stand_ins)
    except (ValueError, OSError) as error:
        text = str(error)
        for path, stand_in in stand_ins.items():
            text = text.replace(str(stand_in), str(path))
        raise ConfigError(text) from error


def _check_start(config: RunConfig, start: Path, stand_ins: Mapping[Path, Path]) -> None:
    """Whether first weights are there or will be, and fit: those of a stage of this chain, of an export or a file."""
    there = stand_ins.get(start.resolve(), start)
    if not there.exists():
        raise ConfigError(f"init_from={start} is not there, and no stage before this one makes it")
    is_run = there != start and start.parent.name != "exports"  # of this chain: its predictor comes along
    if is_exported(there):
        check_exported(_built(config), there, predictor=config.init_predictor or is_run)
    if there == start:
        optimizer_checkpoint(config)


def _check_evals(configs: Mapping[str, RunConfig], suites: Mapping[str, SuiteConfig]) -> None:
    """Evaluations need suites, and their data now or made by a stage's `prepare`."""
    if not suites:
        raise ConfigError("stage evals: no training names an evaluation: add evals.SUITE.data=FOLDER")
    made: set[Path] = set()
    for config in configs.values():
        sources = config.data.video.sources | config.data.image.sources
        made |= {Path(sources[name].path).parent for name in config.prepare if name in sources}
    for suite, settings in suites.items():
        if not Path(settings.data).is_dir() and Path(settings.data) not in made:
            raise ConfigError(f"stage evals: evals.{suite}.data={settings.data} does not exist")
