"""SIGReg: keep a batch of embeddings an isotropic Gaussian, seen along random directions.

Source: LeJEPA (arXiv 2511.08544, algorithm 1), LeWorldModel (arXiv 2603.19312, appendix A); written from the formulas.
Along each of M directions a on the unit sphere, the Epps-Pulley statistic of the N projections h_n = a . z_n:

    EP = N * integral |phi_N(t) - phi(t)|^2 w(t) dt,   phi_N(t) = mean_n exp(i t h_n),   phi(t) = w(t) = exp(-t^2 / 2)

by the trapezoidal rule on a few nodes t; SIGReg is its mean over directions. On N(0, I) it is 1.06 in the mean whatever
N and D (`default` nodes); on a batch that has collapsed to zero 0.409 N. Samples of all ranks are one batch (see
collectives.py), so N is global and the loss is the same on every rank.

What it does not see (reference collapse-prevention, 1.5): where all is collapsed the gradient vanishes with the scale
of z; a few dead dimensions hardly raise it while N is small; a final LayerNorm makes N(0, I) unreachable, so put a
`Projector` before it. Each call wants the whole batch: see embeddings.py for one in parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from vjepa.objectives.collectives import count_over_ranks, sum_over_ranks
from vjepa.objectives.precision import at_least_fp32, without_autocast

Nodes = tuple[float, float, int]  # first, last, count
Scale = Literal["n", "none"]
NODES: dict[str, Nodes] = {
    "default": (0.0, 5.0, 17),  # doubled: the exact integral to 1e-5, no aliasing below |h| = 20
    "code": (0.0, 3.0, 17),  # doubled; what the public LeJEPA and LeWM code computes: 1 % below the integral
    "paper": (-5.0, 5.0, 17),  # LeJEPA's algorithm 1; cannot tell h from h + 10.05
    "lewm": (0.2, 4.0, 17),  # LeWM, appendix A (no public code does it): once, so about half of the others
}


def epps_pulley(projections: Tensor, *, nodes: Nodes = NODES["default"], scale: Scale = "n") -> Tensor:
    """The Epps-Pulley statistic against N(0, 1) of each column of projections [..., N, M] -> [..., M], fp32.

    Nodes that start at 0 count twice, for the mirrored ones (the integrand is even); others count as they are. `scale`
    "n" multiplies by the global N, as LeJEPA and the public code do: beside a mean-reduced loss its weight then grows
    with the batch; "none" leaves it out (LeWM's appendix, eb_jepa). Published weights come to 5 to 26 over N.
    """
    _check(projections, nodes, scale)
    with without_autocast(projections):
        projections = at_least_fp32(projections)
        sums = _wave_sums(projections, _points(nodes))
        return _statistic(sums, projections.shape[-2], nodes, scale)


def sigreg(
    z: Tensor,
    *,
    num_directions: int = 1024,
    seed: int,
    step: int,
    name: str,
    nodes: Nodes = NODES["default"],
    scale: Scale = "n",
    chunk: int = 128,
) -> Tensor:
    """SIGReg of embeddings z [..., N, D], a scalar in fp32: the mean over directions and over leading dimensions.

    Each leading index is a batch of its own (a time step in LeWM, a view in LeJEPA), seen along the same directions.
    The directions are drawn anew from (seed, step, name): `step` is the run's, so that a resumed run goes on with the
    same ones, and `name` tells two regularisers of a step apart. No more than N x `chunk` projections exist at a time;
    none are kept for the backward pass, which computes them again.
    """
    _check(z, nodes, scale)
    if num_directions < 1 or chunk < 1:
        raise ValueError(f"sigreg: num_directions={num_directions} and chunk={chunk} must be at least 1")
    with without_autocast(z):
        z = at_least_fp32(z)
        directions = unit_directions(num_directions, z.shape[-1], seed=seed, step=step, name=name).to(z)
        sums: Tensor = _ProjectedWaveSums.apply(z, directions, _points(nodes), chunk)  # pyright: ignore[reportAssignmentType]
        return _statistic(sums, z.shape[-2], nodes, scale).mean()


def unit_directions(num_directions: int, dim: int, *, seed: int, step: int, name: str) -> Tensor:
    """Directions [M, D], uniform on the unit sphere, fp32 on the CPU: the same on every rank and for every device."""
    digest = hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    directions = torch.randn(num_directions, dim, generator=generator)
    return directions / directions.norm(dim=-1, keepdim=True)


def _check(x: Tensor, nodes: Nodes, scale: str) -> None:
    first, last, count = nodes
    if x.ndim < 2 or x.shape[-2] == 0:
        raise ValueError(f"SIGReg needs samples [..., N, D] with N > 0, not shape {list(x.shape)}")
    if count < 2 or last <= first:
        raise ValueError(f"nodes={nodes} must be (first, last, count) with first < last and at least 2 of them")
    if scale not in get_args(Scale):
        raise ValueError(f"scale={scale!r} must be one of {', '.join(get_args(Scale))}")


def _points(nodes: Nodes) -> list[float]:
    first, last, count = nodes
    return [first + (last - first) * k / (count - 1) for k in range(count)]


def _trapezoid(nodes: Nodes) -> list[float]:
    """The weight of each node in the integral over dt."""
    first, last, count = nodes
    inner = (last - first) / (count - 1) * (2.0 if first == 0.0 else 1.0)
    return [inner / 2, *[inner] * (count - 2), inner / 2]


def _statistic(sums: Tensor, count: int, nodes: Nodes, scale: Scale) -> Tensor:
    """EP from this rank's sums [2, K, ..., M] of cosines and sines over `count` samples."""
    total = count_over_ranks(count, sums.device)
    cosine, sine = (sum_over_ranks(sums) / total).unbind(0)  # [K, ..., M]
    shape = [-1] + [1] * (cosine.ndim - 1)
    gaussian = torch.tensor(_points(nodes)).square().div(-2).exp()  # phi, and the window
    weights = torch.tensor(_trapezoid(nodes)) * gaussian
    gaussian, weights = gaussian.to(sums).view(shape), weights.to(sums).view(shape)
    integral = (((cosine - gaussian).square() + sine.square()) * weights).sum(dim=0)  # [..., M]
    return integral * total if scale == "n" else integral


def _wave_sums(projections: Tensor, points: Sequence[float]) -> Tensor:
    """Sums over N of cos(t h) and sin(t h): [..., N, M] -> [2, K, ..., M]. Node by node, which bounds the memory."""
    waves = []
    for t in points:
        angle = projections * t
        waves.append(torch.stack([angle.cos().sum(dim=-2), angle.sin().sum(dim=-2)]))
    return torch.stack(waves, dim=1)


def _wave_gradient(projections: Tensor, points: Sequence[float], gradient: Tensor) -> Tensor:
    """The gradient of the projections [..., N, M] from that of their `_wave_sums` [2, K, ..., M]."""
    total = torch.zeros_like(projections)
    for t, cosine, sine in zip(points, *gradient.unsqueeze(-2).unbind(0), strict=True):
        angle = projections * t
        total += t * (sine * angle.cos() - cosine * angle.sin())
    return total


class _ProjectedWaveSums(Function):
    """`_wave_sums` of z projected on directions [M, D], `chunk` directions at a time; keeps z alone for backward."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, directions: Tensor, points: Sequence[float], chunk: int) -> Tensor:
        ctx.save_for_backward(z, directions)
        ctx.points, ctx.chunk = points, chunk
        return torch.cat([_wave_sums(z @ part.T, points) for part in directions.split(chunk)], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor, None, None, None]:
        z, directions = ctx.saved_tensors
        total = torch.zeros_like(z)
        with without_autocast(z):
            for part, sums in zip(directions.split(ctx.chunk), gradient.split(ctx.chunk, dim=-1), strict=True):
                total += _wave_gradient(z @ part.T, ctx.points, sums) @ part
        return total, None, None, None
