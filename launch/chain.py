"""A chain: stages one after another, each from what the one before it has exported, at last the evaluations.

Everything of every stage is checked before the first one starts, as if the exports that are yet to be made were there.
One training alone keeps the run directory to itself; of several each trains in ROOT/STAGE, and the summary of all lies
in ROOT.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from evals.protocol import TRAINED
from evals.results import SUMMARY, read_summary_rows
from evals.suites import SUITES
from launch.chain_check import check_chain, export_of, naming
from launch.cluster import num_processes, run_locally
from launch.config import RunConfig, SuiteConfig, load_for_resume, recipe_layers
from launch.job_order import job_folder, write_whole
from launch.processes import Trainings
from launch.report_single import build_report
from vjepa.config import ConfigError, ModelConfig, merge, to_object, to_yaml
from vjepa.hub import CONFIG
from vjepa.registry import create_encoder
from vjepa.train.run_dir import RunDir

EVALS = "evals"
RECORD = "chain.json"
KEYS = {field.name for field in fields(RunConfig)}


@dataclass(frozen=True)
class ChainRequest:
    """What is asked for; kept in ROOT/job/chain.json: stages that a `--resume` begins are those that were asked for."""

    recipe: str
    stages: tuple[str, ...]
    options: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    eval_every: int | None = None  # steps between evaluations on the way

    def write(self, root: Path) -> None:
        write_whole(job_folder(root) / RECORD, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, root: Path) -> ChainRequest:
        stored: dict[str, Any] = json.loads((job_folder(root) / RECORD).read_text())
        return cls(
            recipe=stored["recipe"],
            stages=tuple(stored["stages"]),
            options=tuple(stored["options"]),
            overrides=tuple(stored["overrides"]),
            eval_every=stored["eval_every"],
        )

    @classmethod
    def is_in(cls, root: Path) -> bool:
        """Whether a folder is that of a chain whose trainings lie in folders of their own."""
        return (job_folder(root) / RECORD).is_file() and len(cls.read(root).trainings) > 1

    @property
    def trainings(self) -> tuple[str, ...]:
        return tuple(stage for stage in self.stages if stage != EVALS)


@dataclass(frozen=True)
class Chain:
    """Stages whose configurations have been checked, in order."""

    request: ChainRequest
    root: Path
    configs: Mapping[str, RunConfig]
    """Of the trainings."""

    @property
    def has_evals(self) -> bool:
        return EVALS in self.request.stages

    def suites(self) -> dict[str, SuiteConfig]:
        """What any training names; all of them are asked all of it."""
        return {name: settings for config in self.configs.values() for name, settings in config.suites().items()}

    def evaluation(self) -> list[str]:
        """The command that evaluates them all."""
        return [sys.executable, "-m", "launch.evaluate", str(self.root), "--reuse"]

    def is_finished(self, stage: str) -> bool:
        """Whether a stage has left what the next ones need: an export and its figures, or the rows of all trainings."""
        if stage == EVALS:
            return all(_is_evaluated(config, self.suites()) for config in self.configs.values())
        return is_finished(self.configs[stage])

    def begin(self) -> None:
        """Write down what was asked for; in the runs that are there too, which are evaluated by their own files."""
        self.request.write(self.root)
        for config in self.configs.values():
            stored = RunDir(config.run_dir).config
            if stored.is_file():
                write_whole(stored, to_yaml(config))

    def describe(self) -> list[str]:
        """A line for each stage: what it starts from and where it goes."""
        lines = []
        for stage, config in self.configs.items():
            teacher = config.objective.teacher.path
            start = f", starts from {config.init_from}" if config.init_from else ""
            is_own = teacher is not None and teacher == config.init_from
            taught = "" if teacher is None else ", its frozen teacher" if is_own else f", frozen teacher {teacher}"
            lines.append(f"  {stage}: {config.train.steps} steps in {config.run_dir}{start}{taught}")
        if self.has_evals:
            lines.append(f"  {EVALS}: {', '.join(self.suites())} of {', '.join(self.configs)}")
        return lines


def is_finished(config: RunConfig) -> bool:
    """Whether a training has come to its end: exported, and in the summary."""
    exported = Path(config.run_dir) / "exports" / config.stage / CONFIG
    summary = config.summary_folder() / SUMMARY
    return (
        exported.is_file() and summary.is_file() and config.stage in json.loads(summary.read_text()).get("stages", {})
    )


def _is_evaluated(config: RunConfig, suites: Iterable[str]) -> bool:
    """Whether the summary has every task of the suites for a training's encoder."""
    rows = read_summary_rows(config.summary_folder())
    measured = {row.task for row in rows if (row.stage, row.model, row.step) == (config.stage, TRAINED, None)}
    return measured >= {task.name for suite in suites for task in SUITES[suite].tasks}


