"""SIGReg against tables, its closed form, and what it promises about precision, memory and randomness."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vjepa.objectives import sigreg as module
from vjepa.objectives.sigreg import NODES, Scale, epps_pulley, sigreg, unit_directions

# Column -> (exact, `code`, `paper`): reference collapse-prevention 1.3.
TABLE: list[tuple[list[float], float, float, float]] = [
    ([0], 0.408923, 0.402048, 0.408921),
    ([1], 1.193054, 1.186006, 1.193052),
    ([-1, 1], 0.218715, 0.205659, 0.218714),
    ([-1, 0, 1], 0.035060, 0.032947, 0.035058),
    ([0] * 4, 1.635692, 1.608190, 1.635683),
    ([5] * 4, 15.787950, 15.759841, 15.763987),
    ([-2, -1, 0, 1, 2], 0.930233, 0.929236, 0.930232),
]
NORMAL_MEANS = [("default", 1.0594), ("code", 1.0525), ("paper", 1.0594), ("lewm", 0.5253)]
WHERE = {"seed": 0, "step": 3, "name": "encoder"}


def column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).unsqueeze(1)


def closed_form(h: Tensor) -> Tensor:
    """The exact integral for one column h [N], by pairs."""
    pairs = (h[:, None] - h[None, :]).square().div(-2).exp().mean()
    cross = h.square().div(-4).exp().mean()
    return len(h) * (math.sqrt(2 * math.pi) * pairs - 2 * math.sqrt(math.pi) * cross + math.sqrt(2 * math.pi / 3))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("values", "exact", "code", "paper"), TABLE)
def test_small_inputs_have_the_values_of_the_reference(
    values: list[float], exact: float, code: float, paper: float
) -> None:
    for nodes, expected in (("default", exact), ("code", code), ("paper", paper)):
        found = epps_pulley(column(values), nodes=NODES[nodes]).item()
        assert found == pytest.approx(expected, abs=1e-4), nodes


def test_quantiles_of_the_normal_are_as_good_as_normal() -> None:
    quantiles = torch.special.ndtri((torch.arange(1024) + 0.5) / 1024)
    assert epps_pulley(quantiles.unsqueeze(1)).item() == pytest.approx(3.5e-5, abs=2e-5)


@pytest.mark.parametrize(("shift", "spread"), [(0.0, 1.0), (0.5, 0.3), (-1.0, 2.0)])
def test_random_inputs_agree_with_the_closed_form(shift: float, spread: float) -> None:
    h = (draw(64, 5) * spread + shift).double()
    exact = torch.stack([closed_form(each) for each in h.T])
    torch.testing.assert_close(epps_pulley(h), exact, rtol=1e-4, atol=1e-5)


def test_its_gradient_agrees_with_the_closed_form() -> None:
    h = draw(32, 1).double().requires_grad_()
    (expected,) = torch.autograd.grad(closed_form(h[:, 0]), h)
    (found,) = torch.autograd.grad(epps_pulley(h).sum(), h)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("nodes", "mean"), [("default", 1.0594), ("code", 1.0525), ("paper", 1.0594), ("lewm", 0.5253)]
)
def test_normal_samples_have_the_expected_mean(nodes: str, mean: float) -> None:
    found = epps_pulley(draw(64, 40_000), nodes=NODES[nodes]).mean().item()
    assert found == pytest.approx(mean, abs=0.02)  # the standard error is 0.005


def test_scale_none_leaves_n_out() -> None:
    h = draw(16, 3)
    torch.testing.assert_close(epps_pulley(h, scale="none") * 16, epps_pulley(h))


def test_a_collapsed_batch_reads_0_409_per_sample() -> None:
    assert sigreg(torch.zeros(256, 64), **WHERE).item() == pytest.approx(0.408923 * 256, rel=1e-4)


def test_symmetric_nodes_take_a_far_constant_for_zero_and_the_default_does_not() -> None:
    far = column([10.05])
    assert epps_pulley(far, nodes=NODES["paper"]).item() < 0.42
    assert epps_pulley(far).item() == pytest.approx(3.954, abs=0.001)


def test_normal_embeddings_read_about_one() -> None:
    for step in range(3):
        assert 0.8 < sigreg(draw(256, 192, seed=step), seed=0, step=step, name="z").item() < 1.3


def test_leading_dimensions_are_batches_of_their_own_and_averaged() -> None:
    z = draw(3, 2, 32, 8) * torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1, 1)
    apart = torch.stack([sigreg(each, **WHERE) for each in z.flatten(0, 1)]).mean()
    torch.testing.assert_close(sigreg(z, **WHERE), apart)


def test_bf16_under_autocast_gives_what_fp32_gives() -> None:
    z = draw(128, 32).bfloat16()
    expected = sigreg(z.float(), **WHERE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sigreg(z, **WHERE)
        column_wise = epps_pulley(z)
    assert found.dtype == column_wise.dtype == torch.float32
    assert found.item() == expected.item()


def test_the_same_seed_step_and_name_see_the_same_directions_and_others_do_not() -> None:
    z = draw(64, 16)
    once = sigreg(z, **WHERE).item()
    assert sigreg(z, **WHERE).item() == once
    for change in ({"seed": 1}, {"step": 4}, {"name": "predictor"}):
        assert sigreg(z, **{**WHERE, **change}).item() != once


def test_directions_have_unit_length_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    directions = unit_directions(100, 16, seed=0, step=0, name="z")
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(100))
    assert directions.mean(dim=0).abs().max() < 0.1
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunks_change_neither_loss_nor_gradient(chunk: int) -> None:
    """Against the plain statistic, whose gradient is autograd's own."""
    z = (draw(2, 24, 8) * 0.7).requires_grad_()
    directions = unit_directions(50, 8, **WHERE)
    expected = epps_pulley(z @ directions.T).mean()
    found = sigreg(z, num_directions=50, chunk=chunk, **WHERE)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(each, z)[0] for each in (found, expected)), rtol=1e-4, atol=1e-7)


def test_no_more_projections_exist_at_a_time_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []

    def watch(name: str) -> None:
        original = getattr(module, name)

        def watched(projections: Tensor, *arguments: object) -> Tensor:
            widths.append(projections.shape[-1])
            return original(projections, *arguments)

        monkeypatch.setattr(module, name, watched)

    watch("_wave_sums")
    watch("_wave_gradient")
    kept: list[int] = []
    z = draw(16, 8).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        loss = sigreg(z, num_directions=100, chunk=32, **WHERE)
    loss.backward()
    assert widths == [32, 32, 32, 4] * 2
    assert max(kept) <= 2 * 17 * 100  # sums and directions; projections times nodes would be 27,200


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 1e3])
def test_gradients_are_finite_at_every_scale(size: float) -> None:
    z = (draw(32, 8) * size).requires_grad_()
    sigreg(z, **WHERE).backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "nodes", "scale", "message"),
    [
        ((8,), (0.0, 5.0, 17), "n", "shape"),
        ((0, 4), (0.0, 5.0, 17), "n", "shape"),
        ((8, 4), (0.0, 5.0, 1), "n", "nodes="),
        ((8, 4), (5.0, 0.0, 17), "n", "nodes="),
        ((8, 4), (0.0, 5.0, 17), "batch", "scale='batch'"),
    ],
)
def test_what_makes_no_sense_is_refused(
    shape: tuple[int, ...], nodes: tuple[float, float, int], scale: Scale, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        epps_pulley(torch.zeros(shape), nodes=nodes, scale=scale)
