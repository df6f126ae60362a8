"""The projector and its batch normalisation in one process; for two ranks see test_global_statistics.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vjepa.objectives.projector import GlobalBatchNorm, Projector


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(dim: int) -> tuple[GlobalBatchNorm, nn.BatchNorm1d]:
    """Ours and torch's, with the same weights, which are not those of the start."""
    ours, theirs = GlobalBatchNorm(dim), nn.BatchNorm1d(dim)
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.copy_(draw(dim, seed=1) + 1)
            norm.bias.copy_(draw(dim, seed=2))
    return ours, theirs


def gradients(norm: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Output of a norm, and gradients of its input and parameters for a loss that is not symmetric."""
    x = x.clone().requires_grad_()
    y = norm(x)
    loss = (y * draw(*x.shape, seed=3)).square().mean()
    return (y.detach(), *torch.autograd.grad(loss, [x, *norm.parameters()]))


def test_one_process_equals_torch_in_outputs_gradients_and_running_statistics() -> None:
    ours, theirs = pair(6)
    for step in range(3):
        x = draw(20, 6, seed=10 + step) * 3 + 2
        for mine, expected in zip(gradients(ours, x), gradients(theirs, x), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-6, atol=1e-6)
    x = draw(5, 6)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-6, atol=1e-6)


def test_a_mean_that_is_large_beside_the_deviation_costs_no_digits() -> None:
    ours, theirs = pair(4)
    x = draw(64, 4) + 300
    torch.testing.assert_close(ours(x), theirs.double()(x.double()).float(), rtol=0, atol=2e-3)


def test_all_leading_dimensions_are_samples() -> None:
    ours, theirs = pair(4)
    x = draw(3, 5, 4)
    torch.testing.assert_close(ours(x), theirs(x.flatten(0, 1)).view_as(x))


def test_evaluation_neither_moves_nor_reads_the_batch() -> None:
    norm = pair(4)[0].eval()
    x = draw(8, 4)
    torch.testing.assert_close(norm(x)[:1], norm(x[:1]))
    assert torch.equal(norm.running_mean, torch.zeros(4))


def test_moments_are_fp32_under_autocast_and_the_output_keeps_its_type() -> None:
    norm = GlobalBatchNorm(4)
    x = (draw(512, 4) + 20).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(norm.running_mean, 0.1 * x.float().mean(dim=0), rtol=1e-6, atol=0)
    assert y.float().mean(dim=0).abs().max() < 0.01


def built(seed: int = 0) -> Projector:
    with torch.device("meta"):
        projector = Projector(12, 64, 24)
    projector.to_empty(device="cpu")
    for buffer in projector.buffers():
        buffer.fill_(torch.nan)  # what to_empty leaves may look sound by chance
    projector.initialise(scope="projector", seed=seed)
    return projector


def test_a_projector_built_on_meta_is_initialised_whole_from_seed_and_names() -> None:
    state = built().state_dict()
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert all(torch.equal(tensor, state[name]) for name, tensor in built().state_dict().items())
    assert not torch.equal(built(seed=1).fc1.weight, state["fc1.weight"])
    assert torch.equal(state["norm.weight"], torch.ones(64))
    assert torch.equal(state["norm.running_var"], torch.ones(64))


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_outputs_begin_with_unit_variance_whatever_the_scale_of_the_input(size: float) -> None:
    projector = Projector(96, 1024, 64)
    projector.initialise(scope="projector", seed=0)
    y = projector(nn.functional.layer_norm(draw(2048, 96), (96,)) * size)
    assert y.std(dim=0).square().mean().sqrt().item() == pytest.approx(0.91, abs=0.1)  # its mean is not 0: the rest
    assert y.square().mean().sqrt().item() == pytest.approx(1.0, abs=0.1)
