"""Claims: the order is a shuffle, exact in its shares, and blind to ranks and micro-batches."""

from collections import Counter

import numpy as np
import pytest

from data_pipeline.plan import BLOCK, Place, Plan, Source, micro_batches, permute


@pytest.mark.parametrize("size", [1, 2, 3, 10, 64, 65, 1000, 4097])
def test_permute_is_a_permutation(size: int):
    assert sorted(permute(i, size, key=7) for i in range(size)) == list(range(size))


def test_permute_spreads_every_position_evenly():
    counts = np.zeros((10, 10))
    for key in range(2000):
        for position in range(10):
            counts[position, permute(position, 10, key * 0x9E3779B97F4A7C15 % 2**64)] += 1
    assert abs(counts / 2000 - 0.1).max() < 0.03  # four standard deviations of a fair shuffle


def test_each_sample_comes_once_per_epoch_in_another_order():
    plan = Plan(0, [Source("a", 37)])
    epochs = [[plan.locate(epoch * 37 + i) for i in range(37)] for epoch in range(3)]
    orders = [[place.index for place in epoch] for epoch in epochs]
    assert [sorted(order) for order in orders] == [list(range(37))] * 3
    assert orders[0] != orders[1] != orders[2] != list(range(37))
    assert [{place.epoch for place in epoch} for epoch in epochs] == [{0}, {1}, {2}]


def test_seed_and_source_name_change_the_order():
    def order(seed: int, name: str) -> list[int]:
        return [Plan(seed, [Source(name, 100)]).locate(i).index for i in range(100)]

    assert order(0, "a") == order(0, "a")
    assert order(0, "a") != order(1, "a")
    assert order(0, "a") != order(0, "b")


def test_the_order_never_changes_between_versions():
    assert [Plan(0, [Source("a", 1000)]).locate(i).index for i in range(4)] == [951, 123, 658, 83]


def test_mixture_shares_are_exact_in_every_block():
    plan = Plan(3, [Source("a", 70, 5.0), Source("b", 900, 3.0), Source("c", 11, 2.0)])
    for block in range(3):
        places = [plan.locate(block * BLOCK + i) for i in range(BLOCK)]
        assert Counter(place.source for place in places) == {0: 500, 1: 300, 2: 200}


def test_mixture_gives_each_sample_once_per_pass_over_its_source():
    sources = [Source("a", 70, 1.0), Source("b", 30, 2.0)]
    plan = Plan(3, sources)
    seen: dict[tuple[int, int], list[int]] = {}
    for i in range(3 * BLOCK):
        place = plan.locate(i)
        seen.setdefault((place.source, place.epoch), []).append(place.index)
    complete = [(source, found) for (source, epoch), found in seen.items() if (source, epoch + 1) in seen]
    assert len(complete) > 50
    for source, found in complete:
        assert sorted(found) == list(range(sources[source].size))


def test_mixture_is_mixed_inside_a_block():
    plan = Plan(0, [Source("a", 1000, 1.0), Source("b", 1000, 1.0)])
    counts = [sum(plan.locate(i).source for i in range(start, start + 100)) for start in range(0, BLOCK, 100)]
    assert min(counts) > 25
    assert max(counts) < 75


def test_a_share_too_small_to_be_read_is_refused():
    with pytest.raises(ValueError, match=r"'b'.*never be read.*raise its weight"):
        Plan(0, [Source("a", 10, 1.0), Source("b", 10, 1e-6)])


def test_the_steps_ordinals_are_the_same_for_any_world_and_accumulation():
    whole = micro_batches(5, global_batch=12, world=1, rank=0)
    assert whole == [range(60, 72)]
    for world, accumulate in [(2, 1), (3, 2), (4, 3), (12, 1), (1, 6)]:
        parts = [
            part
            for rank in range(world)
            for part in micro_batches(5, global_batch=12, world=world, rank=rank, accumulate=accumulate)
        ]
        assert [i for part in parts for i in part] == list(whole[0])


def test_a_batch_that_does_not_divide_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"global batch 10 does not divide into 2 ranks x 3 .*multiple of 6"):
        micro_batches(0, global_batch=10, world=2, rank=0, accumulate=3)


def test_a_substitute_is_fixed_by_ordinal_and_attempt_and_of_the_same_source():
    plan = Plan(0, [Source("a", 100, 1.0), Source("b", 100, 1.0)])
    first = [plan.substitute(5, attempt) for attempt in range(1, 6)]
    assert first == [plan.substitute(5, attempt) for attempt in range(1, 6)]
    assert {place.source for place in first} == {plan.locate(5).source}
    assert len({place.index for place in first}) > 1
    assert isinstance(first[0], Place)
