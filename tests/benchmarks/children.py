"""What a loader's worker processes cost, seen from the process that started them: /proc, so any kind of worker."""

import os
import time
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


def children(parent: int | None = None) -> list[int]:
    """The processes below this one (or `parent`) that are alive, grandchildren among them."""
    below: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))) and fields[0] != "Z":
            below.setdefault(int(fields[1]), []).append(int(entry.name))
    found, queue = [], [parent or os.getpid()]
    while queue:
        new = below.get(queue.pop(), [])
        found += new
        queue += new
    return sorted(found)


def cpu_seconds(process: int) -> float:
    """User and system time of a process, all its threads; 10 ms resolution."""
    fields = _stat(process)
    return (int(fields[11]) + int(fields[12])) / _TICK if fields else 0.0


def age(process: int) -> float:
    """Seconds since a process was started; 10 ms resolution."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(_stat(process)[19]) / _TICK


def pss(process: int) -> int:
    """Proportional set size in bytes: a page that n processes map counts 1/n; 0 for a process that is gone."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def _stat(process: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; none where it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
