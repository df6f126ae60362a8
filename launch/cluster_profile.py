"""What a cluster gives a job: its partition, shape, limits and set-up, from a small file or the command line.

Files lie in launch/clusters/NAME.yaml or anywhere; example_gpu.yaml explains every key. A flag of the command
(`--nodes 4`) is worth more than the file.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vjepa.config import ConfigError, read_recipe, resolve

CLUSTERS = Path(__file__).parent / "clusters"
DEFAULT_PROFILE = "example_gpu"  # where SLURM is asked for and no profile is named
VARIABLE = "VJEPA_CLUSTER"
LEAST_SIGNAL_DELAY_S = 60  # SLURM looks at time limits about every 30 s and may be a minute early
OURS = {  # sbatch options that the job script stands on
    *("array", "chdir", "dependency", "error", "kill-on-invalid-dep", "no-requeue", "ntasks", "open-mode", "output"),
    *("requeue", "signal", "test-only", "wait", "wrap"),
}
FLAGS = {  # command line -> key, and what it says
    "nodes": ("nodes", "how many nodes"),
    "tasks-per-node": ("tasks_per_node", "ranks on each node; the number of its GPUs where not said"),
    "gpus-per-node": ("gpus_per_node", "GPUs on each node"),
    "cpus-per-task": ("cpus_per_task", "processors for each rank"),
    "mem": ("mem_gb", "GB of memory on each node"),
    "partition": ("partition", "SLURM partition"),
    "account": ("account", "SLURM account"),
    "qos": ("qos", "SLURM quality of service"),
    "constraint": ("constraint", "features that nodes must have"),
    "nodelist": ("nodelist", "nodes to be used"),
    "exclude": ("exclude", "nodes to be avoided"),
    "reservation": ("reservation", "SLURM reservation"),
}


@dataclass
class OneProcess:
    """What a job asks for that is one process on one node. A key that is null is a training's."""

    gpus: int = 0  # at most so many: none where the trainings have none
    cpus: int | None = None  # null: those of one rank
    mem_gb: float | None = None  # null: one rank's share of its node
    time_min: int | None = None
    partition: str | None = None

    def __post_init__(self) -> None:
        least = {"gpus": 0, "cpus": 1, "mem_gb": 0.001, "time_min": 1}
        _check_counts({name: getattr(self, name) for name in least}, least)


@dataclass
class ClusterProfile:
    """One cluster, as a job of ours sees it. A key that is null is left to the site's defaults."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None  # features that nodes must have, as sbatch writes them: a100&ib
    reservation: str | None = None
    nodelist: str | None = None  # nodes to be used
    exclude: str | None = None  # nodes to be avoided
    nodes: int = 1
    tasks_per_node: int | None = None  # ranks; null: one for each GPU, one without GPUs
    gpus_per_node: int = 0
    cpus_per_task: int | None = None  # processors of a rank, data workers included
    mem_gb: float | None = None  # of each node
    time_min: int = 60  # limit of one segment: the run saves before it and comes back
    signal_delay_s: int = 180  # SIGUSR2 so long before the limit: 60 s, the slowest step, and a save
    comment: str | None = None  # for the site's accounting
    python: str | None = None  # command that starts Python on a node; null: the one that submits
    setup: list[str] = field(default_factory=list)  # shell lines before the ranks start; one that fails ends the job
    srun_args: list[str] = field(default_factory=list)  # for srun, such as --container-image=...
    environment: dict[str, str] = field(default_factory=dict)  # variables of the job
    data: dict[str, dict[str, str]] = field(default_factory=dict)  # MODALITY: {SOURCE: path of shards}
    evals: OneProcess = field(default_factory=lambda: OneProcess(gpus=1))  # evaluations; the judging of a sweep
    tools: OneProcess = field(default_factory=OneProcess)  # parts of a data preparation, and their join
    rendezvous_s: float = 300.0  # within which every rank must have come
    max_restarts: int = 100  # of one job, for whatever reason: time limits, preemptions, failures
    max_crashes: int = 3  # failures in a row without a newer checkpoint
    extra: dict[str, str | None] = field(default_factory=dict)  # further sbatch options; null: a flag without a value

    def __post_init__(self) -> None:
        least = {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": 0, "cpus_per_task": 1, "time_min": 1}
        least |= {"mem_gb": 0.001, "rendezvous_s": 1, "max_restarts": 0, "max_crashes": 1}
        _check_counts({name: getattr(self, name) for name in least}, least)
        if self.signal_delay_s < LEAST_SIGNAL_DELAY_S:
            raise ValueError(
                f"signal_delay_s={self.signal_delay_s} must be at least {LEAST_SIGNAL_DELAY_S}: SLURM may be a minute "
                "early or late, and a step and a save must fit in"
            )
        for modality in self.data:
            if modality not in ("video", "image"):
                raise ValueError(f"data.{modality} is unknown: paths are given as data.video.NAME and data.image.NAME")
        for name in self.extra:
            if name.replace("_", "-").lstrip("-") in OURS:
                raise ValueError(f"extra.{name} is set by the job script itself: leave it out")

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def world(self) -> int:
        return self.nodes * self.ranks_per_node

    def of_one_process(self, share: OneProcess) -> ClusterProfile:
        """The profile of a job that is one process; a whole node (`exclusive`) is not for it."""
        rank_gb = None if self.mem_gb is None else self.mem_gb / self.ranks_per_node
        return replace(
            self,
            nodes=1,
            tasks_per_node=1,
            gpus_per_node=min(share.gpus, self.gpus_per_node),
            cpus_per_task=share.cpus or self.cpus_per_task,
            mem_gb=share.mem_gb or rank_gb,
            time_min=share.time_min or self.time_min,
            partition=share.partition or self.partition,
            extra={name: value for name, value in self.extra.items() if name.lstrip("-") != "exclusive"},
        )


def _check_counts(values: Mapping[str, float | None], least: Mapping[str, float]) -> None:
    for name, value in values.items():
        if value is not None and value < least[name]:
            raise ValueError(f"{name}={value} must be at least {least[name]}")


def load_profile(name: str, overrides: Sequence[str] = ()) -> ClusterProfile:
    """The profile of a file or of a name under launch/clusters; ConfigError for unknown keys and bad values."""
    try:
        return resolve(ClusterProfile, [read_recipe(profile_path(name))], overrides)
    except ConfigError as error:
        raise ConfigError(f"cluster profile {name}: {error}") from error


def profile_path(name: str) -> Path:
    """The file of a profile; what does not exist is refused by name."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(name).expanduser()
    path = CLUSTERS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(found.stem for found in CLUSTERS.glob("*.yaml"))
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"there is no cluster profile {name!r}.{hint} Known: {', '.join(known)}; or name a file")
    return path


