"""Attentive probes trained: a grid of heads over one encoder pass, the best chosen on held-out training data.

The tasks of `probe_task.py` say what is asked, `probe_tokens.py` reads, `grid/` trains; this module joins them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from evals.anticipation import AnticipationFeatures
from evals.epic_kitchens import actions_on_disk
from evals.features import FeatureSource
from evals.grid import MAX_OVER_HEADS, Choice, HeadGrid, StateFile, choose, fit_grid, score_heads
from evals.labelled_files import check_splits, read_index
from evals.labelled_layouts import Split
from evals.probe_config import ProbeConfig
from evals.probe_task import AnticipationTask, ClassificationTask, Part, ProbeTask, Score
from evals.probe_tokens import Tokens
from evals.protocol import Score as Number
from vjepa.train.distributed import ALONE, World

TASK, PROBE = "attentive", "attentive"
OVER_EPOCHS = f"{MAX_OVER_HEADS}_and_epochs"  # ends the name of the papers' number where several epochs are validated
SPLITS: tuple[Split, ...] = ("train", "validation")


def build_task(config: ProbeConfig, source: FeatureSource | AnticipationFeatures) -> ProbeTask:
    """The task of a recipe; DataMissing where its files are not there, ValueError where the source does not fit."""
    if config.is_anticipation:
        if not isinstance(source, AnticipationFeatures):
            raise ValueError(
                "ek100 needs an encoder and its predictor: released .pt files hold both, and so do folders written "
                "with save_pretrained(encoder, folder, predictor=predictor)"
            )
        return AnticipationTask.build(config, source)
    return ClassificationTask.build(config, cast(FeatureSource, source))


def describe_data(config: ProbeConfig) -> str:
    """A text of which files the recipe's set holds; DataMissing where they are not there."""
    data = config.data
    if config.is_anticipation:
        found = [repr(actions_on_disk(data.root, split, skip_missing=data.skip_missing)) for split in SPLITS]
    else:
        files = {"train": data.train_files, "validation": data.validation_files}
        indices = [read_index(data.name, data.root, s, files=files[s], skip_missing=data.skip_missing) for s in SPLITS]
        check_splits(*indices)
        found = [f"{index.labels} {' '.join(map(str, index.paths))}" for index in indices]
    return f"{Path(data.root).resolve()} {found}"


