"""Variance, covariance and invariance have the values of the papers' formulae, and gradients that undo collapse."""

import pytest
import torch
from torch import Tensor

from vjepa.objectives.vicreg import (
    Normalise,
    clip_means,
    covariance,
    first_frame,
    invariance,
    per_place,
    per_time_step,
    pooled,
    variance,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_variance_of_a_known_matrix() -> None:
    """Columns with Var 4, 0.25 and 0 (over N - 1): hinges 0, 1 - sqrt(0.2501) and 1 - sqrt(0.0001)."""
    z = torch.tensor([[-2.0, 1.5, 7.0], [0.0, 1.0, 7.0], [2.0, 0.5, 7.0]])
    assert variance(z).item() == pytest.approx((0 + 0.49990 + 0.99) / 3, abs=1e-4)
    assert variance(z, target=3.0).item() == pytest.approx((0.99998 + 2.49990 + 2.99) / 3, abs=1e-4)
    assert variance(z, eps=0.11).item() == pytest.approx((0 + 0.4 + 0.66834) / 3, abs=1e-4)


@pytest.mark.parametrize(("normalise", "expected"), [("dimensions", 7.40741), ("pairs", 3.70370)])
def test_covariance_of_correlated_columns(normalise: Normalise, expected: float) -> None:
    """C_12 = 8/3, C_13 = 2 and C_23 = 0, each twice: 200/9 in all, over D = 3 or over its 6 pairs."""
    z = torch.tensor([[1.0, 2, -1], [-1, -2, 1], [2, 1, 2], [-2, -1, -2]]) + 5
    assert covariance(z, normalise=normalise).item() == pytest.approx(expected, abs=1e-4)


def test_invariance_is_the_mean_squared_difference() -> None:
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    assert invariance(a, b).item() == pytest.approx((0 + 4 + 9 + 1) / 4, abs=1e-6)
    a.requires_grad_()
    b.requires_grad_()
    invariance(a, b).backward()
    assert a.grad is not None
    assert b.grad is not None
    torch.testing.assert_close(a.grad, 2 * (a - b).detach() / 4)
    torch.testing.assert_close(b.grad, -a.grad)


def test_a_collapsed_batch_has_the_greatest_variance_loss_and_no_covariance() -> None:
    z = random(1, 16).expand(64, 16)
    assert variance(z).item() == pytest.approx(1 - 0.01, abs=1e-4)
    assert covariance(z).item() == pytest.approx(0, abs=1e-6)


def test_white_embeddings_cost_nothing() -> None:
    z = torch.linalg.qr(random(64, 8) - random(64, 8).mean(dim=0))[0] * 8  # centred, orthogonal, Var 64 / 63
    assert variance(z).item() == 0
    assert covariance(z).item() == pytest.approx(0, abs=1e-6)


def test_each_time_step_has_statistics_of_its_own() -> None:
    """Steps that differ from each other, but not within themselves, are collapsed step by step and not pooled."""
    z = torch.arange(4.0)[:, None, None].expand(4, 8, 6)
    assert variance(z).item() == pytest.approx(0.99, abs=1e-4)
    assert variance(z.flatten(0, 1)).item() == 0
    mixed = random(4, 8, 6)
    for loss in (variance, covariance):
        assert loss(mixed).item() == pytest.approx(torch.stack([loss(step) for step in mixed]).mean().item(), rel=1e-6)


def test_gradients_are_those_of_finite_differences() -> None:
    z = (0.5 * random(6, 4)).double().requires_grad_()  # below the hinge in every dimension
    other = random(6, 4, seed=1).double().requires_grad_()
    assert (z.detach().std(dim=0) < 0.9).all()
    assert torch.autograd.gradcheck(variance, (z,))
    assert torch.autograd.gradcheck(covariance, (z,))
    assert torch.autograd.gradcheck(lambda a: covariance(a, normalise="pairs"), (z,))
    assert torch.autograd.gradcheck(invariance, (z, other))


def test_gradients_push_narrow_dimensions_apart_and_correlated_ones_to_zero() -> None:
    narrow = (0.1 * random(32, 4)).requires_grad_()
    variance(narrow).backward()
    assert narrow.grad is not None
    centred = narrow.detach() - narrow.detach().mean(dim=0)
    assert ((narrow.grad * centred).sum(dim=0) < 0).all()  # a step against the gradient widens every dimension
    correlated = random(32, 1).expand(32, 4).clone().requires_grad_()
    before = covariance(correlated)
    before.backward()
    assert correlated.grad is not None
    assert covariance(correlated.detach() - 0.1 * correlated.grad) < before


def test_variance_and_covariance_lead_a_nearly_collapsed_batch_to_unit_white() -> None:
    z = (random(1, 8) + 1e-3 * random(64, 8, seed=1)).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (25 * variance(z) + covariance(z)).backward()
        optimizer.step()
    assert variance(z).item() < 0.02
    assert covariance(z).item() < 0.02


def test_losses_do_not_depend_on_autocast_and_bf16_is_raised_to_fp32() -> None:
    z, other = 0.7 * random(64, 16), random(64, 16, seed=1)
    calls = [lambda: variance(z), lambda: covariance(z), lambda: invariance(z, other)]
    for call in calls:
        plain = call()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = call()
        assert plain.shape == ()
        assert inside.dtype == torch.float32
        assert torch.equal(plain, inside)
    assert torch.equal(variance(z.bfloat16()), variance(z.bfloat16().float()))


def test_selections_take_the_right_tokens() -> None:
    """Channels of a token are its clip, time step, row and column."""
    sizes = (2, 3, 4, 5)
    axes = torch.meshgrid(*(torch.arange(float(size)) for size in sizes), indexing="ij")
    tokens = torch.stack(axes, dim=-1).flatten(1, 3)  # [B, N, 4]
    assert pooled(tokens).shape == (120, 4)
    assert clip_means(tokens).tolist() == [[0.0, 1.0, 1.5, 2.0], [1.0, 1.0, 1.5, 2.0]]
    places = per_place(tokens)
    assert places.shape == (60, 2, 4)
    assert torch.equal(places[..., 1:], places[:, :1, 1:].expand(60, 2, 3))
    steps = per_time_step(tokens, (3, 4, 5))
    assert steps.shape == (3, 40, 4)
    assert all((steps[time, :, 1] == time).all() for time in range(3))
    assert len(steps[1].unique(dim=0)) == 40
    assert torch.equal(first_frame(tokens, (3, 4, 5)), steps[0])


def test_features_of_position_alone_pass_pooled_but_not_per_place() -> None:
    positional = (2 * random(12, 6)).expand(8, 12, 6)
    assert variance(pooled(positional)).item() < 0.05
    assert variance(per_place(positional)).item() == pytest.approx(0.99, abs=1e-4)


def test_what_cannot_be_meant_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"\[N, D\].*\[8\]"):
        variance(torch.zeros(8))
    with pytest.raises(ValueError, match=r"two dimensions.*\[8, 1\]"):
        covariance(torch.zeros(8, 1))
    with pytest.raises(ValueError, match="one shape"):
        invariance(torch.zeros(8, 2), torch.zeros(8, 3))
    with pytest.raises(ValueError, match=r"all 60 tokens of grid \(3, 4, 5\)"):
        per_time_step(torch.zeros(2, 50, 4), (3, 4, 5))
    with pytest.raises(ValueError, match="'dimensions'"):
        covariance(torch.zeros(8, 2), normalise="d")  # pyright: ignore[reportArgumentType]
