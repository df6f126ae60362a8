"""Two ranks have the loss of one process, and after DDP's averaging its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.train.ranks import on_ranks
from vjepa.objectives.vicreg import covariance, invariance, variance
from vjepa.train.distributed import init_world

pytestmark = pytest.mark.distributed
ROWS, TIMES, DIM = 24, 3, 8
SHARES = {"equal": (0, 12, 24), "unequal": (0, 7, 24)}  # where each rank's rows begin and end
Found = dict[str, tuple[float, Tensor]]


def losses(z: Tensor, other: Tensor) -> dict[str, Tensor]:
    """Every loss on [N, D] and, for statistics, on [T, N, D]."""
    return {
        "variance": variance(z[0]),
        "variance per step": variance(z),
        "covariance over dimensions": covariance(z[0]),
        "covariance over pairs": covariance(z[0], normalise="pairs"),
        "covariance per step": covariance(z),
        "invariance": invariance(z, other),
        "sum": 25 * variance(z) + covariance(z) + 25 * invariance(z, other),
    }


def gradients(begin: int, end: int, *, ddp: bool) -> Found:
    """Each loss and its gradient by the weights, from rows begin to end of a fixed batch."""
    generator = torch.Generator().manual_seed(0)
    # Rows of the second half lie elsewhere, so that the mean and spread of a rank are not those of the batch.
    clips = torch.randn(TIMES, ROWS, DIM, generator=generator) + torch.linspace(0, 2, ROWS)[:, None]
    other = torch.randn(TIMES, ROWS, DIM, generator=generator)
    linear = nn.Linear(DIM, DIM, bias=False)
    with torch.no_grad():
        linear.weight.copy_(0.25 * torch.randn(DIM, DIM, generator=generator))
    model = DistributedDataParallel(linear) if ddp else linear
    found: Found = {}
    for name in losses(linear(clips[:, begin:end]), other[:, begin:end]):
        linear.zero_grad()
        loss = losses(model(clips[:, begin:end]), other[:, begin:end])[name]
        loss.backward()
        assert linear.weight.grad is not None
        found[name] = (loss.item(), linear.weight.grad.clone())
    return found


def on_this_rank() -> dict[str, Found]:
    with init_world("cpu") as world:
        return {
            share: gradients(bounds[world.rank], bounds[world.rank + 1], ddp=True) for share, bounds in SHARES.items()
        }


def test_loss_and_averaged_gradient_are_those_of_one_process() -> None:
    expected = gradients(0, ROWS, ddp=False)
    for rank in on_ranks(2, on_this_rank):
        for share in SHARES:
            for name, (loss, gradient) in rank[share].items():
                expected_loss, expected_gradient = expected[name]
                assert loss == pytest.approx(expected_loss, rel=1e-5), (share, name)
                ratio = (gradient.norm() / expected_gradient.norm()).item()
                cosine = nn.functional.cosine_similarity(gradient.flatten(), expected_gradient.flatten(), dim=0).item()
                assert ratio == pytest.approx(1, abs=1e-5), (share, name)
                assert cosine == pytest.approx(1, abs=1e-5), (share, name)


def test_the_test_could_fail_statistics_of_one_rank_are_not_those_of_the_batch() -> None:
    whole, half = gradients(0, ROWS, ddp=False), gradients(0, ROWS // 2, ddp=False)
    for name in whole:
        assert abs(half[name][0] / whole[name][0] - 1) > 1e-2, name
