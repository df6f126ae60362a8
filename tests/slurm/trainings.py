"""Real trainings of the debug recipe on the private cluster, and what became of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.segments import Segment, read_segments
from launch.slurm_submit import read_jobs
from launch.submit import main as submit
from tests.slurm.conftest import wait_until


@dataclass
class Training:
    """A run of four ranks on two nodes, as its user finds it."""

    folder: Path
    job: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []  # the last one may be half written
        return [json.loads(line) for line in lines]

    @property
    def losses(self) -> list[tuple[int, float]]:
        return [(row["step"], row["loss"]) for row in self.rows]

    @property
    def step(self) -> int:
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def segments(self) -> list[Segment]:
        return read_segments(self.folder / "job", self.job)

    @property
    def said(self) -> str:
        """Everything that the job's script and its ranks have said."""
        logs = [self.folder / "job" / f"{self.job}.out", *sorted((self.folder / "job" / self.job).glob("*.out"))]
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in logs if log.is_file())

    def starts(self) -> int:
        """How many times rank 0 has come to train."""
        return self.said.count("resumed from step ")

    def wait_for_steps(self, start: int, seconds: float = 120.0) -> None:
        """Until the start numbered so (0: the first) has logged a step."""
        wait_until(lambda: self.starts() > start, lambda: f"no start {start}: {self.said}", seconds)
        first = self.step
        wait_until(lambda: self.step > first, lambda: f"no step after {first}: {self.said}", seconds)


def train(folder: Path, shards: Path, *arguments: str, partition: str = "low") -> Training:
    """Submit a run through the command that people use."""
    sources = [f"data.{modality}.sources.debug.path={shards}" for modality in ("video", "image")]
    cluster = ["--cluster", "slurm", "--profile", "private_test", "--partition", partition]
    settings = [f"run_dir={folder}", "prepare.debug=none", "report=false", *sources, *arguments]
    assert submit(["--recipe", "debug", *cluster, *settings]) == 0
    return Training(folder, read_jobs(folder)[-1]["job"])
