"""Real trainings of the debug recipe on the private cluster, and what became of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.job_order import read_jobs
from launch.segments import Segment, read_begin, read_segments
from launch.submit import main as submit
from tests.slurm.conftest import PATIENCE_S, wait_until


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

    def wait_for_steps(self, start: int, seconds: float = PATIENCE_S) -> None:
        """Until the start numbered so (0: the first) has logged a step of its own."""
        wait_until(lambda: self._has_stepped(start), lambda: f"no step of start {start}: {self.said}", seconds)

    def _has_stepped(self, start: int) -> bool:
        begin, first_step = read_begin(self.folder / "job", self.job, start)
        metrics = self.folder / "metrics.jsonl"
        if begin is None or first_step is None or not metrics.is_file():
            return False
        return metrics.stat().st_mtime > begin and self.step > first_step  # a resume cuts the file back first


def train(
    folder: Path, shards: Path, *arguments: str, partition: str = "low", profile: str = "private_test"
) -> Training:
    """Submit a run through the command that people use."""
    sources = [f"data.{modality}.sources.debug.path={shards}" for modality in ("video", "image")]
    cluster = ["--cluster", "slurm", "--profile", profile, "--partition", partition]
    settings = [f"run_dir={folder}", "prepare.debug=none", "report=false", *sources, *arguments]
    assert submit(["--recipe", "debug", *cluster, *settings]) == 0
    return Training(folder, read_jobs(folder)[-1]["job"])


def ranks_of(job: str) -> dict[int, int]:
    """Rank -> process id of what a job's step has started on this machine."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if not folder.name.isdigit() or b"submitit.core._submit" not in (folder / "cmdline").read_bytes():
                continue
            words = dict(word.split("=", 1) for word in (folder / "environ").read_text().split("\0") if "=" in word)
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if words.get("SLURM_JOB_ID") == job and b"slurmstepd" in Path(f"/proc/{parent}/cmdline").read_bytes():
                found[int(words["SLURM_PROCID"])] = int(folder.name)
        except (OSError, KeyError):
            continue  # it has ended, or is another user's
    return found
