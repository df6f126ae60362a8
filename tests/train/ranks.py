"""Ranks without torchrun: forked from one process that has imported torch, which a launch would import three times."""

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from launch.train import main
from vjepa.train.distributed import leave_process

T = TypeVar("T")
PATIENCE_S = 600.0  # on a busy machine
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.train.ranks"])


class RankError(AssertionError):
    """A rank failed or never ended; the message is what all ranks printed."""


def on_ranks(size: int, action: Callable[..., T], *arguments: Any) -> list[T]:
    """What `action(*arguments)`, a module's function, returned on each of `size` ranks; no process is left behind.

    The ranks find what torchrun would tell them in their environment, and its store in this process.
    """
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        ranks: list[BaseProcess] = [
            CONTEXT.Process(target=_be_rank, args=(rank, size, store.port, out, action, arguments))
            for rank in range(size)
        ]
        for rank in ranks:
            rank.start()
        try:
            _await(ranks)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        if any(rank.exitcode for rank in ranks):
            raise RankError("\n".join(f"[{log.name}]\n{log.read_text()}" for log in sorted(out.glob("*.log"))))
        return [pickle.loads((out / f"rank{rank}.pickle").read_bytes()) for rank in range(size)]


def train_debug(run_dir: Path, shards: Path, *arguments: str) -> None:
    """One rank's `python -m launch.train --recipe debug` on shards that are there; its exit status must be 0."""
    sources = [f"data.{modality}.sources.debug.path={shards}" for modality in ("video", "image")]
    status = main(["--recipe", "debug", f"run_dir={run_dir}", "data.workers=0", *sources, *arguments])
    assert status == 0, f"exit status {status}"


def _await(ranks: Sequence[BaseProcess]) -> None:
    """Return when all have ended, one has failed, or patience is at its end."""
    deadline = time.monotonic() + PATIENCE_S
    living = list(ranks)
    while living and not any(rank.exitcode for rank in ranks) and time.monotonic() < deadline:
        wait([rank.sentinel for rank in living], timeout=1.0)
        living = [rank for rank in living if rank.exitcode is None]


def _be_rank(
    rank: int, size: int, port: int, out: Path, action: Callable[..., object], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    status = 1
    with (out / f"rank{rank}.log").open("w") as log, contextlib.suppress(BaseException):
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        try:
            (out / f"rank{rank}.pickle").write_bytes(pickle.dumps(action(*arguments)))
            status = 0
        except BaseException:
            traceback.print_exc()
    leave_process(status)
