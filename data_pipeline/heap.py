"""Memory that decoders have freed goes back to the system; without this a worker's heap grows for thousands of clips.

Frames of differently large videos lie in glibc's heap between small blocks that live longer, so what is freed stays
(figures: README.md, goal 2). Mapping each large block by itself (M_MMAP_THRESHOLD) keeps the heap small too, but
touching fresh pages then cost 8 ms of CPU a clip.
"""

import ctypes
import sys
from pathlib import Path

_SLACK = 64_000_000  # bytes; what is given back is touched anew, so not at every micro-batch


def private_bytes() -> int:
    """Memory of this process that is in no file and not shared by name; 0 where the kernel does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


class Heap:
    """This process's heap from now on (glibc only: elsewhere nothing is given back)."""

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
        if self._trim is not None:
            self._trim(0)  # a fork inherits what its parent has freed: given back later, it would hide growth
        self._first = self._low = private_bytes()

    def give_back(self) -> int:
        """Return free pages if memory has grown since they last were; bytes grown since the beginning, after that."""
        now = private_bytes()
        if self._trim is not None and now - self._low > _SLACK:
            self._trim(0)
            self._low = now = private_bytes()
        return now - self._first
