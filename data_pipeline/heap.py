"""Memory that decoders have freed goes back to the system; without this a worker's heap grows for thousands of clips.

Frames of differently large videos lie in glibc's heap between small blocks that live longer, so what is freed stays
(figures: README.md, goal 2). Mapping each large block by itself (M_MMAP_THRESHOLD) keeps the heap small too, but
touching fresh pages then cost 8 ms of CPU a clip.
"""

import ctypes
import sys
import threading
import time

_PAUSE = 5.0  # seconds; a hundred clips and more


def give_back_freed_memory() -> None:
    """Start a thread that returns free pages of this process's heap every few seconds (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        threading.Thread(target=_work, args=(trim,), daemon=True).start()


def _work(trim: "ctypes._FuncPointer") -> None:  # pyright: ignore[reportPrivateUsage]
    while True:
        time.sleep(_PAUSE)
        trim(0)
