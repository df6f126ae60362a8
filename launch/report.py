"""The page about a run that one shows to colleagues: curves, health, what the encoder sees, and what it was.

    python -m launch.report RUN_DIR

Writes RUN_DIR/report/index.html, one file that needs nothing else, and its pictures beside it as PNG. Whatever the run
did not leave behind is left out, and said.
"""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from data_pipeline.decode import DecodeError
from data_pipeline.shards import ShardError, Shards
from evals.visualize import read_clip, visualize_clip
from launch.config import RunConfig, load_for_resume
from launch.report_figures import diagnostics_figure, loss_figure, schedule_figure, throughput_figure
from launch.report_page import page
from vjepa.config import build_models
from vjepa.hub import from_pretrained
from vjepa.nn.encoder import Encoder
from vjepa.registry import create_encoder
from vjepa.train.diagnostics import METRIC_KEY, CollapseAlarms
from vjepa.train.run_dir import RunDir

NUM_CLIPS = 3
LOOKED_AT = 36  # records among which clips of different videos are looked for
MIN_PATCHES = 14  # along a side of the pictures: a model trained on fewer is shown larger clips
CHEAP_PARAMETERS = 100_000_000  # up to this size the untrained encoder is shown beside the trained one


class ReportError(ValueError):
    """A run directory that no report can be made of; the message names the file and what to do."""


@dataclass(frozen=True)
class Run:
    """What a run left in its directory."""

    folder: Path
    config: RunConfig
    rows: list[dict[str, Any]]
    summary: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def export(self) -> Path:
        return self.folder / "exports" / self.config.stage


def build_report(run_dir: Path) -> Path:
    """Write the report of a run; the path of its page."""
    run = read_run(run_dir)
    out = run_dir / "report"
    out.mkdir(exist_ok=True)
    figures = {
        "loss": loss_figure(run.rows),
        "diagnostics": diagnostics_figure(run.rows, run.config.train.alarms),
        "throughput": throughput_figure(run.rows),
        "schedules": schedule_figure(run.rows),
    }
    images = {name: _save(figure, out / f"{name}.png") for name, figure in figures.items() if figure is not None}
    pictures, notes = _pca_figures(run)
    html = page(
        title=run.folder.resolve().name,
        subtitle=f"{run.config.recipe} / {run.config.stage}",
        tiles=_tiles(run),
        alarms=_alarms(run),
        figures=images,
        pictures={caption: _save(figure, out / f"pca_{i}.png") for i, (caption, figure) in enumerate(pictures.items())},
        notes=notes,
        evals=list(run.summary.get("evals", [])),
        facts=_facts(run),
        config=(run_dir / "config.yaml").read_text(),
    )
    path = out / "index.html"
    path.write_text(html)
    return path


