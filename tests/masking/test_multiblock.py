"""I-JEPA's masks, against its statement: four blocks predicted from one block that they are cut out of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.masking.test_collate import BATCH, FakeSample, collator
from vjepa.batch import Batch, Grid, Modality
from vjepa.masking.blocks import BlockMaskConfig, block_size, context_size, draw_mask, group_masks
from vjepa.masking.collate import GroupConfig, MaskCollator, MaskConfig

IMAGE, VIDEO = (1, 14, 14), (4, 14, 14)
IJEPA = BlockMaskConfig(kind="multiblock", num_blocks=4, spatial_scale=0.15, spatial_scale_max=0.2)


def box(tokens: Sequence[int] | np.ndarray, grid: Grid) -> tuple[Grid, Grid]:
    """Lowest corner and size of the smallest block around these tokens."""
    places = np.stack(np.unravel_index(np.asarray(tokens), grid), axis=1)
    low, high = places.min(0), places.max(0)
    return tuple(low.tolist()), tuple((high - low + 1).tolist())  # pyright: ignore[reportReturnType]


def draw(ordinal: int, grid: Grid = IMAGE, step: int = 0) -> tuple[list[int], ...]:
    size, inside = (choose(IJEPA, grid, 0, step, "m") for choose in (block_size, context_size))
    assert size is not None
    return tuple(part.tolist() for part in draw_mask(IJEPA, grid, size, 0, ordinal, "m", inside=inside))


@pytest.mark.parametrize("grid", [IMAGE, VIDEO])
def test_targets_are_whole_blocks_of_one_size_and_the_context_a_block_without_them(grid: Grid) -> None:
    context_block = context_size(IJEPA, grid, 0, 0, "m")
    is_exact = 0
    for ordinal in range(50):
        context, *targets = draw(ordinal, grid)
        assert len(targets) == 4
        assert {box(target, grid)[1] for target in targets} == {block_size(IJEPA, grid, 0, 0, "m")}
        assert all(len(target) == math.prod(box(target, grid)[1]) for target in targets), "no gaps"
        covered = set().union(*targets)
        assert not covered & set(context)
        assert context == sorted(set(context))
        where, size = box(context, grid)
        assert all(part <= whole for part, whole in zip(size, context_block or (), strict=True))
        inside = np.zeros(grid, dtype=bool)
        inside[tuple(slice(start, start + length) for start, length in zip(where, size, strict=True))] = True
        assert set(context) == set(np.flatnonzero(inside).tolist()) - covered, "nothing else is left out"
        is_exact += size == context_block
    assert is_exact > 25, "blocks at the rim shrink the box of what is visible only now and then"


def test_sizes_lie_in_their_ranges_are_redrawn_each_step_and_shared_by_its_clips() -> None:
    grid, cells = (1, 32, 32), 32 * 32
    sizes = [block_size(IJEPA, grid, 0, step, "m") for step in range(300)]
    areas, aspects = [h * w / cells for _, h, w in sizes], [h / w for _, h, w in sizes]
    assert 0.14 < min(areas) < 0.155
    assert 0.195 < max(areas) < 0.21
    assert 0.7 < min(aspects) < 0.8
    assert 1.4 < max(aspects) <= 1.6
    assert abs(np.corrcoef(areas, aspects)[0, 1]) < 0.2, "two draws"
    inside = [context_size(IJEPA, grid, 0, step, "m") or (0, 0, 0) for step in range(300)]
    assert all(h == w for _, h, w in inside), "unit aspect ratio"
    assert {h for _, h, _ in inside} == {29, 30, 31, 32}  # sqrt of 0.85 to 1, times 32: 29.5 to 32


def test_a_scale_without_a_range_is_drawn_as_before() -> None:
    plain, same = BlockMaskConfig(8, 0.15), BlockMaskConfig(8, 0.15, spatial_scale_max=0.15)
    for step in range(20):
        assert block_size(plain, VIDEO, 0, step, "m") == block_size(same, VIDEO, 0, step, "m")
    areas = {math.prod(block_size(BlockMaskConfig(8, 0.1, spatial_scale_max=0.5), VIDEO, 0, s, "m")) for s in range(20)}
    assert max(areas) > 2 * min(areas)


def test_the_group_is_cut_to_its_smallest_context_and_no_target_is_cut() -> None:
    group = range(12)
    cut = group_masks(IJEPA, IMAGE, seed=0, step=0, name="m", group=group, wanted=group, how="random")
    contexts = [draw(ordinal)[0] for ordinal in group]
    assert cut[0].shape == (12, min(map(len, contexts)))
    assert all(set(row) <= set(context) for row, context in zip(cut[0].tolist(), contexts, strict=True))
    for number, target in enumerate(cut[1:], start=1):
        assert target.tolist() == [draw(ordinal)[number] for ordinal in group]


def batches(modality: Modality, micro: int, *, step: int = 1, **options: object) -> list[Batch]:
    named = {"video": {"first": BlockMaskConfig(1, 0.3), "targets": IJEPA}, "image": {"targets": IJEPA}}
    config = MaskConfig(**named, group=GroupConfig(6, 6), **options)  # pyright: ignore[reportArgumentType]
    collate = MaskCollator(config, seed=0, batch=BATCH, patch_size=8, tubelet_size=2)
    start = step * BATCH[modality]
    ordinals = range(start, start + 6)
    return [collate([FakeSample(o, modality) for o in ordinals[i : i + micro]]) for i in range(0, 6, micro)]


def test_the_masks_of_one_name_share_the_first_one_s_context() -> None:
    [video] = batches("video", 6)
    assert [mask.context_of for mask in video.masks] == [None, None, 1, 1, 1]
    [image] = batches("image", 6)
    assert [mask.context_of for mask in image.masks] == [None, 0, 0, 0]
    for batch in (video, video.take(slice(2, 4)), video.to(torch.device("cpu"))):
        for mask in batch.masks[2:]:
            assert torch.equal(mask.context, batch.masks[1].context)
            assert mask.context_of == 1


@pytest.mark.parametrize("modality", ["video", "image"])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_targets_do_not_depend_on_the_micro_batch(modality: Modality, micro: int) -> None:
    [whole], parts = batches(modality, 6), batches(modality, micro)
    for index, mask in enumerate(whole.masks):
        assert torch.equal(mask.context, torch.cat([part.masks[index].context for part in parts]))
        assert torch.equal(mask.masked, torch.cat([part.masks[index].masked for part in parts]))


def test_all_clips_of_a_step_share_the_block_sizes() -> None:
    """Over its two mask groups; another step has others."""
    collate = collator(image={"targets": IJEPA})
    counts = []
    for step in range(20):
        first, second = (
            collate([FakeSample(12 * step + start + i, "image") for i in range(6)]).masks for start in (0, 6)
        )
        counts.append({mask.masked.shape[1] for mask in (*first, *second)})
    assert all(len(count) == 1 for count in counts)
    assert len(set.union(*counts)) > 1


def test_per_step_counts_names_not_targets() -> None:
    drawn = [len(batches("video", 6, step=step, per_step=1)[0].masks) for step in range(20)]
    assert set(drawn) == {1, 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spatial_scale_max": 0.1}, "spatial_scale_max=0.1 must be between"),
        ({"spatial_scale_max": 1.1}, "spatial_scale_max=1.1 must be between"),
        ({"kind": "multiblock", "temporal_scale": 0.5}, "temporal_scale=0.5 must be 1"),
        ({"kind": "multiblock", "context_scale_min": 0.0}, "context_scale range"),
        ({"context_scale_min": 0.5}, "is for kind=multiblock"),
    ],
)
def test_impossible_multiblock_masks_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockMaskConfig(4, 0.15, **options)  # pyright: ignore[reportArgumentType]


def test_targets_that_leave_no_context_are_refused_with_a_remedy() -> None:
    config = BlockMaskConfig(4, 0.9, kind="multiblock", context_scale_min=0.01, context_scale_max=0.01)
    with pytest.raises(ValueError, match="lower num_blocks or spatial_scale"):
        group_masks(config, (1, 8, 8), seed=0, step=0, name="m", group=range(99), wanted=range(1), how="random")
