"""VISReg: centre, scale and shape of a batch of embeddings, each with a term of its own (arXiv 2606.02572).

With mean mu_j and deviation sigma_j of each dimension over the batch, and a = a random direction:

    center = mean_j mu_j^2        scale = mean_j (sigma_j - 1)^2
    shape  = mean over directions and i of (sort(zhat . a)_i - q_i)^2
    zhat = (z - mu) / sg(sigma),  q_i = the i / (N + 1) quantile of N(0, 1)

The pull of the scale term on each sample does not fade as the deviation falls (to 1e-4, see EPS), which SIGReg's does.
Written from the formulas, not from the authors' code.

DANGER: it can itself collapse. Scaling z by s changes the scale term by 2 sigma (sigma - 1) ds/s, which fades as sigma
falls, and the shape term, because of sg(sigma), by about 2 (1 - correlation of sorted samples and quantiles) ds/s > 0,
which does not: below some deviation, the higher the smaller the batch, z shrinks. In our toy (64 samples, deviation
0.097 at the start) embeddings fell to a deviation of 1e-5, from deviation 1 it worked (reference collapse-prevention
1.9). Use it only on embeddings that begin with unit scale (`Projector.initialise` sees to it) and with large batches,
and watch the deviation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vjepa.objectives.collectives import gather_over_ranks, moments_over_ranks
from vjepa.objectives.precision import at_least_fp32, without_autocast
from vjepa.objectives.sigreg import unit_directions

EPS = 1e-8  # added to variances: the deviation has a finite gradient where all samples are one


def visreg(
    z: Tensor,
    *,
    num_directions: int = 256,
    seed: int,
    step: int,
    name: str,
    center: float = 1.0,
    scale: float = 1.0,
    shape: float = 1.0,
) -> Tensor:
    """VISReg of embeddings z [..., N, D] with weights of its three terms, a scalar in fp32; averaged over leading dims.

    N counts the samples of all ranks, of which each must hold as many; sorting wants all projections on every rank
    (N x num_directions numbers). Directions are redrawn from (seed, step, name), as `sigreg` does.
    """
    if z.ndim < 2 or z.shape[-2] == 0:
        raise ValueError(f"VISReg needs samples [..., N, D] with N > 0, not shape {list(z.shape)}")
    with without_autocast(z):
        z = at_least_fp32(z)
        moments = moments_over_ranks(z)
        deviation = (moments.variance + EPS).sqrt()  # [..., D]
        normal = (z - moments.mean.unsqueeze(-2)) / deviation.detach().unsqueeze(-2)
        directions = unit_directions(num_directions, z.shape[-1], seed=seed, step=step, name=name).to(z)
        return (
            center * moments.mean.square().mean()
            + scale * (deviation - 1.0).square().mean()
            + shape * _distance_to_normal(normal @ directions.T)
        )


def _distance_to_normal(projections: Tensor) -> Tensor:
    """Mean squared distance between the sorted projections [..., N, M] of all ranks and the quantiles of N(0, 1)."""
    ordered = gather_over_ranks(projections.movedim(-2, 0)).sort(dim=0).values  # [N of all ranks, ..., M]
    ranks = torch.arange(1, len(ordered) + 1, device=ordered.device, dtype=ordered.dtype)
    quantiles = torch.special.ndtri(ranks / (len(ordered) + 1))
    return (ordered - quantiles.view(-1, *[1] * (ordered.ndim - 1))).square().mean()
