"""Views and the tokens that are kept of them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.masking.test_collate import BATCH, FakeSample
from vjepa.batch import Batch, Modality
from vjepa.masking.collate import GroupConfig, MaskCollator, MaskConfig, ViewsConfig


@dataclass(frozen=True)
class MultiCrop(FakeSample):
    """Two global views of 64 pixels and three local ones of 24."""

    num_global: int = 2

    @property
    def views(self) -> tuple[Tensor, ...]:
        frames = 1 if self.modality == "image" else 8
        return tuple(torch.zeros(3, frames, size, size, dtype=torch.uint8) for size in (64, 64, 24, 24, 24))


def collate(
    config: MaskConfig,
    ordinals: range,
    modality: Modality = "video",
    *,
    seed: int = 0,
    sample: type[FakeSample] = MultiCrop,
) -> Batch:
    collator = MaskCollator(config, seed=seed, batch=BATCH, patch_size=8, tubelet_size=2)
    return collator([sample(ordinal, modality) for ordinal in ordinals])


def keep(share: float) -> MaskConfig:
    return MaskConfig(group=GroupConfig(6, 6), views=ViewsConfig(share))


def contexts(batch: Batch) -> list[Tensor]:
    return [context for context in batch.view_contexts if context is not None]


def test_a_batch_has_its_views_stacked_and_says_which_are_global() -> None:
    batch = collate(keep(1.0), range(3))
    assert [tuple(view.shape) for view in batch.views] == [(3, 3, 8, 64, 64)] * 2 + [(3, 3, 8, 24, 24)] * 3
    assert batch.num_global == 2
    assert batch.clips is batch.views[0]
    assert batch.grid == (4, 8, 8)
    assert collate(keep(1.0), range(3), sample=FakeSample).num_global == 1


def test_all_tokens_are_kept_by_default() -> None:
    assert collate(keep(1.0), range(3)).view_contexts == (None,) * 5


@pytest.mark.parametrize(("modality", "steps"), [("video", 4), ("image", 1)])
def test_the_share_is_kept_of_every_view_unique_and_ascending(modality: Modality, steps: int) -> None:
    found = contexts(collate(keep(0.3), range(6), modality))
    tokens = [64 * steps] * 2 + [9 * steps] * 3
    assert [tuple(context.shape) for context in found] == [(6, round(0.3 * count)) for count in tokens]
    for context, count in zip(found, tokens, strict=True):
        assert context.dtype == torch.int64
        assert (context.diff(dim=1) > 0).all()
        assert 0 <= int(context.min()) <= int(context.max()) < count


def test_at_least_one_token_is_kept() -> None:
    assert [context.shape[1] for context in contexts(collate(keep(0.05), range(2), "image"))] == [3, 3, 1, 1, 1]


def test_a_single_view_loses_tokens_too() -> None:
    [context] = contexts(collate(keep(0.5), range(4), sample=FakeSample))
    assert context.shape == (4, 128)


def test_every_token_is_kept_equally_often() -> None:
    kept = torch.cat([contexts(collate(keep(0.25), range(6 * i, 6 * i + 6)))[0] for i in range(50)])
    counts = torch.bincount(kept.flatten(), minlength=256)
    assert counts.float().mean() == 75
    assert 45 < counts.min() <= counts.max() < 105  # 4 standard deviations of 7.5


def test_clips_views_steps_and_seeds_lose_different_tokens() -> None:
    first, second = contexts(collate(keep(0.5), range(6)))[:2]
    others = [second, contexts(collate(keep(0.5), range(6), seed=1))[0], contexts(collate(keep(0.5), range(12, 18)))[0]]
    assert all(not torch.equal(first, other) for other in others)
    assert not torch.equal(first[0], first[1])
    local = contexts(collate(keep(0.5), range(6)))[2:]
    assert not torch.equal(local[0], local[1])
    assert all(
        torch.equal(*pair) for pair in zip(contexts(collate(keep(0.5), range(6))), [first, second, *local], strict=True)
    )


@pytest.mark.parametrize("modality", ["video", "image"])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_kept_tokens_do_not_depend_on_the_micro_batch(modality: Modality, micro: int) -> None:
    whole = contexts(collate(keep(0.3), range(18, 24), modality))
    parts = [contexts(collate(keep(0.3), range(o, o + micro), modality)) for o in range(18, 24, micro)]
    for view, context in enumerate(whole):
        assert torch.equal(context, torch.cat([part[view] for part in parts]))


def test_kept_tokens_travel_with_their_clips() -> None:
    batch = collate(keep(0.3), range(6))
    taken = batch.take(slice(2, 5))
    assert taken.num_global == 2
    for part, whole in zip(contexts(taken), contexts(batch), strict=True):
        assert torch.equal(part, whole[2:5])
    moved = batch.to(torch.device("meta"))
    assert all(context.is_meta for context in contexts(moved))
    assert collate(keep(1.0), range(6)).take(slice(0, 2)).to(torch.device("meta")).view_contexts == (None,) * 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning needs CUDA")
def test_kept_tokens_are_pinned_with_the_pixels() -> None:
    pinned = collate(keep(0.3), range(6)).pin_memory()
    assert all(tensor.is_pinned() for tensor in (*pinned.views, *contexts(pinned)))


def test_a_batch_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="num_global=3"):
        Batch("video", 0, (), (), (torch.zeros(0), torch.zeros(0)), (), (1, 1, 1), num_global=3)
    with pytest.raises(ValueError, match="1 view_contexts, one for each"):
        Batch("video", 0, (), (), (torch.zeros(0), torch.zeros(0)), (), (1, 1, 1), view_contexts=(None,))


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"mask\.views\.keep="):
        ViewsConfig(share)