# ------------------------------------------------------------------------------------------------------------ planning


def read_stages(text: str) -> tuple[str, ...]:
    """The stages of `--stage a,b,c`."""
    stages = tuple(text.split(","))
    if "" in stages or len(set(stages)) < len(stages):
        raise ConfigError(f"--stage {text}: name every stage once, as in primary,cooldown,{EVALS}")
    if EVALS in stages[:-1]:
        raise ConfigError(f"--stage {text}: {EVALS} comes last, it evaluates all trainings before it")
    return stages


def is_chain(text: str) -> bool:
    """Whether `--stage` asks for more than one training."""
    return "," in text or text == EVALS


def plan_chain(
    request: ChainRequest,
    *,
    resume: bool,
    world: Callable[[RunConfig], int] = num_processes,
    more: Callable[[RunConfig], Sequence[str]] = lambda config: (),
    needs_sources: bool = True,
    is_absolute: bool = False,
) -> Chain:
    """The configurations of all stages, checked on as many ranks as `world` says.

    `more` gives further overrides of a stage, such as a cluster's paths of data. Raises ConfigError that names the
    stage, RunDirError where a run is there that nobody asked to resume.
    """
    is_alone = not request.trainings
    if is_alone:  # evaluations of what was trained before
        resume = True
    if resume:
        request = _as_begun(request)
    own = _split(request)
    root = Path(_root(request))
    root = root.resolve() if is_absolute else root  # a job's folder must not depend on where it is started from
    is_shared = len(request.trainings) > 1
    configs: dict[str, RunConfig] = {}
    for stage in request.trainings:
        fixed = [f"run_dir={root / stage}", "in_chain=true"] if is_shared else [f"run_dir={root}"]
        with naming(stage):
            configs[stage] = _load(request, stage, [*own[stage], *fixed], configs, more, resume=resume)
            if not resume:
                RunDir(configs[stage].run_dir).refuse_existing()
    chain = Chain(request, root, configs)
    if is_alone:
        _refuse_unfinished(chain)
    check_chain(configs, world, suites=chain.suites() if chain.has_evals else None, needs_sources=needs_sources)
    return chain


def _as_begun(request: ChainRequest) -> ChainRequest:
    """A request to go on, with what the chain or the run in its folder was begun with below what is asked now."""
    root = Path(_root(replace(request, stages=request.trainings or ("primary",))))
    if (job_folder(root) / RECORD).is_file():
        begun = ChainRequest.read(root)
        request = replace(
            request,
            recipe=begun.recipe,
            options=request.options or begun.options,
            overrides=(*(text for text in begun.overrides if _is_of(text, request)), *request.overrides),
            eval_every=begun.eval_every if request.eval_every is None else request.eval_every,
        )
        return request if request.trainings else replace(request, stages=(*begun.trainings, EVALS))
    if request.trainings:
        return request
    stored = RunDir(root).config
    if not stored.is_file():
        raise ConfigError(f"--stage {EVALS}: {root} holds no run to evaluate: train it first, or give its run_dir=...")
    run = load_for_resume(stored, [])
    return replace(request, recipe=run.recipe, stages=(run.stage, EVALS))


def _is_of(text: str, request: ChainRequest) -> bool:
    """Whether an override that a chain was begun with is of the stages that are asked for now."""
    first, dot, _ = text.partition("=")[0].partition(".")
    return not dot or first in KEYS or not request.trainings or first in request.trainings


def _refuse_unfinished(chain: Chain) -> None:
    if unfinished := [stage for stage in chain.configs if not chain.is_finished(stage)]:
        raise ConfigError(
            f"--stage {EVALS}: {', '.join(unfinished)} of {chain.root} is not finished: --resume it first"
        )


def _root(request: ChainRequest) -> str:
    general = [text for text in request.overrides if text.partition("=")[0] == "run_dir"]
    node = merge(RunConfig, recipe_layers(request.recipe, request.trainings[0]), general)
    return node.run_dir


def _split(request: ChainRequest) -> dict[str, list[str]]:
    """The overrides of each training: key=value is for all, STAGE.key=value for one; run_dir is the chain's."""
    own: dict[str, list[str]] = {stage: [] for stage in request.trainings}
    for text in request.overrides:
        key = text.partition("=")[0]
        first, dot, rest = text.partition(".")
        if dot and first in own:
            if rest.startswith("run_dir="):
                raise ConfigError(f"{text}: a chain trains in RUN_DIR/STAGE; give run_dir=... for the whole of it")
            own[first].append(rest)
        elif "." in key and first not in KEYS:
            raise ConfigError(
                f"{text}: {first} is neither a stage of this chain ({', '.join(own)}) nor a key of the configuration"
            )
        elif key != "run_dir":
            for stage in own:
                own[stage].append(text)
    return own


