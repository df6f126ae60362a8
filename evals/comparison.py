"""Several models by several evaluations: one after the other, each kept when it is done, and one table of all.

An evaluation of a model is known by a digest of its weights, the recipe and the files it is measured on: what is among
the results already is not measured again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from evals.cache import CLIPS_VERSION
from evals.evaluations import Entrant, Evaluation
from evals.floors import Floor
from evals.models import Model
from evals.protocol import DoesNotFit, NotThere, Row, Unsuited
from evals.published import published_for, published_table
from evals.results import (
    RESULTS,
    SETTINGS,
    ResultsError,
    merge_summary,
    not_ahead_of_trained,
    print_wide,
    read_summary_rows,
    results_table,
    save,
    whole_lines,
    write_whole,
)
from vjepa.train.distributed import ALONE, World

NUMBERS_VERSION = 1  # of the code that measures: raised when a recipe gives other numbers, for rows are kept by it


class SetsMissing(ValueError):
    """Sets that were asked for are not there; the message names all of them and how they should lie."""


@dataclass
class Comparison:
    """What was measured, and what was not, with the reason."""

    rows: list[Row] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Evaluation -> what was looked for."""
    unsuited: list[str] = field(default_factory=list)
    """Evaluations that make no sense for a model."""


def open_sets(
    evaluations: Sequence[Evaluation], world: World = ALONE
) -> tuple[list[tuple[Evaluation, str]], dict[str, str]]:
    """The evaluations whose sets are there, with what these hold, and for the others what was looked for.

    As the main rank sees it: all ranks then do the same.
    """
    there: list[tuple[Evaluation, str]] = []
    missing: dict[str, str] = {}
    for evaluation in evaluations:
        files, reason = world.on_main(partial(_look, evaluation))
        if reason:
            missing[evaluation.name] = reason
        else:
            there.append((evaluation, files))
    return there, missing


def _look(evaluation: Evaluation) -> tuple[str, str]:
    """What the set holds, or why it is not there."""
    try:
        return evaluation.open(), ""
    except NotThere as error:
        return "", str(error)


def listing_of(missing: dict[str, str]) -> str:
    return "\n".join(f"- {name}: {reason.removeprefix(f'{name}: ')}" for name, reason in missing.items())


def compare(
    evaluations: Sequence[Evaluation],
    models: Sequence[Model],
    out: Path,
    *,
    stage: str,
    world: World = ALONE,
    skip_missing: bool = False,
    again: bool = False,
    say: Callable[[str], None] = print,
) -> Comparison:
    """Measure every model by every evaluation, and its floors; rows go to OUT as soon as an evaluation of one is done.

    Ranks call this together, on models of their own device; the main rank decides what was done before and writes.
    Raises SetsMissing before anything is measured, unless `skip_missing`; nothing is left to measure without a set.
    """
    there, missing = open_sets(evaluations, world)
    if missing and (not skip_missing or not there):
        hint = "" if skip_missing else "\nWith --skip-missing the others are run."
        raise SetsMissing(f"{len(missing)} of {len(evaluations)} sets are missing:\n{listing_of(missing)}{hint}")
    found, done = Comparison(missing=missing), {} if again else world.on_main(lambda: rows_by_digest(out))
    entries = list(_entries(there, models))
    digests = [world.on_main(partial(digest_of, *entry)) for entry in entries]
    left_out = rehearse([entry for entry, digest in zip(entries, digests, strict=True) if digest not in done])
    for place, ((evaluation, _, model), digest) in enumerate(zip(entries, digests, strict=True), start=1):
        label = f"[{place}/{len(entries)}] {evaluation.name}, {evaluation.column(model)}"
        if digest in done:
            found.rows += done[digest]
            world.on_main(partial(_complete_summary, out, done[digest]))
            say(f"{label}: done before, {_headline(done[digest])}")
            continue
        try:
            if reason := left_out.get((evaluation.name, model.name)):
                raise reason
            rows, seconds = _measure(evaluation, model, out, stage, world, digest)
        except Unsuited as reason:
            found.unsuited.append(f"{evaluation.name}, {model.name}: {reason}")
            say(f"{label}: left out, {reason}")
            continue
        except ValueError as error:
            raise ValueError(f"{evaluation.name}, {evaluation.column(model)}: {error}") from error
        found.rows += rows
        say(f"{label}: {_headline(rows)}, {seconds:.0f} s")
    return found


