"""How the ranks of a SLURM job find each other: over a port that is free, in a time that is stated, by name.

A port derived from the job's number may be taken on the first node, and two jobs of one node may derive the same. So
rank 0 binds whichever port the kernel gives, keeps it, and writes it into a file of the run's folder; the others poll
for the file. CUDA_VISIBLE_DEVICES stays as SLURM set it: rank L of a node takes its device number L.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from launch.job_order import restart_count, write_whole
from launch.scheduler import SchedulerError, host_names

if TYPE_CHECKING:  # torch is imported when the signal handlers are in place
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

POLL_S = 0.1
CONNECT_S = 5.0
ALL_HERE = "all here"


class RendezvousError(RuntimeError):
    """Ranks that did not come in time, by number and node."""


@dataclass(frozen=True)
class Place:
    """This process among the ranks of its job."""

    job: str
    restart: int
    rank: int
    size: int
    local_rank: int
    node: str

    @classmethod
    def of_slurm(cls, environment: Mapping[str, str] = os.environ) -> Place:
        """As srun has told it."""
        return cls(
            job=environment["SLURM_JOB_ID"],
            restart=restart_count(),
            rank=int(environment["SLURM_PROCID"]),
            size=int(environment["SLURM_NTASKS"]),
            local_rank=int(environment["SLURM_LOCALID"]),
            node=environment.get("SLURMD_NODENAME") or socket.gethostname(),
        )

    def export(self) -> None:
        """Say it in torchrun's words, which the trainer reads."""
        os.environ |= {"RANK": str(self.rank), "WORLD_SIZE": str(self.size), "LOCAL_RANK": str(self.local_rank)}


def meet(folder: Path, place: Place, *, seconds: float) -> Store | None:
    """A store that all ranks are connected to, for `init_process_group`; None for a single rank.

    Rank 0 writes FOLDER/JOB_RESTART.json. Raises RendezvousError, on all that have come, where one has not come within
    `seconds`.
    """
    if place.size == 1:
        return None
    file = folder / f"{place.job}_{place.restart}.json"
    deadline = time.monotonic() + seconds
    store = _host(file, place, seconds) if place.rank == 0 else _join(file, place, deadline, seconds)
    store.set(f"here/{place.rank}", place.node)
    if place.rank == 0:
        store.set("verdict", _wait_for_all(store, place, deadline, seconds))
    # The others wait a little longer than rank 0, so that its words reach them.
    store.wait(["verdict"], timedelta(seconds=max(deadline - time.monotonic(), 0) + CONNECT_S))
    if (verdict := store.get("verdict").decode()) != ALL_HERE:
        raise RendezvousError(verdict)
    return store


def _host(file: Path, place: Place, seconds: float) -> Store:
    """Rank 0: the store behind a port that the kernel gives, and the file that says which."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    listener = socket.create_server(("", 0), backlog=max(128, place.size))
    port = listener.getsockname()[1]
    store = TCPStore(
        "localhost",
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=seconds),
        master_listen_fd=listener.detach(),  # kept from now on: nobody can take the port in between
    )
    hosts = list(dict.fromkeys([place.node, socket.gethostname(), socket.getfqdn()]))
    write_whole(file, json.dumps({"hosts": hosts, "port": port, "node": place.node}) + "\n")
    return store


def _join(file: Path, place: Place, deadline: float, seconds: float) -> Store:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    host, port = _address(file, place, deadline, seconds)
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds))


def _address(file: Path, place: Place, deadline: float, seconds: float) -> tuple[str, int]:
    """Where rank 0 listens: the first of its names that answers."""
    problem = f"it wrote no {file}"
    while time.monotonic() < deadline:
        try:
            found = json.loads(file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            time.sleep(POLL_S)
            continue
        for host in found["hosts"]:
            try:
                socket.create_connection((host, found["port"]), timeout=CONNECT_S).close()
                return host, found["port"]
            except OSError as error:
                problem = f"{host}:{found['port']}: {error}"
        time.sleep(POLL_S)
    raise RendezvousError(
        f"rank {place.rank} on {place.node} did not reach rank 0 within {seconds:g} s: {problem}. Is the run directory "
        "on a file system that all nodes share, and may they connect to each other?"
    )


def _wait_for_all(store: Store, place: Place, deadline: float, seconds: float) -> str:
    """ALL_HERE, or who has not come."""
    while not store.check([f"here/{rank}" for rank in range(place.size)]):
        if time.monotonic() > deadline:
            absent = [rank for rank in range(place.size) if not store.check([f"here/{rank}"])]
            return _absence(absent, place.size, seconds)
        time.sleep(POLL_S)
    return ALL_HERE


def _absence(absent: list[int], size: int, seconds: float) -> str:
    nodes = nodes_of_ranks()
    names = ", ".join(f"rank {rank} on {nodes.get(rank, 'a node unknown')}" for rank in absent[:8])
    more = f" and {len(absent) - 8} more" if len(absent) > 8 else ""
    return f"{names}{more} did not come within {seconds:g} s; {size - len(absent)} of {size} ranks did"


def nodes_of_ranks(environment: Mapping[str, str] = os.environ) -> dict[int, str]:
    """Rank -> node of this step, in the block order that the job script asks for; empty outside of SLURM."""
    try:
        names = host_names(environment["SLURM_STEP_NODELIST"])
        counts = task_counts(environment["SLURM_STEP_TASKS_PER_NODE"])
    except (KeyError, SchedulerError):
        return {}
    nodes = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
    return dict(enumerate(nodes))


def task_counts(text: str) -> list[int]:
    """SLURM's short writing, 2(x3),1 -> 2, 2, 2, 1."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"{text!r} is not SLURM's way to write tasks per node")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts
