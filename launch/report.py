"""The report of a run, or of a chain: the pages of its stages, and one on which they stand beside each other.

    python -m launch.report FOLDER

Writes FOLDER/report/index.html, and in a chain FOLDER/STAGE/report/index.html too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evals.protocol import RGB, RGB_DIFFERENCE, Row
from evals.results import read_summary_rows
from launch.chain import ChainRequest
from launch.report_page import chain_page
from launch.report_run import Run, read_run
from launch.report_single import build_report, duration, encoder_parameters
from vjepa.train.run_dir import RunDir


def build_reports(folder: Path) -> Path:
    """The report of a run; of a chain's folder those of its stages, and the page of all. The path of the page."""
    if not ChainRequest.is_in(folder):
        return build_report(folder)
    request = ChainRequest.read(folder)
    runs = {stage: read_run(folder / stage) for stage in request.trainings if _has_rows(folder / stage)}
    links = {stage: Path("..") / build_report(run.folder).relative_to(folder) for stage, run in runs.items()}
    html = chain_page(
        title=folder.resolve().name,
        subtitle=f"{request.recipe}: {', '.join(request.stages)}",
        stages=[_facts(stage, run) for stage, run in runs.items()],
        links={stage: str(link) for stage, link in links.items()},
        evals=_in_order(read_summary_rows(folder), request.trainings),
    )
    path = folder / "report" / "index.html"
    path.parent.mkdir(exist_ok=True)
    path.write_text(html)
    return path


def _has_rows(run: Path) -> bool:
    """Whether a run has logged a step: a stage of none, or one that is starting, has no page."""
    metrics = RunDir(run).metrics
    return metrics.is_file() and b"\n" in metrics.read_bytes()


def _in_order(rows: Sequence[Row], stages: Sequence[str]) -> list[Row]:
    """Rows of finished trainings, stage after stage; pixels, which no training changes, of one stage."""
    known = [row for row in rows if row.step is None and row.stage in stages]
    known.sort(key=lambda row: stages.index(row.stage))
    pixels = {(row.task, row.model): row.stage for row in reversed(known) if row.model in (RGB, RGB_DIFFERENCE)}
    return [row for row in known if pixels.get((row.task, row.model), row.stage) == row.stage]


def _facts(stage: str, run: Run) -> dict[str, str]:
    """A stage in one line."""
    clip, figures, objective = run.config.data.video.clip, run.summary.get("stages", {}), run.config.objective
    done = figures.get(stage, {})
    return {
        "stage": stage,
        "encoder": f"{encoder_parameters(run.config):,}",
        "target": objective.target + (f" ({objective.teacher.path})" if objective.teacher.path else ""),
        "starts from": run.config.init_from or "its seed",
        "frames": str(clip.frames),
        "pixels": str(clip.size),
        "steps": f"{run.rows[-1]['step']:,} of {run.config.train.steps:,}",
        "time": duration(done["seconds"]) if "seconds" in done else "not finished",
        "last loss": f"{run.rows[-1]['loss']:.4f}",
        "last learning rate": f"{run.rows[-1]['lr']:.2e}",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="directory of a run or of a chain, for example runs/demo")
    try:
        print(f"wrote {build_reports(parser.parse_args(arguments).folder)}")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
