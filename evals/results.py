"""Where scores go: RUN/evals/results.jsonl, RUN/summary.json, and a table with every row, also those that lose."""

from __future__ import annotations

import fcntl
import json
import logging
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from evals.protocol import MODELS, TRAINED, UNTRAINED, Row
from evals.whole_files import whole_file, writing

RESULTS, SUMMARY = Path("evals") / "results.jsonl", "summary.json"
SETTINGS = Path("evals") / "settings"  # RUN/evals/settings/DIGEST.json: what the rows of a digest were measured with
PICTURES = "pictures"  # RUN/pictures/EVALUATION/MODEL/*.png


log = logging.getLogger(__name__)


class ResultsError(ValueError):
    """A file of results cannot be read; the message says which and what to do."""


def save(run: Path | str, rows: Sequence[Row]) -> None:
    """Append rows to the run's results and merge them into its summary."""
    append_results(run, rows)
    merge_summary(run, rows)


def append_results(run: Path | str, rows: Sequence[Row]) -> Path:
    """Add rows to RUN/evals/results.jsonl, which keeps every measurement: all of them arrive, or none."""
    path = Path(run) / RESULTS
    with _locked(path):
        before = "".join(f"{line}\n" for line in whole_lines(path))
        write_whole(path, before + "".join(json.dumps(row.to_json()) + "\n" for row in rows))
    return path


def whole_lines(path: Path) -> list[str]:
    """The lines of a results file, [] where there is none; a last one that is torn is left out, and the log has it.

    We write the file whole: torn lines come from copies that were cut off, and a row that is lost is measured again.
    """
    text = path.read_text() if path.is_file() else ""
    lines = text.splitlines()
    if lines and not text.endswith("\n") and not _is_json(lines[-1]):
        log.warning("%s: its last line is torn and is left out: %s", path, lines.pop())
    return lines


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def merge_summary(run: Path | str, rows: Sequence[Row]) -> Path:
    """Put rows into RUN/summary.json; one that was there with the same identity is replaced.

    Those of finished stages lie under `evals`, those with a step, the points of training curves, under `curve`.
    Whatever else the summary holds stays as it is; without a summary, one with rows alone is written.
    """
    path = Path(run) / SUMMARY

    def merge(summary: dict[str, Any]) -> None:
        merged = {row.identity: row for row in [*_rows_of(summary, path), *rows]}.values()
        summary["evals"] = [row.to_json() for row in merged if row.step is None]
        if any(row.step is not None for row in merged):
            summary["curve"] = [row.to_json() for row in merged if row.step is not None]

    return update_summary(run, merge)


def update_summary(run: Path | str, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change what RUN/summary.json holds; one process at a time: evaluations may end while a training does."""
    path = Path(run) / SUMMARY
    with _locked(path):
        summary = _read_summary(path)
        change(summary)
        write_whole(path, json.dumps(summary, indent=2) + "\n")
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time reads a file and writes it again: evaluations may share a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def read_summary_rows(run: Path | str) -> list[Row]:
    """The rows in RUN/summary.json, those of finished stages first."""
    path = Path(run) / SUMMARY
    return _rows_of(_read_summary(path), path)


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise ResultsError(f"{path} is not JSON ({error}): move it away and run again") from error


def _rows_of(summary: Mapping[str, Any], path: Path) -> list[Row]:
    try:
        return [Row(**entry) for name in ("evals", "curve") for entry in summary.get(name, [])]
    except TypeError as error:
        raise ResultsError(
            f"{path}: an entry of `evals` or `curve` is none of this version ({error}): move it away"
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all; OSError with its name and what to do where the disk is full."""
    with writing(path), whole_file(path) as file:
        file.write(text.encode())


# ------------------------------------------------------------------------------------------------------- the table


Values = dict[int | None, list[float]]


def summarise(rows: Iterable[Row]) -> dict[str, dict[str, list[float]]]:
    """Task -> model -> the values whose mean and spread are shown; rows with a step are left out.

    One value for each training where there are several (the mean over its probes), else one for each probe.
    """
    grouped: dict[str, dict[str, Values]] = {}
    for row in rows:
        if row.step is None:
            by_training = grouped.setdefault(row.task, {}).setdefault(row.model, {})
            by_training.setdefault(row.training_seed, []).append(row.value)
    return {
        task: {model: _one_each(by_training) for model, by_training in by_model.items()}
        for task, by_model in grouped.items()
    }


def _one_each(by_training: Values) -> list[float]:
    """The mean of each training; of a single one all its values."""
    values = list(by_training.values())
    return values[0] if len(values) == 1 else [statistics.fmean(each) for each in values]


def num_trainings(rows: Iterable[Row]) -> int:
    """How many trainings, of one stage, the rows come from."""
    return len({row.training_seed for row in rows if row.training_seed is not None and row.step is None}) or 1


def curve(rows: Sequence[Row]) -> dict[str, dict[int | None, list[float]]]:
    """Task -> step -> values of the trained encoder; step 0 is the untrained one, None the end of the training.

    {} where no row has a step.
    """
    points = {row.step for row in rows if row.step is not None}  # only the trained encoder has them
    if not points:
        return {}
    at_ends = summarise(rows)
    found: dict[str, dict[int | None, list[float]]] = {}
    for task, by_model in at_ends.items():
        found[task] = {0: by_model[UNTRAINED]} if UNTRAINED in by_model else {}
        for step in sorted(points):
            here = summarise(replace(row, step=None) for row in rows if (row.task, row.step) == (task, step))
            if task in here:
                found[task][step] = here[task][TRAINED]
        if TRAINED in by_model:
            found[task][None] = by_model[TRAINED]
    return found


def format_cell(values: Sequence[float]) -> str:
    """Mean and, from two values on, the sample standard deviation: `0.963 ± 0.017`."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def ahead_of(rows: Sequence[Row], measured: str = TRAINED) -> dict[str, list[str]]:
    """Model -> the tasks in which its mean is as good as that of the model `measured` or better."""
    is_higher_better = {row.task: row.higher_is_better for row in rows}
    found: dict[str, list[str]] = {}
    for task, by_model in summarise(rows).items():
        sign = 1 if is_higher_better[task] else -1
        means = {model: sign * statistics.fmean(values) for model, values in by_model.items()}
        for model in means:
            if model != measured and measured in means and means[model] >= means[measured]:
                found.setdefault(model, []).append(task)
    return found


def beside_each_other(rows: Sequence[Row]) -> list[Row]:
    """Rows of several stages for one table, without those of checkpoints.

    Each stage's encoder gets its stage's name for a column, an untrained one of a later stage `untrained STAGE`.
    """
    rows = [row for row in rows if row.step is None]
    first = rows[0].stage if rows else ""

    def column(row: Row) -> str:
        if row.model == TRAINED:
            return row.stage
        return f"{UNTRAINED} {row.stage}" if row.model == UNTRAINED and row.stage != first else row.model

    return [replace(row, model=column(row)) for row in rows]


def not_ahead(rows: Sequence[Row]) -> list[str]:
    """A line for each stage and each of its rivals that it is not ahead of: the stage before it and the references."""
    stages = list(dict.fromkeys(row.stage for row in rows))
    table, lines = beside_each_other(rows), []
    for before, stage in zip(["", *stages[:-1]], stages, strict=True):
        rivals = {name: tasks for name, tasks in ahead_of(table, stage).items() if name == before or name not in stages}
        lines += [
            f"{name} is as good as {stage} or better in: {', '.join(tasks)}"
            for name, tasks in rivals.items()
            if not name.startswith(f"{UNTRAINED} ") or name == f"{UNTRAINED} {stage}"
        ]
    return lines


def columns(rows: Iterable[Row]) -> list[str]:
    """The models of a table: the trained one, those with names of their own as they come, the references."""
    present = list(dict.fromkeys(row.model for row in rows))
    named = [name for name in present if name not in MODELS]
    return [
        *(name for name in MODELS[:1] if name in present),
        *named,
        *(name for name in MODELS[1:] if name in present),
    ]


def results_table(rows: Sequence[Row], *, title: str = "") -> Table:
    """All rows: a line per task, in the order they were measured, and a column per model."""
    metrics = {row.task: row.metric for row in rows}
    models = columns(rows)
    table = Table(title=title or None, box=SIMPLE_HEAD, title_justify="left")
    for name in ("task", "metric"):
        table.add_column(name, no_wrap=True)
    for name in models:
        table.add_column(name, justify="right", no_wrap=True)
    for task, by_model in summarise(rows).items():
        cells = [format_cell(by_model[name]) if name in by_model else "" for name in models]
        table.add_row(task, metrics[task], *cells)
    return table


def curve_table(rows: Sequence[Row], *, total_steps: int, title: str = "") -> Table:
    """A line per task, a column per step at which the encoder was measured, as a share of the training."""
    found = curve(rows)
    steps: dict[int | None, None] = dict.fromkeys(step for by_step in found.values() for step in by_step)
    ordered = sorted(steps, key=lambda step: total_steps if step is None else step)
    table = Table(title=title or None, box=SIMPLE_HEAD, title_justify="left")
    table.add_column("task", no_wrap=True)
    for step in ordered:
        table.add_column(
            "100 %" if step is None else f"{100 * step / total_steps:.0f} %", justify="right", no_wrap=True
        )
    for task, by_step in found.items():
        table.add_row(task, *(format_cell(by_step[step]) if step in by_step else "" for step in ordered))
    return table


def print_curve(rows: Sequence[Row], *, total_steps: int, of: str = "", console: Console | None = None) -> None:
    """The table on the way through the training (`of` a stage); nothing where no checkpoint was measured."""
    title = f"The encoder on its way{f' through {of}' if of else ''}, by share of the training"
    table = curve_table(rows, total_steps=total_steps, title=title)
    if table.row_count:
        print_wide(table, console or Console())


def print_table(rows: Sequence[Row], *, title: str = "", console: Console | None = None) -> None:
    """Print the table and where the trained encoder is beaten; wider than a narrow terminal rather than cut short.

    Of several stages each is a column, beside the one before it.
    """
    console = console or Console()
    is_chain = len({row.stage for row in rows}) > 1
    print_wide(results_table(beside_each_other(rows) if is_chain else rows, title=title), console)
    trainings = num_trainings(rows)
    over = f"{trainings} trainings" if trainings > 1 else "the seeds of the probes, one training"
    console.print(
        f"Mean ± standard deviation over {over}. rgb: the pixels and the position of each token;", soft_wrap=True
    )
    console.print(
        "rgb_difference: the same and the change inside each tubelet, a reference made by hand.", soft_wrap=True
    )
    for line in not_ahead(rows) if is_chain else not_ahead_of_trained(rows):
        console.print(line, soft_wrap=True)


def not_ahead_of_trained(rows: Sequence[Row]) -> list[str]:
    """A line for each model that is as good as the trained one in something."""
    found = ahead_of(rows).items()
    return [f"{model} is as good as {TRAINED} or better in: {', '.join(tasks)}" for model, tasks in found]


def print_wide(table: Table, console: Console) -> None:
    """A table at its full width, also where the terminal is narrower."""
    unbounded = console.options.update(max_width=1000)
    console.width = max(console.width, console.measure(table, options=unbounded).maximum)
    console.print(table)