def num_steps(config: ProbeConfig, videos: int) -> int:
    """Whole batches in the recipe's epochs, one at least."""
    return max(1, config.schedule.epochs * videos // config.schedule.batch_size)


def validation_steps(config: ProbeConfig, videos: int) -> set[int]:
    """Updates after which heads are validated besides the end: those with which every `val_every`th epoch is over."""
    schedule = config.schedule
    if schedule.val_every is None:
        return set()
    epochs = range(schedule.val_every, schedule.epochs, schedule.val_every)
    return {epoch * videos // schedule.batch_size for epoch in epochs} - {0, num_steps(config, videos)}


# ----------------------------------------------------------------------------------------------------- fit and score


@dataclass
class ProbeMeter:
    """A task's score as the grid's meters are."""

    score: Score

    def update(self, outputs: Any, labels: Any, /) -> None:
        self.score.update(outputs, labels)

    def reduce(self, world: World) -> None:
        world.sum(self.score.state)


@dataclass(frozen=True)
class ProbeResult:
    """A grid of heads, what each scored, and the one that was chosen."""

    grid: HeadGrid
    choice: Choice
    values: tuple[Mapping[str, float], ...]
    """Of every head on validation, after the last epoch."""
    headline: str
    best_of_epochs: float
    """The headline of the best head in the best of the epochs that were validated."""

    @property
    def head(self) -> nn.Module:
        return self.grid.heads[self.choice.index]


def run(
    source: FeatureSource | AnticipationFeatures,
    config: ProbeConfig,
    *,
    world: World = ALONE,
    about: str = "",
) -> ProbeResult:
    """Train the recipe's heads, every rank with its part of each batch.

    `about` names the features, for a state that goes on after a stop.
    """
    task = build_task(config, source)
    _check_parts(task, config)
    steps, tokens = num_steps(config, task.size("train")), Tokens.of(task, config, world)
    state = None
    if config.state is not None:
        state = StateFile(Path(config.state) / _state_name(config, source), config.save_every)
    stops = validation_steps(config, task.size("train"))

    def score(found: HeadGrid, part: Part) -> tuple[Mapping[str, float], ...]:
        meters = score_heads(found.heads, tokens.scored(part), lambda: ProbeMeter(task.new_score(part)), world=world)
        return tuple(meter.score.values() for meter in meters)

    def validate(found: HeadGrid) -> None:
        """Kept with the state, so that a fit that goes on knows its earlier epochs."""
        if found.step in stops:
            found.notes[str(found.step)] = [each[task.headline] for each in score(found, "validation")]

    found = fit_grid(
        lambda: task.make_head(config.seed),
        config.grid.settings(),
        tokens.training(steps),
        lambda outputs, labels, *, step: task.loss(outputs, labels),
        steps=steps,
        schedule=config.schedule,
        seed=config.seed,
        world=world,
        state=state,
        about=_about(config, about) if state else "",
        on_step=validate,
    )
    values = score(found, "validation")
    chosen_on = score(found, "held_out") if len(found.heads) > 1 else values
    choice = choose([each[task.headline] for each in chosen_on], [each[task.headline] for each in values])
    best = max(value for each in ([choice.max_over_heads], *found.notes.values()) for value in each)
    return ProbeResult(found, choice, values, task.headline, best)


def _check_parts(task: ProbeTask, config: ProbeConfig) -> None:
    several = len(config.grid.settings()) > 1
    needed: tuple[Part, ...] = ("train", "validation", "held_out") if several else ("train", "validation")
    if empty := [part for part in needed if not task.size(part)]:
        raise ValueError(
            f"{config.data.name}: the part {empty[0]} is empty; data.held_out={config.data.held_out} of the training "
            "files are held out by a hash of their names, on them the best head is chosen"
        )


def _about(config: ProbeConfig, features: str) -> str:
    """What a state is of, beside its heads: clips, levels and all other settings, the files, the features."""
    files = hashlib.sha256(describe_data(config).encode()).hexdigest()
    return f"settings {config.numbers()}, files {files[:16]}, features {features}"


def _state_name(config: ProbeConfig, source: FeatureSource | AnticipationFeatures) -> str:
    return f"{TASK}_{config.name or config.data.name}_{source.name}.pt"


def evaluate(
    source: FeatureSource | AnticipationFeatures,
    config: ProbeConfig,
    *,
    world: World = ALONE,
    about: str = "",
) -> list[Number]:
    """`attentive_RECIPE`: the value of the head chosen on held-out training data; its other numbers; the maxima.

    `..._max_over_heads` is the best head on validation after the last epoch; `..._max_over_heads_and_epochs`, what the
    papers report, the best of every validated epoch, where `schedule.val_every` asks for more than the last.
    """
    return scores_of(run(source, config, world=world, about=about), config)


def scores_of(result: ProbeResult, config: ProbeConfig) -> list[Number]:
    """The chosen head's numbers, the headline under the task's own name; then the maxima over heads, and epochs."""
    name, seed, headline = f"{TASK}_{config.name or config.data.name}", config.seed, result.headline
    values = result.values[result.choice.index]
    found = [Number(name, PROBE, headline, seed, values[headline])]
    found += [Number(f"{name}_{each}", PROBE, each, seed, value) for each, value in values.items() if each != headline]
    if len(result.grid.heads) > 1:
        found.append(Number(f"{name}_{MAX_OVER_HEADS}", PROBE, headline, seed, result.choice.max_over_heads))
    if config.schedule.val_every is not None:
        found.append(Number(f"{name}_{OVER_EPOCHS}", PROBE, headline, seed, result.best_of_epochs))
    return found
