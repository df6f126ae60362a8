"""Ranks, devices and the few collectives that the trainer needs; one process without a launcher is a world of one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

TIMEOUT = timedelta(minutes=10)
T = TypeVar("T")
# Groups that were left. The last reference must be Python's: DistributedDataParallel's, in C++, would join gloo's
# threads while it holds the interpreter's lock, for which those threads may wait; one run in five hung at its end.
_LEFT: list[Any] = []


@dataclass(frozen=True)
class World:
    """This process's place among the ranks, and the collectives among them."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None  # of the collectives; None: the default group
    timeout: timedelta = TIMEOUT  # of one collective

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def beside(self) -> World:
        """The same ranks with a group of their own on the CPU, for collectives of another thread; all ranks call it.

        Two threads in one group would mix up each other's messages, or wait for ever.
        """
        if self.size == 1:
            return World(self.rank, self.size, torch.device("cpu"))
        group = dist.new_group(backend="gloo", timeout=self.timeout)
        assert isinstance(group, dist.ProcessGroup)  # this rank is one of its members
        _LEFT.append(group)
        return World(self.rank, self.size, torch.device("cpu"), group, self.timeout)

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self.group)
        return values

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Rows [n, ...], as many on every rank, of all ranks one after another: [n * size, ...]; no gradient."""
        if self.size == 1:
            return rows
        gathered = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(gathered, rows.contiguous(), group=self.group)
        return torch.cat(gathered)

    def gather_objects(self, value: Any) -> list[Any]:
        """One small picklable value per rank, known to all."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0, group=self.group)
        return holder[0]

    def on_main(self, action: Callable[[], T]) -> T:
        """The result of `action`, run on the main rank alone; where it raises, the others raise RuntimeError."""
        outcome: Any = None
        if self.is_main:
            try:
                outcome = (action(), None)
            except Exception as error:
                self.broadcast_object((None, str(error)))  # the text alone: not every exception can be pickled
                raise
        result, problem = self.broadcast_object(outcome)
        if problem is not None:
            raise RuntimeError(f"the main rank stopped: {problem}")
        return result

    def on_all(self, action: Callable[[], T]) -> list[T]:
        """Every rank's result of `action`; where it raises on one, that one raises it and the others RuntimeError."""
        error: Exception | None = None
        outcome: Any = None
        try:
            outcome = (action(), None)
        except Exception as raised:
            error, outcome = raised, (None, str(raised))
        everyone = self.gather_objects(outcome)
        if error is not None:
            raise error
        for rank, (_, problem) in enumerate(everyone):
            if problem is not None:
                raise RuntimeError(f"rank {rank} stopped: {problem}")
        return [result for result, _ in everyone]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.group)


ALONE = World(0, 1, torch.device("cpu"))


@contextmanager
def init_world(device: str = "auto", timeout: timedelta = TIMEOUT, *, store: Store | None = None) -> Iterator[World]:
    """Join the ranks named by torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK); leave at the end.

    They meet at MASTER_ADDR and MASTER_PORT, or in the store that a launcher has connected them to.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    place = _device(device, local_rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        if store is None:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    try:
        yield World(rank, size, place, timeout=timeout)
    finally:
        if size > 1:
            _LEFT.append(dist.group.WORLD)
            dist.destroy_process_group()


def leave_process(status: int) -> NoReturn:
    """End this process with an exit status; one of several ranks without the interpreter's own end.

    There the threads of gloo and of DistributedDataParallel are taken down in no safe order: about one rank in some
    dozens aborted (exit status -6) after all its work was done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(status)
    sys.exit(status)


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("train.device=cuda, but torch sees no CUDA device: use train.device=cpu or auto")
        return torch.device("cuda", local_rank)
    return torch.device(name)
