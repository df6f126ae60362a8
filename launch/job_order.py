"""What one stage of a run is to do as a SLURM job, in a file that the ranks and the supervisor read without torch.

ROOT/job/ holds for each stage: STAGE.json (this), STAGE.yaml (the resolved configuration), STAGE.sbatch (the script),
STAGE.pkl (what submitit starts); and for all of them jobs.jsonl, code/TIME (snapshots), JOB/ (logs), rendezvous/.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class JobOrder:
    """One stage as a job; the same file serves every start of it."""

    root: str  # folder of the run, or of the chain: its `job` folder has the records; absolute
    run_dir: str  # where this stage trains: root, or ROOT/STAGE in a chain of several trainings; absolute
    stage: str
    recipe: str
    snapshot: str  # the code that runs; absolute
    code_hash: str  # of the snapshot (launch.snapshot.hash_code)
    profile: str  # name of the cluster profile
    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    max_restarts: int  # of one job, for whatever reason
    max_crashes: int  # failures in a row without a newer checkpoint
    rendezvous_s: float  # within which all ranks must have come
    signal_delay_s: int  # before the time limit, SIGUSR2
    cpus_per_task: int = 1  # as asked for

    @property
    def folder(self) -> Path:
        return job_folder(self.root)

    def file(self, ending: str) -> Path:
        """STAGE.json, STAGE.yaml, STAGE.sbatch or STAGE.pkl."""
        return self.folder / f"{self.stage}.{ending}"

    @property
    def world(self) -> int:
        return self.nodes * self.tasks_per_node

    def row(self) -> dict[str, Any]:
        """What jobs.jsonl says of a job of this order."""
        return {
            "stage": self.stage,
            "script": str(self.file("sbatch")),
            "snapshot": self.snapshot,
            "run_dir": self.run_dir,
            "profile": self.profile,
            "nodes": self.nodes,
            "tasks_per_node": self.tasks_per_node,
            "gpus_per_node": self.gpus_per_node,
            "cpus_per_task": self.cpus_per_task,
            "signal_delay_s": self.signal_delay_s,
            "array": None,
        }

    def write(self) -> None:
        write_whole(self.file("json"), json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path | str) -> JobOrder:
        return cls(**json.loads(Path(path).read_text()))


def job_folder(root: Path | str) -> Path:
    return Path(root) / "job"


def note_job(root: Path | str, row: Mapping[str, Any], job: str, after: str | None) -> None:
    """One line of ROOT/job/jobs.jsonl, for `status` and everything that looks for a run's jobs."""
    line = dict(row) | {"job": job, "after": after, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}
    with (job_folder(root) / "jobs.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def read_jobs(root: Path | str) -> list[dict[str, Any]]:
    """The rows of ROOT/job/jobs.jsonl, oldest first; none for a local run."""
    path = job_folder(root) / "jobs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def write_whole(path: Path, text: str) -> None:
    """Write a small file whole or not at all, also where several processes write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def restart_count() -> int:
    """How many times SLURM has started this job before."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))
