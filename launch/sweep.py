"""What a sweep is: several short runs of one configuration that differ in a few keys (submit.py --sweep)."""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from omegaconf import OmegaConf

from evals.suites import SUITES
from launch.config import RunConfig, load_config
from launch.judge import GAP, num_judged
from launch.search import Axis, SweepError, Values, draws, grid, ranged, read_axis
from launch.shorten import at_length
from vjepa.objectives.terms import TERMS

Method = Literal["bisect", "grid", "random"]
RUNS: dict[Method, int] = {"bisect": 6, "grid": 12, "random": 12}
SHARE = 6  # a run's default length is this part of the recipe's: a bisection costs one training
DECADES = 3  # on each side of the configured value, where no range is given
SET_BY_SWEEP = ("run_dir", "report", "train.steps")
SWEEP_ONLY = ("method", "range", "runs", "steps", "jobs", "score")
MEAN = "mean"


@dataclass(frozen=True)
class Sweep:
    """What is asked for."""

    recipe: str
    stage: str
    options: tuple[str, ...]
    overrides: tuple[str, ...]
    axes: tuple[Axis, ...]
    method: Method
    runs: int
    """At most so many."""
    steps: int
    """Of each run."""
    scaled: tuple[str, ...]
    """Overrides that fit the schedules to `steps`."""
    score: str
    """MEAN over all probes of the recipe's suites, or one of them."""
    folder: Path

    def settings(self) -> dict[str, Any]:
        """What must stay the same for `--resume`; more runs of a bisection or of draws continue it."""
        fixed = ["recipe", "stage", "options", "overrides", "method", "steps", "score", "scaled"]
        fixed += ["runs"] if self.method == "grid" else []
        found = {name: getattr(self, name) for name in fixed}
        found["sweep"] = {axis.key: axis.values or [axis.low, axis.high] for axis in self.axes}
        return json.loads(json.dumps(found))

    def config(self, values: Values, name: str = "check") -> RunConfig:
        """The configuration of one run."""
        return load_config(self.recipe, self.stage, self.arguments(values, name), options=self.options)

    def arguments(self, values: Values, name: str) -> list[str]:
        """The overrides of one run: schedules, what the user asked for, what the sweep tries."""
        own = [f"run_dir={self.folder / name}", "report=false", "train.checkpoint.keep=1"]
        own.append("train.alarms.on_collapse=warn")  # a run that collapses is judged, not failed
        return [*self.scaled, *own, *self.overrides, *(f"{key}={value}" for key, value in values.items())]

    def command(self, values: Values) -> str:
        """How to train with what was found, at the recipe's own length."""
        words = ["python", "launch/submit.py", "--recipe", self.recipe, "--stage", self.stage]
        words += [f"--option={name}" for name in self.options]
        words += [*self.overrides, *(f"{key}={value}" for key, value in values.items())]
        return shlex.join([*words, f"run_dir={self.folder / 'chosen'}"])

    def planned(self) -> list[Values]:
        """The values of a grid or of draws; of a bisection, which decides as it goes, the first one and its ends."""
        if self.method == "bisect":
            return [{axis.key: axis.at(share)} for axis in self.axes for share in (0.5, 0.0, 1.0)]
        return grid(self.axes, self.runs) if self.method == "grid" else draws(self.axes, self.runs)


def run_name(index: int, values: Values) -> str:
    """The folder of a run: its place in the plan and the last part of each key."""
    words = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in values.items())
    return f"{index + 1:02d}_" + re.sub(r"[^\w.,=+-]", "_", words)


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "sweep", "several short runs under run_dir that differ in one key (bisect) or some (grid, random)"
    )
    group.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY[=a,b,c | =LOW..HIGH]",
        help="key to vary, with values or a range (on a log scale where positive); may repeat",
    )
    group.add_argument("--method", choices=get_args(Method), help="default: bisect for one range, else grid")
    group.add_argument("--range", nargs=2, metavar=("LOW", "HIGH"), help="of a --sweep KEY that stands alone")
    group.add_argument("--runs", type=int, metavar="N", help="at most so many (default: bisect 6, grid and random 12)")
    group.add_argument("--steps", type=int, metavar="N", help=f"of each run (default: the recipe's / {SHARE})")
    group.add_argument("--jobs", type=int, metavar="N", help="runs at a time, for grid and random (default: 1)")
    group.add_argument("--score", metavar="TASK", help="the probe that decides (default: the mean of the suite's)")


def refuse_without_sweep(arguments: argparse.Namespace) -> None:
    """Settings of a sweep mean nothing without one."""
    given = [f"--{name}" for name in SWEEP_ONLY if getattr(arguments, name) is not None]
    if given:
        raise SweepError(f"{', '.join(given)}: only with --sweep KEY")


