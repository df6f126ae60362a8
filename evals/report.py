"""A comparison as one HTML file that needs no other: rows, published figures, what was not measured, pictures."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from evals.comparison import Comparison
from evals.protocol import Row
from evals.published import published_for
from evals.results import PICTURES, columns, format_cell, summarise
from evals.whole_files import writing

REPORT = "report.html"
STYLE = """body{font:15px/1.5 system-ui,sans-serif;color:#1c1f24;max-width:72rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .8rem;border-bottom:1px solid #ddd;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}.published{color:#777}img{max-width:100%;margin:.3rem 0}
figure{margin:1rem 0}"""


def write_report(found: Comparison, out: Path, *, title: str) -> Path:
    """OUT/report.html, with the pictures that evaluations of these tasks left in OUT/pictures/NAME."""
    parts = [f"<h1>{html.escape(title)}</h1>", "<h2>Measured</h2>", _measured(found.rows)]
    if figures := published_for(row.task for row in found.rows):
        lines = [[f.task, f.metric, f.model, f"{f.value:.3f}", f.source] for f in figures]
        parts += [
            "<h2>Published, not measured here</h2>",
            _table(["task", "metric", "model", "published", "source"], lines, kind="published"),
        ]
    if found.missing or found.unsuited:
        reasons = [*found.unsuited, *(f"{name}: set missing. {reason}" for name, reason in found.missing.items())]
        parts += ["<h2>Not measured</h2><ul>", *(f"<li>{html.escape(each)}</li>" for each in reasons), "</ul>"]
    parts += _pictures(found.rows, out / PICTURES)
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    path = out / REPORT
    with writing(path):
        path.write_text(page + "\n".join(parts) + "\n")
    return path


def _measured(rows: Sequence[Row]) -> str:
    models = columns(rows)
    metrics = {row.task: row.metric for row in rows}
    lines = [
        [task, metrics[task], *(format_cell(by_model[name]) if name in by_model else "" for name in models)]
        for task, by_model in summarise(rows).items()
    ]
    return _table(["task", "metric", *models], lines)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], *, kind: str = "measured") -> str:
    def cell(text: str) -> str:
        is_number = text[:1].isdigit()
        return f"<td{' class=n' if is_number else ''}>{html.escape(text)}</td>"

    first = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    rest = "".join(f"<tr>{''.join(map(cell, line))}</tr>" for line in lines)
    return f"<table class={kind}><tr>{first}</tr>{rest}</table>"


def _pictures(rows: Sequence[Row], folder: Path) -> list[str]:
    """Those of evaluations and models that have rows here; what several models make of one thing comes together."""
    found: list[str] = []
    for name in sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []:
        models = {row.model for row in rows if row.task.endswith(f"_{name}")}
        shown = [path for path in (folder / name).glob("*/*.png") if path.parent.name in models]
        shown.sort(key=lambda path: (path.name, path.parent.name))
        if shown:
            found.append(f"<h2>{html.escape(name)}: pictures</h2>")
        for path in shown:
            data = base64.b64encode(path.read_bytes()).decode()
            label = html.escape(f"{path.parent.name}: {path.stem}")
            picture = f'<img alt="{label}" src="data:image/png;base64,{data}">'
            found.append(f"<figure><figcaption>{label}</figcaption>{picture}</figure>")
    return found
