"""Claims: a mixture realises the shares it is given, in either order, and a source may have its own crops and rate."""

import dataclasses
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import ClipConfig, DataConfig, ModalityConfig, SourceClipConfig, SourceConfig
from data_pipeline.dataset import ClipDataset
from data_pipeline.loader import build_loader
from data_pipeline.plan import BLOCK, Order, Plan, Source
from data_pipeline.shards import Shards

VISIONMIX = [
    Source("ssv2", 168_000, 0.170),
    Source("kinetics", 733_000, 0.010),
    Source("howto100m", 1_100_000, 0.100),
    Source("yt_temporal_1b", 19_000_000, 0.720),
]


def config(shards: Path, order: Order = "shuffle", **clip: float) -> DataConfig:
    """Two sources of the same videos, the second with `clip` of its own."""
    sources = {"plain": SourceConfig(str(shards)), "own": SourceConfig(str(shards), clip=SourceClipConfig(**clip))}
    geometry = ClipConfig(frames=4, size=16, local=dataclasses.replace(ClipConfig().local, views=1, size=8))
    return DataConfig(video=ModalityConfig(sources, geometry, order), workers=0)


def test_the_papers_shares_are_exact_in_every_block_and_bounded_in_any_window():
    plan = Plan(0, VISIONMIX)
    assert plan.counts(range(5 * BLOCK, 6 * BLOCK)) == {
        "ssv2": 170,
        "kinetics": 10,
        "howto100m": 100,
        "yt_temporal_1b": 720,
    }
    for first, size in [(17, 3072), (999, 2), (5_123_456, 1500)]:
        counts = plan.counts(range(first, first + size))
        assert sum(counts.values()) == size
        for source in VISIONMIX:  # both ends of the window lie inside blocks
            assert abs(counts[source.name] - size * source.weight) <= 2 * BLOCK * source.weight * (1 - source.weight)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shares_with_replacement_are_those_of_independent_draws(seed: int):
    size = 20_000
    counts = Plan(seed, VISIONMIX, "replacement").counts(range(size))
    for source in VISIONMIX:
        deviation = math.sqrt(size * source.weight * (1 - source.weight))
        assert abs(counts[source.name] - size * source.weight) < 4.5 * deviation
    assert list(counts.values()) != [3400, 200, 2000, 14400]  # drawn, not dealt out


def test_with_replacement_a_draw_of_an_epochs_length_leaves_out_36_8_percent():
    plan = Plan(0, [Source("a", 10_000)], "replacement")
    drawn = Counter(plan.locate(ordinal).index for ordinal in range(10_000))
    assert 1 - len(drawn) / 10_000 == pytest.approx(1 / math.e, abs=0.02)
    assert sum(count > 1 for count in drawn.values()) / 10_000 == pytest.approx(1 - 2 / math.e, abs=0.02)
    parts = np.bincount(np.array([*drawn.elements()]) // 1000)
    assert abs(parts - 1000).max() < 150  # five standard deviations


def test_draws_of_neighbours_and_seeds_are_independent():
    def drawn(seed: int, name: str = "a") -> list[int]:
        plan = Plan(seed, [Source(name, 1000), Source("b", 1000)], "replacement")
        return [plan.locate(ordinal).index for ordinal in range(500)]

    assert drawn(0) == drawn(0)
    assert abs(np.corrcoef(drawn(0)[1:], drawn(0)[:-1])[0, 1]) < 0.15
    assert abs(np.corrcoef(drawn(0), drawn(1))[0, 1]) < 0.15


def test_with_replacement_no_share_is_too_small():
    rare = [Source("often", 10, 1.0), Source("seldom", 10, 1e-4)]
    with pytest.raises(ValueError, match="never be read"):
        Plan(0, rare)
    assert 0 < Plan(0, rare, "replacement").counts(range(60_000))["seldom"] < 20


def test_a_loader_with_replacement_resumes_exactly_on_any_number_of_ranks(shards: Path):
    def stream(world: int, start: int) -> list[list[tuple[int, str, bytes]]]:
        built = [
            build_loader(
                config(shards, "replacement"),
                seed=5,
                batch={"video": 6},
                world=world,
                rank=rank,
                start_step=start,
                stop_step=4,
            )
            for rank in range(world)
        ]
        steps = zip(*built, strict=True)
        return [
            [(sample.ordinal, sample.key, sample.clip.numpy().tobytes()) for part in step for sample in part["video"]]
            for step in steps
        ]

    whole = stream(1, 0)
    assert stream(3, 0) == whole
    assert stream(2, 2) == whole[2:]
    sources = [Source("plain", 10), Source("own", 10)]
    places = [Plan(5, sources, "replacement").locate(ordinal) for ordinal in range(24)]
    keys = [Shards(shards, "video").row(place.index)["key"] for place in places]
    assert [key for step in whole for _, key, _ in step] == keys


def test_a_sources_own_clips_differ_and_leave_the_others_as_they_are(shards: Path):
    plain = ClipDataset(config(shards), seed=0)
    mixed = ClipDataset(config(shards, fps=8.0, scale_min=1.0, aspect_min=1.0, aspect_max=1.0, flip=0.0), seed=0)
    rates = {"plain": 0.25, "own": 0.125}
    for ordinal in range(12):
        before, after = plain.sample("video", ordinal), mixed.sample("video", ordinal)
        same = [bool((one == other).all()) for one, other in zip(before.views, after.views, strict=True)]
        assert (before.source, before.key) == (after.source, after.key)
        assert all(same) == (after.source == "plain")
        assert np.diff(after.extra["timestamps"]) == pytest.approx(rates[after.source])
        assert [view.shape for view in after.views] == [(3, 4, 16, 16), (3, 4, 8, 8)]


def test_a_whole_square_clip_of_one_source_is_the_picture_as_it_was_stored(shards: Path):
    sources = {
        "own": SourceConfig(str(shards), clip=SourceClipConfig(scale_min=1.0, aspect_min=1, aspect_max=1, flip=0))
    }
    whole = DataConfig(image=ModalityConfig(sources, ClipConfig(frames=1, size=32)), workers=0)
    crops = {}
    for seed in (0, 1):
        dataset = ClipDataset(whole, seed=seed)
        for ordinal in range(7):
            sample = dataset.sample("image", ordinal)
            crops.setdefault(sample.key, set()).add(sample.clip.numpy().tobytes())
    assert all(len(found) == 1 for found in crops.values())  # no crop, no flip: always the same
