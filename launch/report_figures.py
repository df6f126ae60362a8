"""The curves of a run's report, drawn from its logged rows and its evaluations; what a run did not log is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vjepa.train.diagnostics import METRIC_KEY, AlarmConfig

Rows = Sequence[Mapping[str, Any]]
INK, FAINT = "#3a3f47", "#d9dde3"
COLOURS = {"video": "#2563a8", "image": "#d07a1f", "": "#3a3f47"}
LEVEL_COLOURS = ("#9bc2e6", "#4f93ce", "#2563a8", "#0f3566")  # shallow to deep
DIAGNOSTICS = {
    "feature_std": "feature std",
    "mean_cosine": "mean cosine",
    "rankme": "RankMe",
    "target_prediction_cosine": "cosine target / prediction",
    "cross_sample_gap": "cross-sample gap",
}


def loss_figure(rows: Rows) -> Figure | None:
    """The total loss and each of its terms, video and image apart."""
    terms = sorted({key.split("/")[1] for key in _keys(rows) if key.startswith("loss/")})
    panels = {"total loss": {"": "loss"}} if "loss" in _keys(rows) else {}
    for term in terms:
        panels[term.replace("_", " ")] = _by_modality(rows, f"loss/{term}")
    return _panels(rows, panels)


def schedule_figure(rows: Rows) -> Figure | None:
    """Learning rate, momentum and the other functions of the step."""
    singles = [key for key in ("lr", "weight_decay", "momentum") if key in _keys(rows)]
    panels = {key.replace("_", " "): {"": key} for key in singles}
    for term in sorted({key.split("/")[1] for key in _keys(rows) if key.startswith("weight/")}):
        panels[f"weight of {term.replace('_', ' ')}"] = _by_modality(rows, f"weight/{term}")
    return _panels(rows, panels, smooth=False)


def throughput_figure(rows: Rows) -> Figure | None:
    """Clips and operations per second, the share of time spent waiting for data, and the time of a step."""
    names = {
        "clips_per_second": "clips per second",
        "tflops_per_second": "TFLOP per second",
        "mfu": "MFU",
        "data_wait": "share of time waiting for data",
        "step_seconds": "seconds per step",
    }
    return _panels(rows, {title: {"": key} for key, title in names.items() if key in _keys(rows)}, floor=0)


def diagnostics_figure(rows: Rows, alarms: AlarmConfig) -> Figure | None:
    """A row per modality, a column per measure of collapse, a line per level; dotted: a bound that raises an alarm."""
    found = [match for key in _keys(rows) if (match := METRIC_KEY.fullmatch(key)) and match["level"]]
    modalities = [name for name in COLOURS if any(match["modality"] == name for match in found)]
    metrics = [name for name in DIAGNOSTICS if any(match["metric"] == name for match in found)]
    if not modalities or not metrics:
        return None
    levels = sorted({int(match["level"]) for match in found})
    colours = dict(zip(levels, _level_colours(len(levels)), strict=True))
    figure, table = _canvas(len(modalities), len(metrics), width=2.7, height=2.3)
    for modality, line in zip(modalities, table, strict=True):
        for metric, axes in zip(metrics, line, strict=True):
            _panel(axes, f"{modality}: {DIAGNOSTICS[metric]}")
            for level, colour in colours.items():
                steps, values = series(rows, f"diag/{modality}/level{level}/{metric}")
                if len(steps):
                    marker = "o" if len(steps) < 30 else ""
                    axes.plot(steps, values, color=colour, lw=1.5, marker=marker, ms=2.5, label=f"block {level}")
            _bound(axes, metric, alarms)
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    handles, labels = table[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8, frameon=False, fontsize=8)
    return figure


def learning_figure(
    curves: Mapping[str, Mapping[int, Sequence[float]]], references: Mapping[str, float], metrics: Mapping[str, str]
) -> Figure | None:
    """A panel per task: the trained encoder's mean at every step with its spread, and `rgb` as a dashed line.

    curves: task -> step -> values; references: task -> mean of `rgb`; metrics: task -> what is measured.
    """
    if not curves:
        return None
    figure, table = _canvas(1, len(curves), width=2.7, height=2.4)
    for (task, points), axes in zip(curves.items(), table[0], strict=True):
        _panel(axes, f"{task.replace('_', ' ')} ({metrics[task]})")
        steps = sorted(points)
        values = [np.array(points[step]) for step in steps]
        means = np.array([each.mean() for each in values])
        spread = np.array([each.std(ddof=1) if len(each) > 1 else 0.0 for each in values])
        axes.fill_between(steps, means - spread, means + spread, color=COLOURS["video"], alpha=0.18, lw=0)
        axes.plot(steps, means, color=COLOURS["video"], lw=1.6, marker="o", ms=3.5, label="trained")
        if task in references:
            axes.axhline(references[task], color=COLOURS["image"], lw=1.2, ls="--", label="rgb")
        axes.margins(y=0.12)
    handles = {
        label: handle for axes in table[0] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def series(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have `key`."""
    pairs = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def smoothed(values: np.ndarray, *, windows: int = 30) -> np.ndarray:
    """A centred running mean over about 1/`windows` of the curve; the window shrinks at both ends."""
    half = len(values) // (2 * windows)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _keys(rows: Rows) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _by_modality(rows: Rows, prefix: str) -> dict[str, str]:
    """Modality -> key of the curves under `prefix`; the sum only where nothing finer was logged."""
    fine = {name: f"{prefix}/{name}" for name in COLOURS if name and f"{prefix}/{name}" in _keys(rows)}
    return fine or {"": prefix}