def named_profile(asked: str | None) -> tuple[str | None, str]:
    """The profile that was named, and by what."""
    if asked is not None:
        return asked, "--profile"
    name = os.environ.get(VARIABLE) or None
    return name, f"${VARIABLE}" if name else "none is named"


def add_profile_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say where on a cluster, and how much of it."""
    group = parser.add_argument_group("on SLURM; what is given here is worth more than the profile's file")
    group.add_argument("--profile", metavar="NAME|FILE", help=f"cluster profile (or ${VARIABLE}): launch/clusters/")
    group.add_argument("--time", metavar="MIN|[D-]HH:MM:SS", help="time limit of one segment")
    for flag, (key, words) in FLAGS.items():
        group.add_argument(f"--{flag}", dest=f"cluster_{key}", metavar=flag.split("-")[0].upper(), help=words)


def profile_overrides(arguments: argparse.Namespace) -> list[str]:
    """The flags that were given, as overrides of the profile."""
    values = {key: getattr(arguments, f"cluster_{key}") for key, _ in FLAGS.values()}
    if arguments.time is not None:
        values["time_min"] = minutes(arguments.time)
    given = {key: value for key, value in values.items() if value is not None}
    return [f"{key}={value}" for key, value in given.items()]


def minutes(text: str) -> int:
    """SLURM's ways to write a time limit, in whole minutes, rounded up: 90, 1:30:00, 2-12, 2-00:30:00, 45:30."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ConfigError(f"--time {text} is no time limit: write minutes, HH:MM:SS or D-HH:MM:SS")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:  # D-HH, D-HH:MM, D-HH:MM:SS
        hours, least, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, least, seconds = numbers
    else:  # MM, MM:SS
        hours, (least, seconds) = 0, (*numbers, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60) + least + (seconds > 0)


def data_overrides(profile: ClusterProfile, missing: Iterable[str]) -> list[str]:
    """The profile's paths for those of the modalities that have no source, as overrides of a run."""
    return [
        f"data.{modality}.sources.{name}.path={path}"
        for modality in missing
        for name, path in profile.data.get(modality, {}).items()
    ]


def describe_profile(profile: ClusterProfile) -> str:
    """Its shape in words."""
    gpus = f" with {profile.gpus_per_node} GPUs each" if profile.gpus_per_node else ""
    return f"{profile.nodes} node(s){gpus}, {profile.world} rank(s)"
