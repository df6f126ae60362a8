"""What each of two ranks computes of losses that look at the whole batch; run by `on_ranks`, and alone to compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from vjepa.objectives.collectives import count_over_ranks, gather_over_ranks, num_ranks, sum_over_ranks
from vjepa.objectives.projector import Projector
from vjepa.objectives.sigreg import epps_pulley, sigreg
from vjepa.objectives.visreg import visreg
from vjepa.train.distributed import init_world
from vjepa.train.parallel import full

Mode = Literal["ddp", "fsdp"]
WHERE: dict[str, Any] = {"seed": 0, "step": 5, "name": "test"}
EVEN, UNEVEN = (8, 8), (5, 11)  # how 16 samples lie on two ranks


def _clips() -> Tensor:
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A linear layer, perhaps a projector, and one of the losses."""

    def __init__(self, loss: str, *, projector: bool) -> None:
        super().__init__()
        self.loss = loss
        self.first = nn.Linear(6, 8)
        self.projector = Projector(8, 16, 8) if projector else nn.Identity()
        for index, parameter in enumerate(self.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.data.copy_(noise * 0.4 + (parameter.ndim == 1))

    def forward(self, x: Tensor) -> Tensor:
        return LOSSES[self.loss](self.projector(self.first(x)))


def _share_of_sum(z: Tensor) -> Tensor:
    """Each rank's part of a mean over an uneven batch, by the convention of collectives.py."""
    return z.pow(3).mean(dim=-1).sum() * num_ranks() / count_over_ranks(len(z), z.device)


def _different_on_each_rank(z: Tensor) -> Tensor:
    """This rank's samples against a statistic of all: not the same number on every rank."""
    mean = sum_over_ranks(z.sum(dim=0)) / count_over_ranks(len(z), z.device)
    return (z * mean.tanh()).square().mean()


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigreg": lambda z: sigreg(z, num_directions=64, chunk=24, **WHERE),
    "sigreg_none": lambda z: sigreg(z, num_directions=64, scale="none", nodes=(0.2, 4.0, 17), **WHERE),
    "sigreg_per_time": lambda z: sigreg(z.unflatten(-1, (2, 4)).movedim(1, 0), num_directions=64, **WHERE),
    "epps_pulley": lambda z: epps_pulley(z).mean(),
    "visreg": lambda z: visreg(z, num_directions=64, **WHERE),
    "gather": lambda z: gather_over_ranks(z).sort(dim=0).values[::3].pow(3).mean(),
    "share_of_sum": _share_of_sum,
    "different_on_each_rank": _different_on_each_rank,
}


@dataclass(frozen=True)
class Case:
    loss: str
    mode: Mode = "ddp"
    projector: bool = False
    rows: tuple[int, int] = EVEN
    built_before_the_group: bool = False

    def __str__(self) -> str:
        marks = {"projector": self.projector, "uneven": self.rows != EVEN, "early": self.built_before_the_group}
        return "-".join([self.loss, self.mode, *(mark for mark, is_set in marks.items() if is_set)])

    def build(self) -> Net:
        return Net(self.loss, projector=self.projector)


@dataclass(frozen=True)
class Found:
    """The mean over ranks of the loss, the averaged gradient, and the running statistics on each rank."""

    loss: float
    gradient: Tensor
    running: Tensor


def alone(case: Case) -> Found:
    """One process with the whole batch."""
    net = case.build()
    return _run(net, net, _clips())


def together(cases: Sequence[Case]) -> list[Found]:
    """All cases on this rank. Modules built before the group have been used before it, too."""
    early = {case: case.build() for case in cases if case.built_before_the_group}
    for net in early.values():
        net(_clips())
        _reset_running(net)
    with init_world("cpu") as world:
        found = []
        for case in cases:
            net = early.get(case) or case.build()
            wrapped = _wrap(net, case.mode)
            found.append(_run(net, wrapped, _clips().split(case.rows)[world.rank]))
        return found


def _wrap(net: nn.Module, mode: Mode) -> nn.Module:
    if mode == "ddp":
        return DistributedDataParallel(net)
    fully_shard(net)  # in place
    return net


def _reset_running(net: Net) -> None:
    if isinstance(net.projector, Projector):
        net.projector.norm.running_mean.zero_()
        net.projector.norm.running_var.fill_(1.0)


def _run(net: nn.Module, wrapped: nn.Module, x: Tensor) -> Found:
    loss = wrapped(x)
    loss.backward()
    gradients = [full(parameter.grad).flatten() for parameter in net.parameters() if parameter.grad is not None]
    mean = loss.detach().clone()
    if num_ranks() > 1:
        dist.all_reduce(mean)
    running = [buffer.flatten() for buffer in net.buffers()] or [torch.zeros(0)]
    return Found(mean.item() / num_ranks(), torch.cat(gradients).clone(), torch.cat(running).clone())
