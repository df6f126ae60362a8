"""VISReg against its formula, and the danger it is documented with."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor

from vjepa.objectives.sigreg import unit_directions
from vjepa.objectives.visreg import visreg

WHERE: dict[str, Any] = {"seed": 0, "step": 0, "name": "z"}
CENTER: dict[str, Any] = {"scale": 0.0, "shape": 0.0}
SCALE: dict[str, Any] = {"center": 0.0, "shape": 0.0}
SHAPE: dict[str, Any] = {"center": 0.0, "scale": 0.0}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def normal_quantiles(n: int) -> Tensor:
    return torch.tensor([NormalDist().inv_cdf(i / (n + 1)) for i in range(1, n + 1)])


def test_center_and_scale_follow_the_formula() -> None:
    z = torch.tensor([[1.0, 4.0], [3.0, 4.0], [5.0, 10.0]])
    means, variances = [3.0, 6.0], [8 / 3, 8.0]
    assert visreg(z, **WHERE, **CENTER).item() == pytest.approx((means[0] ** 2 + means[1] ** 2) / 2)
    expected = sum((v**0.5 - 1) ** 2 for v in variances) / 2
    assert visreg(z, **WHERE, **SCALE).item() == pytest.approx(expected)


def test_shape_follows_the_formula() -> None:
    z = draw(33, 5) * torch.tensor([0.2, 1.0, 3.0, 1.0, 9.0]) + 4
    normal = (z - z.mean(dim=0)) / z.std(dim=0, correction=0)
    quantiles, expected = normal_quantiles(33), []
    for direction in unit_directions(256, 5, **WHERE):
        ordered = (normal @ direction).sort().values
        expected.append((ordered - quantiles).square().mean())
    assert visreg(z, **WHERE, **SHAPE).item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)


def test_the_shape_of_a_gaussian_is_good_and_that_of_two_clusters_is_not() -> None:
    clusters = draw(1024, 1).sign().expand(-1, 8) + 0.1 * draw(1024, 8, seed=1)
    assert visreg(draw(1024, 8), **WHERE, **SHAPE).item() < 0.02
    assert visreg(clusters, **WHERE, **SHAPE).item() > 0.2


def test_leading_dimensions_are_batches_of_their_own_and_averaged() -> None:
    z = draw(3, 2, 16, 4) * torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1, 1)
    apart = torch.stack([visreg(each, **WHERE) for each in z.flatten(0, 1)]).mean()
    torch.testing.assert_close(visreg(z, **WHERE), apart)


def test_bf16_under_autocast_gives_what_fp32_gives() -> None:
    z = draw(64, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = visreg(z, **WHERE)
    assert found.dtype == torch.float32
    assert found.item() == visreg(z.float(), **WHERE).item()


@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 1e3])
def test_loss_and_gradients_are_finite_at_every_scale(size: float) -> None:
    z = (draw(32, 8) * size).requires_grad_()
    loss = visreg(z, **WHERE)
    loss.backward()
    assert z.grad is not None
    assert loss.isfinite()
    assert z.grad.isfinite().all()


def test_the_pull_of_the_scale_term_does_not_fade_with_the_deviation() -> None:
    norms = []
    for size in (0.5, 1e-3):
        z = (draw(64, 8) * size).requires_grad_()
        (gradient,) = torch.autograd.grad(visreg(z, **WHERE, **SCALE), z)
        norms.append(gradient.norm().item())
    assert norms[1] > norms[0]


def test_danger_a_small_scale_shrinks_further_and_a_unit_scale_does_not() -> None:
    """The derivative of the loss by the logarithm of the scale: positive means that descent shrinks z."""

    def radial(size: float) -> float:
        z = (draw(64, 8) * size).requires_grad_()
        (gradient,) = torch.autograd.grad(visreg(z, **WHERE), z)
        return (gradient * z.detach()).sum().item()

    assert radial(0.01) > 0
    assert radial(0.5) < 0


def test_a_batch_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not shape \[0, 4\]"):
        visreg(torch.zeros(0, 4), **WHERE)
