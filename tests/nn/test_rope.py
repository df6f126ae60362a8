"""Rotary positions: a rotation by relative position, on any grid."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vjepa.nn.rope import axis_dim, grid_positions, rope_table, rotate


def scores(positions: Tensor, layout: str = "interleaved") -> Tensor:
    """q.k of one fixed query and key at all pairs of positions."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 64, generator=generator)
    table = rope_table(positions, 64, layout)  # pyright: ignore[reportArgumentType]
    count = len(positions)
    q, k = (rotate(x.expand(count, 1, 64), table)[:, 0] for x in (q, k))
    return q @ k.T


@pytest.mark.parametrize(("head_dim", "dim"), [(64, 20), (32, 10), (80, 26), (16, 4)])
def test_each_axis_rotates_an_even_third_of_the_head(head_dim: int, dim: int) -> None:
    assert axis_dim(head_dim) == dim


def test_interleaved_scores_depend_on_relative_positions_only() -> None:
    positions = grid_positions((3, 4, 5), interpolate=False)
    shifted = positions + torch.tensor([7.0, 2.0, 5.0])
    torch.testing.assert_close(scores(positions), scores(shifted), atol=2e-5, rtol=0)


def test_tiled_is_no_rotation_and_differs_from_interleaved() -> None:
    positions = grid_positions((3, 4, 5), interpolate=False)
    shifted = positions + torch.tensor([7.0, 2.0, 5.0])
    assert (scores(positions, "tiled") - scores(shifted, "tiled")).abs().max() > 0.1
    assert (scores(positions, "tiled") - scores(positions)).abs().max() > 0.1


def test_tables_follow_the_formulas_of_both_layouts() -> None:
    position = torch.tensor([[3.0, 0.0, 0.0]])
    omega = [10000 ** (-k / 10) for k in range(10)]
    interleaved = rope_table(position, 64, "interleaved").cos[0, 0]
    tiled = rope_table(position, 64, "tiled").cos[0, 0]
    for k in range(10):
        expected = math.cos(3 * omega[k])
        assert interleaved[2 * k].item() == pytest.approx(expected, abs=1e-6)
        assert interleaved[2 * k + 1].item() == pytest.approx(expected, abs=1e-6)
        assert tiled[k].item() == pytest.approx(expected, abs=1e-6)
        assert tiled[10 + k].item() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(interleaved[20:], torch.ones(44)), "other axes at 0, and the last four, do not rotate"


def test_height_and_width_are_scaled_to_the_16_grid_and_time_is_not() -> None:
    positions = grid_positions((32, 24, 32), interpolate=True)
    assert positions[:, 0].unique().tolist() == list(range(32))
    assert positions[:, 1].max().item() == pytest.approx(15)
    assert positions[:, 2].max().item() == pytest.approx(15)
    assert positions[:, 1].unique()[1].item() == pytest.approx(15 / 23)
    assert torch.equal(grid_positions((2, 16, 16), interpolate=True), grid_positions((2, 16, 16), interpolate=False))


def test_a_grid_one_patch_wide_has_finite_positions() -> None:
    positions = grid_positions((4, 3, 1), interpolate=True)
    assert positions.isfinite().all()
    assert torch.equal(positions[:, 2], torch.zeros(12))


def test_tables_are_fp32_whatever_the_default_dtype() -> None:
    table = rope_table(grid_positions((32, 24, 24), interpolate=True).bfloat16(), 64, "interleaved")
    assert table.cos.dtype == table.sin.dtype == torch.float32


def test_a_head_too_small_for_three_axes_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim=4 is too small"):
        rope_table(torch.zeros(1, 3), 4, "interleaved")
