"""The report of a run, or of a chain: the pages of its stages, and one on which they stand beside each other.

    python -m launch.report FOLDER

Writes FOLDER/report/index.html, and in a chain FOLDER/STAGE/report/index.html too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

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
    runs = {stage: read_run(folder / stage) for stage in request.trainings if RunDir(folder / stage).metrics.is_file()}
    links = {stage: Path("..") / build_report(run.folder).relative_to(folder) for stage, run in runs.items()}
    html = chain_page(
        title=folder.resolve().name,
        subtitle=f"{request.recipe}: {', '.join(request.stages)}",
        stages=[_facts(stage, run) for stage, run in runs.items()],
        links={stage: str(link) for stage, link in links.items()},
        evals=[row for row in read_summary_rows(folder) if row.step is None],
    )
    path = folder / "report" / "index.html"
    path.parent.mkdir(exist_ok=True)
    path.write_text(html)
    return path


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
