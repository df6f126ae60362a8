"""Batches: the masks of a clip do not depend on how the step is split."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from vjepa.batch import Modality
from vjepa.masking.blocks import BlockMaskConfig
from vjepa.masking.collate import GroupConfig, MaskCollator, MaskConfig, micro_batches_per_step

BATCH: dict[Modality, int] = {"video": 12, "image": 12}


@dataclass(frozen=True)
class FakeSample:
    ordinal: int
    modality: str = "video"
    source: str = "source"
    extra: dict[str, Any] = field(default_factory=dict)
    rejected: tuple[Any, ...] = ()
    num_global: int = 0

    @property
    def key(self) -> str:
        return f"key{self.ordinal}"

    @property
    def views(self) -> tuple[Tensor, ...]:
        frames = 1 if self.modality == "image" else 8
        return (torch.full((3, frames, 64, 64), self.ordinal % 256, dtype=torch.uint8),)


def collator(group: int = 6, **options: Any) -> MaskCollator:
    config = MaskConfig(group=GroupConfig(video=group, image=group), **options)
    return MaskCollator(config, seed=0, batch=BATCH, patch_size=8, tubelet_size=2)


def masks(collate: MaskCollator, ordinals: range, modality: str = "video") -> list[tuple[Tensor, Tensor]]:
    batch = collate([FakeSample(ordinal, modality) for ordinal in ordinals])
    return [(mask.context, mask.masked) for mask in batch.masks]


@pytest.mark.parametrize("modality", ["video", "image"])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_masks_do_not_depend_on_the_micro_batch(micro: int, modality: str) -> None:
    collate = collator()
    whole = masks(collate, range(18, 24), modality)
    for index, (context, masked) in enumerate(whole):
        parts = [masks(collate, range(start, start + micro), modality)[index] for start in range(18, 24, micro)]
        assert torch.equal(torch.cat([part[0] for part in parts]), context)
        assert torch.equal(torch.cat([part[1] for part in parts]), masked)


def test_counts_are_the_minimum_over_the_group_and_no_further() -> None:
    first, second = masks(collator(), range(12, 18))[0], masks(collator(), range(18, 24))[0]
    alone = [masks(collator(group=1), range(o, o + 1))[0] for o in range(12, 18)]
    assert first[0].shape[1] == min(context.shape[1] for context, _ in alone)
    assert first[1].shape[1] == min(masked.shape[1] for _, masked in alone)
    assert (first[0].shape, first[1].shape) != (second[0].shape, second[1].shape), "two groups of one step"


def test_context_and_masked_stay_disjoint_after_the_cut() -> None:
    for context, masked in masks(collator(), range(6)):
        for row in range(6):
            assert not set(context[row].tolist()) & set(masked[row].tolist())


def test_a_batch_knows_its_step_grid_and_keys() -> None:
    batch = collator()([FakeSample(ordinal) for ordinal in (24, 25, 26)])
    assert batch.step == 2
    assert batch.grid == (4, 8, 8)
    assert batch.keys == ("source/key24", "source/key25", "source/key26")
    assert batch.clips.shape == (3, 3, 8, 64, 64)
    assert [len(batch.masks), len(batch)] == [2, 3]


def test_extras_of_all_samples_travel_also_where_the_first_has_none() -> None:
    samples = [FakeSample(0), FakeSample(1, extra={"labels": {"class": 3}})]
    assert collator()(samples).extra == {"labels": [None, {"class": 3}]}


def test_a_micro_batch_over_a_group_s_border_is_refused() -> None:
    with pytest.raises(ValueError, match="reach over the mask group"):
        masks(collator(), range(4, 8))
    with pytest.raises(ValueError, match="reach over the mask group"):
        masks(collator(group=12), range(10, 14))


def count(
    world: int = 1,
    micro: dict[Modality, int | None] | None = None,
    batch: dict[Modality, int] | None = None,
    **group: int,
) -> int:
    config = MaskConfig(group=GroupConfig(**group)) if group else MaskConfig()
    return micro_batches_per_step(config, batch=batch or BATCH, world=world, micro_batch=micro or {})


def test_micro_batches_are_as_asked_or_as_few_as_the_groups_allow() -> None:
    assert count() == 1
    assert count(micro={"video": 2}) == 6
    assert count(micro={"video": 4, "image": 4}) == 3
    assert count(world=3, micro={"video": 2}) == 2
    reference: dict[Modality, int] = {"video": 3072, "image": 4608}
    assert count(world=128, batch=reference) == 1
    assert count(world=8, batch=reference) == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world": 5}, "must divide by the 5 ranks"),
        ({"micro": {"video": 5}}, "micro_batch.video=5 must divide"),
        ({"micro": {"video": 2, "image": 3}}, "one common number"),
        (
            {"batch": {"video": 72, "image": 180}, "video": 24, "image": 36},
            "set mask.group.video=72 mask.group.image=180, .* or batches of 24 x N video and 36 x N image clips a rank",
        ),
        ({"video": 5, "image": 12}, "mask.group.video=5 must divide the global batch"),
        ({"video": 4, "image": 12, "micro": {"video": 6}}, "must divide mask.group.video=4"),
        ({"batch": {"video": 0, "image": 0}}, "nothing to train on"),
    ],
)
def test_sizes_that_would_make_losses_depend_on_the_split_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count(**options)


def test_named_masks_can_be_any_number() -> None:
    collate = collator(video={"only": BlockMaskConfig(num_blocks=1, spatial_scale=0.3)})
    assert len(masks(collate, range(6))) == 1


def test_one_mask_a_step_is_drawn_by_the_step_and_the_same_for_every_micro_batch() -> None:
    tube = BlockMaskConfig(num_blocks=1, spatial_scale=0.3)
    future = BlockMaskConfig(kind="future", num_blocks=1, spatial_scale=1.0, temporal_scale=0.5)
    collate = collator(video={"tube": tube, "future": future}, per_step=1)
    is_future = []
    for step in range(40):
        first, second = (masks(collate, range(12 * step + start, 12 * step + start + 6)) for start in (0, 6))
        assert len(first) == len(second) == 1
        half = torch.arange(2 * 64)
        kinds = [bool(found[0][0].shape[1] == 128 and torch.equal(found[0][0][0], half)) for found in (first, second)]
        assert kinds[0] == kinds[1]
        is_future.append(kinds[0])
    assert 8 < sum(is_future) < 32


def test_a_null_mask_drops_the_name() -> None:
    only = BlockMaskConfig(num_blocks=1, spatial_scale=0.3)
    assert list(MaskConfig(video={"short": None, "only": only}).of("video")) == ["only"]
    with pytest.raises(ValueError, match="per_step=0"):
        MaskConfig(per_step=0)