def _panels(
    rows: Rows, panels: Mapping[str, Mapping[str, str]], *, smooth: bool = True, floor: float | None = None
) -> Figure | None:
    """One panel per title, one curve per key."""
    if not panels:
        return None
    figure, table = _canvas(1, len(panels), width=3.6, height=2.5)
    for (title, keys), axes in zip(panels.items(), table[0], strict=True):
        _panel(axes, title)
        for modality, key in keys.items():
            _curve(axes, *series(rows, key), colour=COLOURS[modality], label=modality, smooth=smooth)
        if any(keys):
            axes.legend(frameon=False, fontsize=8)
        if floor is not None:
            axes.set_ylim(bottom=floor)
    return figure


def _curve(axes: Axes, steps: np.ndarray, values: np.ndarray, *, colour: str, label: str, smooth: bool) -> None:
    if smooth and len(values) > 60:
        axes.plot(steps, values, color=colour, lw=0.6, alpha=0.25)
        values = smoothed(values)
    axes.plot(steps, values, color=colour, lw=1.6, label=label)


def _bound(axes: Axes, metric: str, alarms: AlarmConfig) -> None:
    """The alarm's fixed bound as a dotted line; the relative ones move with the curve and are not drawn."""
    fixed = {
        "mean_cosine": alarms.max_mean_cosine,
        "rankme": alarms.min_rankme,
        "cross_sample_gap": alarms.min_cross_sample_gap,
    }
    if metric in fixed:
        axes.axhline(fixed[metric], color="#c0392b", lw=0.9, ls=":")


def _canvas(lines: int, columns: int, *, width: float, height: float) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width * columns, height * lines), dpi=120, facecolor="white", layout="constrained")
    return figure, figure.subplots(lines, columns, squeeze=False)


def _panel(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    axes.tick_params(labelsize=8, colors=INK, length=2)
    axes.grid(color=FAINT, lw=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.set_xlabel("step", fontsize=8, color=INK)


def _level_colours(count: int) -> list[str]:
    return [LEVEL_COLOURS[round(i * (len(LEVEL_COLOURS) - 1) / max(1, count - 1))] for i in range(count)]
