"""What a run left behind, read for its report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.protocol import Row
from evals.results import read_summary_rows
from launch.config import RunConfig, load_for_resume
from vjepa.train.run_dir import RunDir


class ReportError(ValueError):
    """A run directory that no report can be made of; the message names the file and what to do."""


@dataclass(frozen=True)
class Run:
    """What a run left in its directory."""

    folder: Path
    config: RunConfig
    rows: list[dict[str, Any]]
    evals: list[Row] = field(default_factory=list)
    summary: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def export(self) -> Path:
        return self.folder / "exports" / self.config.stage


def read_run(run_dir: Path) -> Run:
    """Read a run directory; config.yaml and metrics.jsonl must be there, summary and environment may be missing."""
    files = RunDir(run_dir)
    for path in (files.config, files.metrics):
        if not path.is_file():
            raise ReportError(f"{path} does not exist: give the directory of a run that has logged its first step")
    config = load_for_resume(files.config, [])
    summary = config.summary_folder(run_dir)
    rows = read_summary_rows(summary)
    return Run(
        folder=run_dir,
        config=config,
        rows=_read_rows(files.metrics),
        evals=[row for row in rows if row.stage == config.stage] if config.in_chain else rows,
        summary=_read_json(summary / "summary.json"),
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
