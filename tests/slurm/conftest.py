"""A real SLURM cluster on this machine, for one test session: several nodes, accounting, everything in one folder.

Marker `slurm`: needs the cluster. Marker `slurm_long` beside it: waits for time limits, preemption or dead nodes, and
is left out of `make test`; `make test-slurm` runs all. Where SLURM's programs are not installed the tests skip by name,
and fail where SLURM_REQUIRED is set, as `make test-slurm` does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import pytest

SCRIPTS = Path(__file__).parent / "private"
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "slurmdbd", "mariadbd", "mariadb-install-db")
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
SETTLED_S = 1.5  # NODE_FAIL shows for a moment before the requeue
POLL_S = 0.2
PATIENCE_S = 400.0  # what takes a second may take minutes where others use the machine; only a failure waits so long
T = TypeVar("T")


def command(*arguments: str | Path, check: bool = True) -> str:
    """What a program prints; stdin is empty."""
    done = subprocess.run(arguments, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.stdout.strip()


def wait_until(look: Callable[[], T], what: Callable[[], object] | str, seconds: float = PATIENCE_S) -> T:
    """The first true answer of `look`; TimeoutError with `what` where there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := look():
            return answer
        time.sleep(POLL_S)
    raise TimeoutError(f"after {seconds:g} s: {what() if callable(what) else what}")


class PrivateCluster:
    """The cluster and what tests ask of it; `up` again with other options changes a live one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment: dict[str, str] = {}

    def up(self, *options: str) -> None:
        names = "host" if os.getuid() == 0 else "ip"
        fixed = ("--dir", str(self.folder), "--acct", "dbd", "--names", names)
        done = subprocess.run(
            [SCRIPTS / "up.sh", *fixed, *options], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        if done.returncode:
            raise RuntimeError(f"the private cluster did not start: {done.stderr}")
        self.environment = {"SLURM_CONF": str(self.folder / "conf" / "slurm.conf")}

    def down(self) -> None:
        command(SCRIPTS / "down.sh", "--dir", self.folder, "--wipe", check=False)

    def crash(self, node: str) -> None:
        """Kill a node's daemon and all that runs there; `up` brings it back."""
        command(SCRIPTS / "crash-node.sh", self.folder, node)

    @property
    def nodes(self) -> list[str]:
        return command("scontrol", "show", "hostnames", command("sinfo", "-h", "-p", "low", "-o", "%N")).split()

    def states(self, job: str) -> list[str]:
        """Of the job, or of each element of an array."""
        return command("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T", check=False).split()

    def wait(self, job: str, states: Sequence[str], seconds: float = PATIENCE_S) -> None:
        """Until the job (all its elements) is in one of the states."""

        def is_there() -> bool:
            found = self.states(job)
            return bool(found) and set(found) <= set(states)

        wait_until(is_there, lambda: f"job {job} is {self.states(job)}, not {states}", seconds)

    def over(self, job: str, seconds: float = PATIENCE_S) -> list[str]:
        """The last states; a job that is requeued after NODE_FAIL or PREEMPTED is not over."""
        since: float | None = None
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            states = self.states(job)
            if not states or not set(states) <= OVER:
                since = None
            elif since is None:
                since = time.monotonic()
            elif time.monotonic() - since > SETTLED_S:
                return states
            time.sleep(POLL_S)
        raise TimeoutError(f"job {job} is still {self.states(job)} after {seconds:g} s")

    def clear(self) -> None:
        """Cancel everything and wait until it is gone."""
        command("scancel", "--me", check=False)
        wait_until(lambda: not command("squeue", "-h", check=False), "jobs are left after scancel")


def _give_up(why: str) -> NoReturn:
    text = f"no private SLURM: {why}"
    pytest.fail(text) if os.environ.get("SLURM_REQUIRED") else pytest.skip(text)


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[PrivateCluster]:
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        _give_up(f"{', '.join(missing)} not installed (`make setup` as root installs them through apt)")
    cluster = PrivateCluster(Path(tempfile.mkdtemp(prefix="slurm-")))
    before = os.environ.get("SLURM_CONF")
    try:
        try:
            cluster.up()
        except RuntimeError as error:
            _give_up(str(error))
        os.environ |= cluster.environment
        yield cluster
    finally:
        cluster.down()
        os.environ.pop("SLURM_CONF", None)
        if before is not None:
            os.environ["SLURM_CONF"] = before


@pytest.fixture
def cluster(running_cluster: PrivateCluster) -> Iterator[PrivateCluster]:
    """Two nodes with four processors each, empty before and after; partitions `low` (preempted) and `high`."""
    yield running_cluster
    running_cluster.clear()
