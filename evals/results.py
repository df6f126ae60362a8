"""Where scores go: RUN/evals/results.jsonl, RUN/summary.json, and a table with every row, also those that lose."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from evals.protocol import MODELS, TRAINED, Row

RESULTS, SUMMARY = Path("evals") / "results.jsonl", "summary.json"


class ResultsError(ValueError):
    """A file of results cannot be read; the message says which and what to do."""


def save(run: Path | str, rows: Sequence[Row]) -> None:
    """Append rows to the run's results and merge them into its summary."""
    append_results(run, rows)
    merge_summary(run, rows)


def append_results(run: Path | str, rows: Sequence[Row]) -> Path:
    """Add rows to RUN/evals/results.jsonl, which keeps every measurement: all of them arrive, or none."""
    path = Path(run) / RESULTS
    before = path.read_text() if path.is_file() else ""
    _replace(path, before + "".join(json.dumps(row.to_json()) + "\n" for row in rows))
    return path


def merge_summary(run: Path | str, rows: Sequence[Row]) -> Path:
    """Put rows under `evals` of RUN/summary.json; one that was there with the same identity is replaced.

    Whatever else the summary holds stays as it is; without a summary, one with `evals` alone is written.
    """
    path = Path(run) / SUMMARY
    summary = _read_summary(path)
    merged = {row.identity: row for row in [*_rows_of(summary, path), *rows]}
    summary["evals"] = [row.to_json() for row in merged.values()]
    _replace(path, json.dumps(summary, indent=2) + "\n")
    return path


def read_summary_rows(run: Path | str) -> list[Row]:
    """The rows in RUN/summary.json."""
    path = Path(run) / SUMMARY
    return _rows_of(_read_summary(path), path)


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise ResultsError(f"{path} is not JSON ({error}): move it away and run again") from error


def _rows_of(summary: Mapping[str, Any], path: Path) -> list[Row]:
    try:
        return [Row(**entry) for entry in summary.get("evals", [])]
    except TypeError as error:
        raise ResultsError(f"{path}: an entry of `evals` is none of this version ({error}): move it away") from error


def _replace(path: Path, text: str) -> None:
    """Write a whole file beside its place and rename it: readers see the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


# ------------------------------------------------------------------------------------------------------- the table


def summarise(rows: Iterable[Row]) -> dict[str, dict[str, list[float]]]:
    """Task -> model -> its values over probe seeds (and training seeds), in the order the rows come in."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        found.setdefault(row.task, {}).setdefault(row.model, []).append(row.value)
    return found


def format_cell(values: Sequence[float]) -> str:
    """Mean and, from two values on, the sample standard deviation: `0.963 ± 0.017`."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def ahead_of_trained(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Model -> the tasks in which its mean is as good as the trained encoder's or better."""
    is_higher_better = {row.task: row.higher_is_better for row in rows}
    found: dict[str, list[str]] = {}
    for task, by_model in summarise(rows).items():
        sign = 1 if is_higher_better[task] else -1
        means = {model: sign * statistics.fmean(values) for model, values in by_model.items()}
        for model in means:
            if model != TRAINED and TRAINED in means and means[model] >= means[TRAINED]:
                found.setdefault(model, []).append(task)
    return found


def results_table(rows: Sequence[Row], *, title: str = "") -> Table:
    """All rows: a line per task, in the order they were measured, and a column per model."""
    metrics = {row.task: row.metric for row in rows}
    present = {row.model for row in rows}
    models = [name for name in MODELS if name in present] + sorted(present - set(MODELS))
    table = Table(title=title or None, box=SIMPLE_HEAD, title_justify="left")
    for name in ("task", "metric"):
        table.add_column(name, no_wrap=True)
    for name in models:
        table.add_column(name, justify="right", no_wrap=True)
    for task, by_model in summarise(rows).items():
        cells = [format_cell(by_model[name]) if name in by_model else "" for name in models]
        table.add_row(task, metrics[task], *cells)
    return table


def print_table(rows: Sequence[Row], *, title: str = "", console: Console | None = None) -> None:
    """Print the table and where the trained encoder is beaten; wider than a narrow terminal rather than cut short."""
    console = console or Console()
    table = results_table(rows, title=title)
    unbounded = console.options.update(max_width=1000)
    console.width = max(console.width, console.measure(table, options=unbounded).maximum)
    console.print(table)
    console.print(
        "Mean ± standard deviation over seeds. rgb: the pixels and the position of each token;", soft_wrap=True
    )
    console.print(
        "rgb_difference: the same and the change inside each tubelet, a reference made by hand.", soft_wrap=True
    )
    for model, tasks in ahead_of_trained(rows).items():
        console.print(f"{model} is as good as trained or better in: {', '.join(tasks)}", soft_wrap=True)