def _load(
    request: ChainRequest,
    stage: str,
    overrides: list[str],
    before: Mapping[str, RunConfig],
    more: Callable[[RunConfig], Sequence[str]],
    *,
    resume: bool,
) -> RunConfig:
    """One training's configuration: the one it began with, or a new one that starts from its predecessor's export."""
    fixed = [text for text in overrides if text.startswith(("run_dir=", "in_chain="))]
    held = RunDir(fixed[0].partition("=")[2]).config
    if resume and held.is_file():
        return load_for_resume(held, overrides, stage=stage, options=request.options)
    layers = recipe_layers(request.recipe, stage, request.options)
    if before:
        overrides = [*overrides, *_from_predecessors(layers, overrides, before)]
    if request.eval_every is not None:
        overrides = [*overrides, *_kept_for_evaluation(merge(RunConfig, layers, overrides), request.eval_every)]
    config = to_object(merge(RunConfig, layers, overrides))
    further = list(more(config))
    return to_object(merge(RunConfig, layers, [*overrides, *further])) if further else config


def _from_predecessors(
    layers: Sequence[DictConfig], overrides: list[str], before: Mapping[str, RunConfig]
) -> list[str]:
    """What the recipe leaves open: its frozen teacher and, where the networks are the same, its first weights."""
    node = merge(RunConfig, layers, overrides)
    found = []
    if node.objective.target == "frozen" and node.objective.teacher.path is None:
        found.append(f"objective.teacher.path={export_of(_followed(node, 'teacher', before))}")
    if "init_from" not in OmegaConf.merge(*layers, OmegaConf.from_dotlist(overrides)):
        start = _followed(node, "start", before)
        if _shapes(to_object(node.model)) == _shapes(start.model):
            goes_on = node.objective.target == start.objective.target == "ema"  # encoder, predictor, target: three
            found.append(f"init_from={start.run_dir if goes_on else export_of(start)}")
    return found


def _followed(node: DictConfig, what: str, before: Mapping[str, RunConfig]) -> RunConfig:
    """The earlier stage that a stage takes its teacher or its start from: the one its recipe names, or the last."""
    name = node.follows.get(what, list(before)[-1])
    if name not in before:
        instead = "objective.teacher.path" if what == "teacher" else "init_from"
        raise ConfigError(
            f"follows.{what}={name}, and no stage {name} comes before it in this chain ({', '.join(before)}): add it, "
            f"or give {instead}=PATH"
        )
    return before[name]


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    encoder = create_encoder(model.encoder_config(), device="meta")
    return {name: tuple(value.shape) for name, value in encoder.state_dict().items()}


def _kept_for_evaluation(node: DictConfig, every: int) -> list[str]:
    """Checkpoints to be evaluated stay until a job has come to it, however long it waits."""
    milestone = node.train.checkpoint.milestone_every
    if every < 1:
        raise ConfigError(f"--eval-every {every} must be at least 1")
    if milestone is None:
        return [f"train.checkpoint.milestone_every={every}"]
    if every % milestone:
        raise ConfigError(
            f"--eval-every {every} must be a multiple of train.checkpoint.milestone_every={milestone}: only "
            "checkpoints that stay can be evaluated by a job that waits in the queue"
        )
    return []


# ------------------------------------------------------------------------------------------------------------- locally


def run_chain_locally(chain: Chain) -> int:
    """One stage after another in the foreground; the status of the first that fails, which is the last that runs."""
    chain.begin()
    for stage in chain.request.stages:
        if chain.is_finished(stage):
            print(f"stage {stage} is finished", flush=True)
            continue
        print(f"stage {stage}", flush=True)
        status = _evaluate(chain) if stage == EVALS else _train(chain.configs[stage])
        if status:
            left = chain.request.stages[chain.request.stages.index(stage) + 1 :]
            behind = f"; not started: {', '.join(left)}" if left else ""
            print(f"stage {stage} ended with status {status}{behind}: go on with --resume", file=sys.stderr)
            return status
    return 0


def _train(config: RunConfig) -> int:
    run = RunDir(config.run_dir)
    run.make()
    status = run_locally(config, resume=run.config.is_file())
    if status == 0 and config.report and config.train.steps:
        print(f"report: {build_report(run.path)}")
    return status


def _evaluate(chain: Chain) -> int:
    with Trainings() as processes:
        return processes.run(chain.evaluation())