def read_sweep(arguments: argparse.Namespace) -> Sweep:
    """The sweep that a command line asks for.

    Raises ConfigError or SweepError for what cannot work, before anything runs.
    """
    given = {key: value for key, _, value in (text.partition("=") for text in arguments.overrides)}
    kept = tuple(text for text in arguments.overrides if text.partition("=")[0] not in ("run_dir", "train.steps"))
    recipe = load_config(arguments.recipe, arguments.stage, kept, options=arguments.option)
    axes = _axes(arguments, recipe)
    _check_keys(given, [axis.key for axis in axes])
    method = arguments.method or ("bisect" if len(axes) == 1 and axes[0].is_range else "grid")
    steps = _steps(arguments.steps, given.get("train.steps")) or max(1, recipe.train.steps // SHARE)
    sweep = Sweep(
        recipe=recipe.recipe,
        stage=recipe.stage,
        options=tuple(arguments.option),
        overrides=kept,
        axes=axes,
        method=method,
        runs=RUNS[method] if arguments.runs is None else arguments.runs,
        steps=steps,
        score=arguments.score or MEAN,
        folder=Path(given.get("run_dir", f"runs/{recipe.recipe}_sweep")),
        scaled=tuple(at_length(recipe, steps)),
    )
    _check(sweep, arguments)
    return sweep


def _check_keys(given: Mapping[str, str], swept: Sequence[str]) -> None:
    """Every setting has one owner: the sweep, the command line, or a swept key."""
    if len(set(swept)) < len(swept):
        raise SweepError("--sweep: a key is given twice")
    if taken := [key for key in swept if key in SET_BY_SWEEP] + [key for key in given if key == "report"]:
        raise SweepError(f"{taken[0]} is set by the sweep: leave it out")
    if clash := [key for key in swept if key in given]:
        raise SweepError(f"{clash[0]} is both swept and set: leave {clash[0]}={given[clash[0]]} out")


def _steps(asked: int | None, override: str | None) -> int | None:
    """--steps N and train.steps=N say the same."""
    given = {str(value) for value in (asked, override) if value is not None}
    if len(given) > 1:
        raise SweepError(f"--steps {asked} and train.steps={override} differ: give one of them")
    if not given:
        return None
    (text,) = given
    if not text.isdigit() or int(text) < 1:
        raise SweepError(f"--steps {text} must be a whole number of at least 1")
    return int(text)


def _axes(arguments: argparse.Namespace, config: RunConfig) -> tuple[Axis, ...]:
    """The swept keys; one that stands alone takes --range, or DECADES on both sides of its value."""
    axes = [read_axis(text) for text in arguments.sweep]
    bare = [axis for axis in axes if axis.is_range and math.isnan(axis.low)]
    if arguments.range and len(bare) != 1:
        raise SweepError("--range is for one --sweep KEY without values: with several keys write KEY=LOW..HIGH")
    return tuple((ranged(axis, *_range(arguments, axis, config)) if axis in bare else axis) for axis in axes)


def _range(arguments: argparse.Namespace, axis: Axis, config: RunConfig) -> tuple[str, str]:
    if arguments.range:
        low, high = arguments.range
        return low, high
    value = _configured(config, axis.key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise SweepError(f"--sweep {axis.key} is {value!r} in this recipe: give --range LOW HIGH or KEY=a,b,c")
    if isinstance(value, int):
        return str(max(1, value // 10**DECADES)), str(value * 10**DECADES)
    return repr(value / 10**DECADES), repr(value * 10**DECADES)


def _configured(config: RunConfig, key: str) -> object:
    """The value of a key, also of a term's field that the recipe leaves at its default."""
    value = OmegaConf.select(OmegaConf.structured(config), key)
    if value is None and (match := re.fullmatch(r"objective\.terms\.(\w+)\.(\w+)", key)):
        return getattr(TERMS.get(match[1]), match[2], None)
    return value


def _check(sweep: Sweep, arguments: argparse.Namespace) -> None:
    """Refuse what cannot work: methods that do not fit the keys, values that no run takes, health that none shows."""
    if sweep.runs < 1 or (arguments.jobs is not None and arguments.jobs < 1):
        raise SweepError("--runs and --jobs must be at least 1")
    if sweep.method == "bisect":
        if len(sweep.axes) != 1 or not sweep.axes[0].is_range or not sweep.axes[0].is_log:
            raise SweepError("--method bisect takes one key with a range of positive values: use grid or random")
        if (arguments.jobs or 1) > 1:
            raise SweepError("--jobs: a bisection decides after every run; several at a time are for grid and random")
    configs = [sweep.config(values) for values in sweep.planned()]
    for config in configs:
        config.check()
    _check_judging(sweep, configs[0])


def _check_judging(sweep: Sweep, config: RunConfig) -> None:
    """Refuse a bisection whose runs cannot be healthy or not, and a score that no run has."""
    judged, alarms = num_judged(config.train), config.train.alarms
    if sweep.method == "bisect" and judged < alarms.consecutive:
        raise SweepError(
            f"a bisection needs {alarms.consecutive} evaluations after the warm-up of the alarms, but {sweep.steps} "
            f"steps with train.diagnostics_every={config.train.diagnostics_every} and "
            f"train.alarms.warmup_steps={alarms.warmup_steps} have {judged}: lower these two or raise --steps"
        )
    tasks = [task.name for suite in config.suites() for task in SUITES[suite].tasks] or [GAP]
    if sweep.score not in (MEAN, *tasks):
        raise SweepError(f"--score {sweep.score} is none of this recipe's: {', '.join(tasks)}")
