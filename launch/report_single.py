"""The page about a run that one shows to colleagues: what it has learned, its curves and health, what it sees.

RUN_DIR/report/index.html is one file that needs nothing else; its pictures lie beside it as PNG. Whatever the run did
not leave behind is left out, and said.
"""

from __future__ import annotations

import base64
import statistics
from pathlib import Path

import torch
from matplotlib.figure import Figure

from evals.protocol import RGB
from evals.results import RESULTS, curve, summarise
from launch.config import RunConfig
from launch.report_figures import (
    diagnostics_figure,
    learning_figure,
    loss_figure,
    schedule_figure,
    throughput_figure,
)
from launch.report_page import page
from launch.report_pictures import pca_figures
from launch.report_run import Run, read_run
from vjepa.objectives import build_objective
from vjepa.objectives.terms import term_kinds
from vjepa.registry import create_encoder
from vjepa.train.diagnostics import METRIC_KEY, CollapseAlarms
from vjepa.train.remedies import prevention
from vjepa.train.run_dir import RunDir

CURVE_TASKS = ("motion", "motion_msm", "motion_knn", "segmentation", "direction_segmentation")


def build_report(run_dir: Path) -> Path:
    """Write the report of a run; the path of its page."""
    run = read_run(run_dir)
    out = run_dir / "report"
    out.mkdir(exist_ok=True)
    figures = {
        "learning": _learning_figure(run),
        "loss": loss_figure(run.rows),
        "diagnostics": diagnostics_figure(run.rows, run.config.train.alarms),
        "throughput": throughput_figure(run.rows),
        "schedules": schedule_figure(run.rows),
    }
    images = {name: _save(figure, out / f"{name}.png") for name, figure in figures.items() if figure is not None}
    pictures, notes = pca_figures(run)
    html = page(
        title=run.folder.resolve().name,
        subtitle=f"{run.config.recipe} / {run.config.stage}",
        tiles=_tiles(run),
        alarms=_alarms(run),
        figures=images,
        pictures={caption: _save(figure, out / f"pca_{i}.png") for i, (caption, figure) in enumerate(pictures.items())},
        notes=notes,
        evals=run.evals,
        predictions={path.stem.replace("_", " "): _data_url(path) for path in _evaluation_pictures(run)},
        facts=_facts(run),
        config=(run_dir / "config.yaml").read_text(),
    )
    path = out / "index.html"
    path.write_text(html)
    return path


def _tiles(run: Run) -> dict[str, str]:
    """The figures at the top of the page."""
    config = run.config
    objective = build_objective(config.objective, config.model, config.predictor, seed=0, device="meta")
    stage = run.summary.get("stages", {}).get(run.config.stage, {})
    tiles = {
        "steps": f"{run.rows[-1]['step']:,} of {run.config.train.steps:,}",
        "training time": duration(stage["seconds"]) if "seconds" in stage else "not finished",
        "last loss": f"{run.rows[-1]['loss']:.4f}",
        "encoder parameters": f"{_count(objective.encoder):,}",
    }
    if objective.predictor is not None:
        tiles["predictor parameters"] = f"{_count(objective.predictor):,}"
    speeds = [row["clips_per_second"] for row in run.rows if "clips_per_second" in row]
    if speeds:
        tiles["clips per second (median)"] = f"{statistics.median(speeds):.1f}"
    tiles["bad samples replaced"] = f"{_count_lines(RunDir(run.folder).bad_samples):,}"
    return tiles


def encoder_parameters(config: RunConfig) -> int:
    """Of the encoder that a run trains."""
    return _count(create_encoder(config.model.encoder_config(), device="meta"))


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def duration(seconds: float) -> str:
    """In hours, minutes and seconds."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _count_lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.is_file() else 0


def _alarms(run: Run) -> list[str]:
    """The alarms the run raised, found again from its rows: the first of each series."""
    objective = run.config.objective
    watch = CollapseAlarms(run.config.train.alarms, prevention(objective.target, term_kinds(objective.terms)))
    standing: dict[str, str] = {}
    texts = []
    for row in run.rows:
        if any(METRIC_KEY.fullmatch(key) for key in row):
            alarms = watch.observe_named(row["step"], row)
            texts += [f"step {row['step']}: {text}" for name, text in alarms.items() if name not in standing]
            standing = alarms
    return texts


def _facts(run: Run) -> dict[str, str]:
    """What the run depended on besides its configuration."""
    environment = run.environment
    facts = {name: str(version) for name, version in environment.get("packages", {}).items()}
    facts |= {name: str(environment[name]) for name in ("python", "platform", "cpu_count") if name in environment}
    if "devices" in environment:
        facts["devices"] = ", ".join(environment["devices"])
    if environment.get("git_sha"):
        facts["git commit"] = environment["git_sha"] + (" with local changes" if environment.get("git_diff") else "")
    command = run.folder / "command.txt"
    if command.is_file():
        facts["command"] = command.read_text().strip()
    return facts


def _save(figure: Figure, path: Path) -> str:
    """Write the picture and give it as a data URL."""
    figure.savefig(path)
    return _data_url(path)


def _data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


# ------------------------------------------------------------------------------------------------- what it has learned


def _learning_figure(run: Run) -> Figure | None:
    """The chosen tasks over the training steps of this stage; None where no checkpoint was evaluated."""
    rows = [row for row in run.evals if row.stage == run.config.stage]
    found, finished = curve(rows), summarise(rows)
    curves = {
        task: {run.config.train.steps if step is None else step: values for step, values in found[task].items()}
        for task in CURVE_TASKS
        if task in found
    }
    references = {task: statistics.fmean(finished[task][RGB]) for task in curves if RGB in finished[task]}
    return learning_figure(curves, references, {row.task: row.metric for row in rows})


def _evaluation_pictures(run: Run) -> list[Path]:
    """Pictures that evaluations left in RUN/evals."""
    return sorted((run.folder / RESULTS.parent).glob("*.png"))