def rehearse(entries: Iterable[tuple[Evaluation, str, Entrant]]) -> dict[tuple[str, str], Unsuited]:
    """Whether every model can take what an evaluation shows it, before hours are spent: (evaluation, model) -> why not.

    Raises ValueError where a setting does not fit any of the models: then it is the setting's fault.
    """
    left_out: dict[tuple[str, str], Unsuited] = {}
    is_fitting: dict[str, bool] = {}
    for evaluation, _, model in entries:
        if isinstance(model, Floor):
            continue
        try:
            evaluation.rehearse(model)
            is_fitting[evaluation.name] = True
        except Unsuited as reason:
            left_out[evaluation.name, model.name] = reason
            is_fitting.setdefault(evaluation.name, not isinstance(reason, DoesNotFit))
        except ValueError as error:
            raise ValueError(f"{evaluation.name}, {evaluation.column(model)}: {error}") from error
    for (name, model), reason in left_out.items():
        if not is_fitting[name]:
            raise ValueError(f"{name}, {model}: {reason}") from reason
    return left_out


def _entries(
    there: Sequence[tuple[Evaluation, str]], models: Sequence[Model]
) -> Iterator[tuple[Evaluation, str, Entrant]]:
    """Evaluation by evaluation, what it holds, and who is measured: the models, then its floors."""
    for evaluation, data in there:
        floors = [Floor(name, models[0].patch_size) for name in evaluation.floors]
        for model in [*models, *floors]:
            yield evaluation, data, model


def _measure(
    evaluation: Evaluation, model: Entrant, out: Path, stage: str, world: World, digest: str
) -> tuple[list[Row], float]:
    begin, name = time.monotonic(), evaluation.column(model)
    scores = evaluation.measure(model, out, world)
    seed = model.training_seed
    rows = [Row.of(each, stage=stage, model=name, training_seed=seed, digest=digest) for each in scores]
    world.on_main(lambda: _keep(out, rows, _settings(evaluation, model)))
    return rows, time.monotonic() - begin


def _settings(evaluation: Evaluation, model: Entrant) -> dict[str, Any]:
    """What stands behind a digest, for whoever reads the rows later."""
    return {
        "evaluation": evaluation.name,
        "model": evaluation.column(model),
        "weights": hashlib.sha256(model.identity.encode()).hexdigest()[:16],
        "recipe": asdict(evaluation.config),
    }


def _keep(out: Path, rows: Sequence[Row], settings: Mapping[str, Any]) -> None:
    """Save rows, and their settings as OUT/evals/settings/DIGEST.json.

    Where that fails the message has the rows: they may have taken days.
    """
    try:
        write_whole(out / SETTINGS / f"{rows[0].digest}.json", json.dumps(settings, indent=2) + "\n")
        save(out, rows)
    except OSError as error:
        lines = "\n".join(json.dumps(row.to_json()) for row in rows)
        raise ResultsError(f"{error}. What was measured, to be added to {out / RESULTS}:\n{lines}") from error


def _complete_summary(out: Path, rows: Sequence[Row]) -> None:
    """Put into the summary what a command that was killed after the results were written left out of it."""
    known = {row.identity for row in read_summary_rows(out)}
    if missing := [row for row in rows if row.identity not in known]:
        merge_summary(out, missing)


def _headline(rows: Sequence[Row]) -> str:
    return f"{rows[0].task} {rows[0].metric} {rows[0].value:.3f}"


# ------------------------------------------------------------------------------------------------------------- resume


def digest_of(evaluation: Evaluation, data: str, model: Entrant) -> str:
    """Of the weights, the recipe, the files, and the name the rows are kept under; and of the code, by its numbers."""
    parts = (
        NUMBERS_VERSION,
        CLIPS_VERSION,
        evaluation.name,
        evaluation.numbers(),
        data,
        model.identity,
        evaluation.column(model),
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def rows_by_digest(out: Path) -> dict[str, list[Row]]:
    """What OUT holds of earlier comparisons, the last measurement of each row; {} where there is nothing."""
    path = out / RESULTS
    found: dict[str, dict[tuple[object, ...], Row]] = {}
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            row = Row(**json.loads(line))
        except (TypeError, json.JSONDecodeError) as error:
            raise ResultsError(f"{path}, line {number} is no row of this version ({error}): move it away") from error
        if row.digest is not None:
            found.setdefault(row.digest, {})[row.identity] = row
    return {digest: list(rows.values()) for digest, rows in found.items()}


# ---------------------------------------------------------------------------------------------------------- the table


def print_comparison(found: Comparison, console: Console | None = None, *, title: str = "") -> None:
    """The rows; where a rival is ahead; published figures for the same tasks; and what was not measured."""
    console = console or Console()
    if found.rows:
        print_wide(results_table(found.rows, title=title), console)
        for line in not_ahead_of_trained(found.rows):
            console.print(line, soft_wrap=True)
    if figures := published_for(_tasks(found.rows)):
        print_wide(published_table(figures), console)
    for reason in found.unsuited:
        console.print(f"left out: {reason}", soft_wrap=True, markup=False)
    if found.missing:
        console.print(f"NOT measured, sets missing:\n{listing_of(found.missing)}", soft_wrap=True, markup=False)


def _tasks(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row.task for row in rows))
