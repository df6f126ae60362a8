"""Masks: shape, coverage, and what they are a function of."""

from __future__ import annotations

import numpy as np
import pytest

from vjepa.masking.blocks import BlockMaskConfig, block_size, draw_mask, group_masks, rng, truncate

GRID = (8, 16, 16)
SHORT = BlockMaskConfig(num_blocks=8, spatial_scale=0.15)
LONG = BlockMaskConfig(num_blocks=2, spatial_scale=0.7)


def draw(config: BlockMaskConfig, ordinal: int, *, step: int = 0, name: str = "short") -> tuple[np.ndarray, np.ndarray]:
    context, masked = draw_mask(config, GRID, block_size(config, GRID, 0, step, name), 0, ordinal, name)
    return context, masked


def test_context_and_masked_tokens_are_disjoint_and_cover_the_grid() -> None:
    for ordinal in range(20):
        context, masked = draw(SHORT, ordinal)
        assert sorted([*context, *masked]) == list(range(2048))
        assert (np.diff(context) > 0).all()
        assert (np.diff(masked) > 0).all()


def test_a_temporal_scale_of_one_makes_tubes() -> None:
    _, masked = draw(SHORT, 3)
    covered = np.zeros(GRID, dtype=bool)
    covered.ravel()[masked] = True
    assert (covered == covered[:1]).all()
    assert covered.any()


def test_a_smaller_temporal_scale_bounds_the_time_steps_of_a_block() -> None:
    config = BlockMaskConfig(num_blocks=1, spatial_scale=0.15, temporal_scale=0.5)
    _, masked = draw(config, 0)
    assert len({int(index) // 256 for index in masked}) == 4


def test_block_size_follows_scale_and_aspect() -> None:
    sizes = [block_size(SHORT, GRID, 0, step, "short") for step in range(200)]
    areas = [h * w for _, h, w in sizes]
    assert {t for t, _, _ in sizes} == {8}
    assert np.mean(areas) == pytest.approx(38, abs=1.5)  # int(256 * 0.15)
    ratios = [h / w for _, h, w in sizes]
    assert min(ratios) >= 0.6  # 0.75 and 1.5 after rounding to whole tokens
    assert max(ratios) <= 1.6
    assert np.std(ratios) > 0.15


def test_block_size_is_a_function_of_seed_step_and_mask_alone() -> None:
    assert block_size(SHORT, GRID, 0, 5, "a") == block_size(SHORT, GRID, 0, 5, "a")
    by_step = {block_size(SHORT, GRID, 0, step, "a") for step in range(20)}
    by_seed = {block_size(SHORT, GRID, seed, 0, "a") for seed in range(20)}
    by_name = {block_size(SHORT, GRID, 0, 0, str(name)) for name in range(20)}
    assert min(len(by_step), len(by_seed), len(by_name)) > 2


def test_block_positions_are_a_function_of_seed_ordinal_and_mask_alone() -> None:
    assert np.array_equal(draw(SHORT, 7)[1], draw(SHORT, 7)[1])
    assert not np.array_equal(draw(SHORT, 7)[1], draw(SHORT, 8)[1])
    assert not np.array_equal(draw(SHORT, 7)[1], draw(SHORT, 7, name="other")[1])


@pytest.mark.parametrize(
    ("config", "group", "context", "masked"),
    [(SHORT, 1, 784, 1264), (SHORT, 24, 496, 977), (LONG, 1, 389, 1659), (LONG, 24, 133, 1440)],
)
def test_token_counts_are_the_reference_s(config: BlockMaskConfig, group: int, context: int, masked: int) -> None:
    """Means over 400 batches of the reference's generator at 256 px and 16 frames, within a few percent
    (torch-and-distributed.md 2.2)."""
    counts = []
    for step in range(1000 if group == 1 else 150):
        ordinals = range(step * group, (step + 1) * group)
        k, m = group_masks(config, GRID, seed=1, step=step, name="m", group=ordinals, wanted=ordinals[:1], how="prefix")
        counts.append((k.shape[1], m.shape[1]))
    mean_context, mean_masked = np.mean(counts, axis=0)
    assert mean_context == pytest.approx(context, rel=0.05)
    assert mean_masked == pytest.approx(masked, rel=0.03)


def test_prefix_keeps_the_first_tokens_and_random_keeps_all_times_alike() -> None:
    indices = np.arange(1000)
    assert np.array_equal(truncate(indices, 100, "prefix", rng(0)), indices[:100])
    kept = np.concatenate([truncate(indices, 100, "random", rng(i)) for i in range(200)])
    first, last = (kept < 500).sum(), (kept >= 500).sum()
    assert first / last == pytest.approx(1, abs=0.1)
    one = truncate(indices, 100, "random", rng(0))
    assert (np.diff(one) > 0).all()


def test_a_mask_that_leaves_no_context_is_refused_with_a_remedy() -> None:
    config = BlockMaskConfig(num_blocks=1, spatial_scale=1.0, aspect_min=1.0, aspect_max=1.0)
    with pytest.raises(ValueError, match="lower num_blocks or spatial_scale"):
        draw(config, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 0, "spatial_scale": 0.5},
        {"num_blocks": 1, "spatial_scale": 0},
        {"num_blocks": 1, "spatial_scale": 0.5, "temporal_scale": 1.5},
        {"num_blocks": 1, "spatial_scale": 0.5, "aspect_min": 2.0},
    ],
)
def test_impossible_masks_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="mask "):
        BlockMaskConfig(**options)  # pyright: ignore[reportArgumentType]


FUTURE = BlockMaskConfig(kind="future", num_blocks=1, spatial_scale=1.0, temporal_scale=0.5)


def test_a_future_mask_hides_the_last_time_steps_whole_and_shows_the_first() -> None:
    context, masked = draw(FUTURE, 3)
    assert context.tolist() == list(range(4 * 256))
    assert masked.tolist() == list(range(4 * 256, 8 * 256))


@pytest.mark.parametrize("options", [{"num_blocks": 2}, {"spatial_scale": 0.5}, {"temporal_scale": 1.0}])
def test_a_future_mask_that_is_none_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="kind=future"):
        BlockMaskConfig(**{"kind": "future", "num_blocks": 1, "spatial_scale": 1.0, "temporal_scale": 0.5, **options})  # pyright: ignore[reportArgumentType]
