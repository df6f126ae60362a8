"""How a loader's worker process behaves: one thread, deaf to the cluster's signals, gone when its parent is."""

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1
_number: int | None = None


def worker_number() -> int | None:
    """Which of its loader's workers this process is, from 0 on; None in a process that is none."""
    return _number


def start_worker(parent: int, number: int) -> None:
    """Called first in each worker; `parent` is the process id of the training process.

    SLURM sends SIGTERM and SIGUSR2 to every process of a job; the training process answers by saving a checkpoint and
    needs its workers until then. So a worker ignores them, except a SIGTERM sent by its own parent.
    """
    import torch  # not at the top: ingest counts its work, and does without torch

    global _number
    _number = number
    torch.set_num_threads(1)
    for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey, args=(parent,), daemon=True).start()
    _die_with(parent)


def _obey(parent: int) -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
            os._exit(0)


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when the training process is killed (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the request
            os._exit(1)
