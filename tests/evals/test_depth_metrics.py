"""Depth metrics, SigLoss and the depth head against figures worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from evals.depth_metrics import DepthMeter, depth_errors, sig_loss
from evals.tasks.linear_depth import LinearDepthHead
from tests.train.ranks import on_ranks
from vjepa.train.distributed import ALONE, init_world

BOUNDS: dict[str, Any] = {"min_depth": 1e-3, "max_depth": 10.0}


def test_errors_by_hand() -> None:
    """2 for 1 and 3 for 4: differences 1 and -1, logarithms of ratios ln 2 and ln 3/4."""
    found = depth_errors(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 4.0]))
    a, b = math.log(2), math.log(0.75)
    expected = {
        "RMSE": 1.0,
        "AbsRel": (1 / 1 + 1 / 4) / 2,
        "delta1": 0.0,  # ratios 2 and 1.333
        "delta2": 0.5,  # below 1.5625
        "delta3": 0.5,  # below 1.953
        "RMSElog": math.sqrt((a * a + b * b) / 2),
        "log10": (math.log10(2) + math.log10(4 / 3)) / 2,
        "SILog": abs(a - b) / 2 * 100,
        "SqRel": (1 / 1 + 1 / 4) / 2,
    }
    assert found == pytest.approx(expected)


def test_errors_are_averaged_over_images_not_pooled_over_pixels() -> None:
    """An image with one known pixel counts as much as one with many: RMSE (3 + 0) / 2, pooled it would be 1.34."""
    meter = DepthMeter(**BOUNDS)
    meter.update(torch.full((1, 2, 2), 5.0), torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    meter.update(torch.full((2, 2), 5.0), torch.full((2, 2), 5.0))
    assert meter.headline() == pytest.approx(1.5)
    assert meter.scores()["delta1"] == pytest.approx(0.5)


def test_what_is_out_of_range_is_clamped_or_left_out() -> None:
    meter = DepthMeter(**BOUNDS)
    meter.update(torch.tensor([[50.0, 1.0, -3.0]]), torch.tensor([[9.0, 10.0, 0.0]]))
    assert meter.headline() == pytest.approx(
        1.0
    )  # 50 becomes 10 against 9; a true 10 and an unknown depth are left out
    meter.update(torch.ones(1, 2), torch.zeros(1, 2))
    assert meter.images == 1
    with pytest.raises(ValueError, match="nothing was scored"):
        DepthMeter(**BOUNDS).scores()


def test_sig_loss_by_hand() -> None:
    """g is ln 2 and -ln 2 (eps left out): mean 0, unbiased variance 2 ln^2 2."""
    predicted, true = torch.tensor([[2.0, 1.0, 7.0]]), torch.tensor([[1.0, 2.0, 0.0]])
    found = sig_loss(predicted, true, eps=0.0, **BOUNDS).item()
    assert found == pytest.approx(math.sqrt(2) * math.log(2), rel=1e-5)
    g = [math.log(3.001 / 1.001), math.log(5.001 / 4.001)]
    mean = sum(g) / 2
    variance = sum((value - mean) ** 2 for value in g)
    pair = torch.tensor([3.0, 5.0]), torch.tensor([1.0, 4.0])
    assert sig_loss(*pair, **BOUNDS).item() == pytest.approx(math.sqrt(variance + 0.15 * mean**2), rel=1e-5)
    assert sig_loss(*pair, mean_only=True, **BOUNDS).item() == pytest.approx(math.sqrt(0.15 * mean**2), rel=1e-5)


def test_sig_loss_has_finite_gradients_where_it_is_zero_or_nothing_is_known() -> None:
    for true in (torch.ones(4), torch.zeros(4)):
        for mean_only in (False, True):
            predicted = torch.ones(4, requires_grad=True)
            sig_loss(predicted, true, mean_only=mean_only, **BOUNDS).backward()
            assert predicted.grad is not None
            assert predicted.grad.isfinite().all()


def test_the_head_gives_the_expectation_over_linear_bins() -> None:
    """Bins 1, 2, 3 with scores 0, 0.4, -1: weights .1, .5, .1 over .7."""
    head = LinearDepthHead(2, 3, 1.0, 3.0).eval()
    with torch.no_grad():
        head.linear.weight.zero_()
        head.linear.bias.copy_(torch.tensor([0.0, 0.4, -1.0]))
        assert head(torch.randn(2, 4, 5, 2)).shape == (2, 1, 4, 5)
        assert head(torch.zeros(1, 1, 1, 2)).item() == pytest.approx((0.1 * 1 + 0.5 * 2 + 0.1 * 3) / 0.7)
        head.linear.bias.copy_(torch.tensor([0.0, 0.4, 0.9]))
        assert head(torch.zeros(1, 1, 1, 2)).item() == pytest.approx((0.1 * 1 + 0.5 * 2 + 1.0 * 3) / 1.6)


def uneven() -> tuple[Tensor, Tensor]:
    predicted, true = torch.rand(4, 6, 7, generator=torch.Generator().manual_seed(0)) + 1, torch.full((4, 6, 7), 2.0)
    true[0] = 0  # the first rank knows less
    return predicted, true


def loss_and_gradient(rank: int, size: int) -> tuple[float, Tensor]:
    predicted, true = (part.chunk(size)[rank] for part in uneven())
    predicted.requires_grad_()
    loss = sig_loss(predicted, true, **BOUNDS)
    loss.backward()
    assert predicted.grad is not None
    return loss.item(), predicted.grad


def on_this_rank() -> tuple[float, Tensor, float]:
    with init_world("cpu") as world:
        loss, gradient = loss_and_gradient(world.rank, 2)
        return loss, gradient, metered(world.rank, 2).reduce(world).headline()


def metered(rank: int, size: int) -> DepthMeter:
    meter = DepthMeter(**BOUNDS)
    for image in range(rank, 4, size):
        meter.update(*(part[image] for part in uneven()))
    return meter


@pytest.mark.distributed
def test_two_ranks_have_the_loss_gradient_and_errors_of_one() -> None:
    loss, gradient = loss_and_gradient(0, 1)
    ranks = on_ranks(2, on_this_rank)
    for found, _, rmse in ranks:
        assert found == pytest.approx(loss)
        assert rmse == pytest.approx(metered(0, 1).reduce(ALONE).headline())
    # each rank descends its own copy of one loss, and gradients are averaged: half of the sum of both
    torch.testing.assert_close(torch.cat([each for _, each, _ in ranks]) / 2, gradient)