def read_run(run_dir: Path) -> Run:
    """Read a run directory; config.yaml and metrics.jsonl must be there, summary and environment may be missing."""
    files = RunDir(run_dir)
    for path in (files.config, files.metrics):
        if not path.is_file():
            raise ReportError(f"{path} does not exist: give the directory of a run that has logged its first step")
    return Run(
        folder=run_dir,
        config=load_for_resume(files.config, []),
        rows=_read_rows(files.metrics),
        summary=_read_json(run_dir / "summary.json"),
        environment=_read_json(run_dir / "environment.json"),
    )


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line without its end is still being written (or was torn by a kill)."""
    lines = path.read_text().split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ReportError(f"{path}, line {number} is not JSON ({error}): --resume the run to cut it") from error
    if not rows:
        raise ReportError(f"{path} holds no complete row yet: wait for the first logged step")
    return rows


def _read_json(path: Path) -> Mapping[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _tiles(run: Run) -> dict[str, str]:
    """The figures at the top of the page."""
    encoder, predictor = build_models(run.config.model, run.config.predictor, seed=0, device=torch.device("meta"))
    stage = run.summary.get("stages", {}).get(run.config.stage, {})
    tiles = {
        "steps": f"{run.rows[-1]['step']:,} of {run.config.train.steps:,}",
        "training time": _duration(stage["seconds"]) if "seconds" in stage else "not finished",
        "last loss": f"{run.rows[-1]['loss']:.4f}",
        "encoder parameters": f"{_count(encoder):,}",
        "predictor parameters": f"{_count(predictor):,}",
    }
    speeds = [row["clips_per_second"] for row in run.rows if "clips_per_second" in row]
    if speeds:
        tiles["clips per second (median)"] = f"{statistics.median(speeds):.1f}"
    tiles["bad samples replaced"] = f"{_count_lines(RunDir(run.folder).bad_samples):,}"
    return tiles


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _count_lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.is_file() else 0


def _alarms(run: Run) -> list[str]:
    """The alarms the run raised, found again from its rows: the first of each series."""
    watch = CollapseAlarms(run.config.train.alarms)
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
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


# ------------------------------------------------------------------------------------------- what the encoder sees


def _pca_figures(run: Run) -> tuple[dict[str, Figure], list[str]]:
    """A picture per clip with the exported encoder's features, and a note for each that could not be made."""
    if not (run.export / "config.json").is_file():
        return {}, [f"no pictures of features: the run has not exported an encoder to {run.export} yet"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoders: dict[str, Encoder] = {"trained": from_pretrained(run.export, device=device)}
    if _count(encoders["trained"]) <= CHEAP_PARAMETERS:
        untrained = create_encoder(encoders["trained"].config, seed=run.config.train.seed, device=device)
        encoders["untrained"] = untrained.eval()
    try:
        clips, notes = _clips(run.config)
    except ShardError as error:
        return {}, [f"no pictures of features: {error}"]
    return {caption: visualize_clip(clip, encoders) for caption, clip in clips.items()}, notes


def _clips(config: RunConfig) -> tuple[dict[str, Tensor], list[str]]:
    """A few clips of the run's video shards, of different videos where there are some, as uint8 [C, T, H, W]."""
    sources = [(name, Shards(source.path, "video")) for name, source in config.data.video.sources.items()]
    records = [(name, shards, index) for name, shards in sources for index in _of_different_videos(shards)]
    geometry = config.data.video.clip
    size = geometry.size * -(-MIN_PATCHES * config.model.patch_size // geometry.size)
    clips: dict[str, Tensor] = {}
    notes = [] if records else ["no pictures of features: the run has no video source"]
    for name, shards, index in [records[i] for i in _spread(len(records), NUM_CLIPS)]:
        data, row = shards.read(index)
        caption = f"{name} / {row['key']} at {size} px (trained at {geometry.size})"
        try:
            clips[caption] = read_clip(data, "video", frames=geometry.frames, fps=geometry.fps, size=size, position=0.5)
        except DecodeError as error:
            notes.append(f"no picture of {caption}: {error}")
    return clips, notes


def _of_different_videos(shards: Shards) -> list[int]:
    """Up to NUM_CLIPS records out of a few dozen, evenly spaced, each cut from another video as far as possible."""
    candidates = _spread(len(shards), LOOKED_AT)
    first_of: dict[str, int] = {}
    for index in candidates:
        first_of.setdefault(shards.row(index)["source_path"], index)
    firsts = list(first_of.values())
    if len(firsts) >= NUM_CLIPS:
        return [firsts[i] for i in _spread(len(firsts), NUM_CLIPS)]
    return sorted([*firsts, *(index for index in candidates if index not in firsts)][:NUM_CLIPS])


def _spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` indices, evenly spaced in range(count)."""
    wanted = min(wanted, count)
    return [count * (2 * i + 1) // (2 * wanted) for i in range(wanted)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="directory of a run, for example runs/demo")
    try:
        print(f"wrote {build_report(parser.parse_args(arguments).run_dir)}")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
