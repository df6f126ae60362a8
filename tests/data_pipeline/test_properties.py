"""Claims, for whatever hypothesis thinks of: exactly once, elastic, deterministic, resumed anywhere, in any mixture."""

import io
import tempfile
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.config import ClipConfig, DataConfig, ModalityConfig, SourceConfig
from data_pipeline.dataset import ClipDataset
from data_pipeline.loader import build_loader
from data_pipeline.plan import BLOCK, Order, Plan, Source, micro_batches, permute, quotas
from data_pipeline.prepare.writer import SeriesWriter, write_manifest
from data_pipeline.sample import Sample

seeds = st.integers(0, 2**32)
orders: st.SearchStrategy[Order] = st.sampled_from(("shuffle", "replacement"))
ordinals = st.integers(0, 10**12)


@st.composite
def mixtures(draw: st.DrawFn) -> list[Source]:
    """One to four sources of 1 to 400 records; shares of 1/80 and more."""
    parts = draw(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 20)), min_size=1, max_size=4))
    return [Source(f"source {i}", size, float(weight)) for i, (size, weight) in enumerate(parts)]


@st.composite
def shares_of_ranks(draw: st.DrawFn) -> tuple[int, int, int]:
    """A global batch that divides, ranks, micro-batches."""
    world, accumulate, micro = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    return world * accumulate * micro, world, accumulate


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(max_examples=50)
def test_a_permutation_is_one(size: int, key: int):
    assert sorted(permute(position, size, key) for position in range(size)) == list(range(size))


@given(seeds, mixtures(), st.integers(1, 2))
@settings(max_examples=40)
def test_every_record_comes_once_in_each_pass_over_its_source(seed: int, sources: list[Source], blocks: int):
    plan = Plan(seed, sources)
    passes: dict[tuple[int, int], list[int]] = defaultdict(list)
    for ordinal in range(blocks * BLOCK):
        place = plan.locate(ordinal)
        passes[place.source, place.epoch].append(place.index)
    for (source, epoch), indices in passes.items():
        size = sources[source].size
        assert len(set(indices)) == len(indices)
        if (source, epoch + 1) in passes or len(indices) == size:
            assert sorted(indices) == list(range(size))
    for source in range(len(sources)):
        assert sorted(epoch for each, epoch in passes if each == source) == list(
            range(max(passes_of(passes, source)) + 1)
        )


def passes_of(passes: dict[tuple[int, int], list[int]], source: int) -> list[int]:
    return [epoch for each, epoch in passes if each == source]


@given(seeds, mixtures(), ordinals, st.integers(1, 2 * BLOCK))
@settings(max_examples=20)
def test_realised_shares_are_exact_over_blocks_and_bounded_over_windows(
    seed: int, sources: list[Source], first: int, size: int
):
    exact = quotas(sources)
    total = sum(source.weight for source in sources)
    assert all(abs(quota - BLOCK * each.weight / total) < 1 for quota, each in zip(exact, sources, strict=True))
    plan = Plan(seed, sources)
    block = first // BLOCK * BLOCK
    assert list(plan.counts(range(block, block + BLOCK)).values()) == exact
    counts = plan.counts(range(first, first + size))
    for quota, count in zip(exact, counts.values(), strict=True):
        assert abs(count - size * quota / BLOCK) <= 2 * quota * (1 - quota / BLOCK) + 1e-9


@given(seeds, mixtures(), ordinals)
@settings(max_examples=30)
def test_shares_with_replacement_stay_within_the_binomial_bound(seed: int, sources: list[Source], first: int):
    total, size = sum(source.weight for source in sources), 1000
    counts = Plan(seed, sources, "replacement").counts(range(first, first + size))
    for source in sources:
        share = source.weight / total
        assert abs(counts[source.name] - size * share) <= 5 * (size * share * (1 - share)) ** 0.5 + 1


@given(seeds, mixtures(), orders, st.lists(ordinals, min_size=1, max_size=20))
def test_a_place_is_a_pure_function_of_seed_sources_and_ordinal(
    seed: int, sources: list[Source], order: Order, wanted: list[int]
):
    plan = Plan(seed, sources, order)
    forwards = [plan.locate(ordinal) for ordinal in wanted]
    fresh = Plan(seed, list(sources), order)
    assert [fresh.locate(ordinal) for ordinal in reversed(wanted)] == forwards[::-1]
    for place in forwards:
        assert 0 <= place.index < sources[place.source].size
        assert place.epoch >= 0


@given(seeds, mixtures(), orders, ordinals, st.integers(1, 10))
def test_a_substitute_is_of_the_same_source_and_fixed(
    seed: int, sources: list[Source], order: Order, ordinal: int, attempt: int
):
    plan = Plan(seed, sources, order)
    place = plan.substitute(ordinal, attempt)
    assert place == Plan(seed, list(sources), order).substitute(ordinal, attempt)
    assert place.source == plan.locate(ordinal).source
    assert 0 <= place.index < sources[place.source].size


@given(shares_of_ranks(), st.integers(0, 10**9))
def test_ranks_and_micro_batches_cut_a_step_without_gap_or_overlap(shares: tuple[int, int, int], step: int):
    batch, world, accumulate = shares
    parts = [
        part
        for rank in range(world)
        for part in micro_batches(step, global_batch=batch, world=world, rank=rank, accumulate=accumulate)
    ]
    assert [ordinal for part in parts for ordinal in part] == list(range(step * batch, (step + 1) * batch))
    assert len({len(part) for part in parts}) == 1


@cache
def folder(records: int, per_shard: int, bad: int | None) -> Path:
    """Shards of so many 8x8 pictures, `per_shard` in each; one of them is none."""
    out = Path(tempfile.mkdtemp(dir=_scratch[0]))
    series = SeriesWriter(out, "image", shard_bytes=1 << 30, shard_count=per_shard)
    for i in range(records):
        file = io.BytesIO()
        Image.frombytes("RGB", (8, 8), bytes((i + 3 * j) % 256 for j in range(192))).save(file, "png")
        series.write(f"{i}", "png", b"no picture" if i == bad else file.getvalue(), {"source_path": f"{i}.png"})
    series.close()
    write_manifest(out, series.entries)
    return out


_scratch: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory) -> None:
    _scratch[:] = [tmp_path_factory.mktemp("shards")]


@st.composite
def data(draw: st.DrawFn) -> DataConfig:
    """One to three sources of 2 to 12 pictures in shards of 1 to 5, sometimes with a broken one."""
    sources = {}
    for name in draw(st.sampled_from(["a", "ab", "abc"])):
        records = draw(st.integers(2, 12))
        bad = draw(st.none() | st.integers(0, records - 1))
        path = folder(records, draw(st.integers(1, 5)), bad)
        sources[name] = SourceConfig(str(path), weight=draw(st.integers(1, 4)))
    part = ModalityConfig(sources, ClipConfig(frames=1, size=4), draw(orders))
    return DataConfig(image=part, workers=draw(st.sampled_from([0, 0, 0, 1, 2, 3])), bad_attempts=40)


def content(sample: Sample) -> tuple[object, ...]:
    return sample.ordinal, sample.source, sample.key, sample.clip.numpy().tobytes(), sample.rejected


@given(data(), shares_of_ranks(), seeds, st.integers(0, 50), st.integers(1, 3))
@settings(max_examples=30)
def test_any_ranks_workers_and_start_give_the_global_batches_of_one_process(
    config: DataConfig, shares: tuple[int, int, int], seed: int, start: int, steps: int
):
    batch, world, accumulate = shares
    dataset = ClipDataset(config, seed=seed)
    reference = [content(dataset.sample("image", i)) for i in range(start * batch, (start + steps) * batch)]
    found: dict[int, list[tuple[object, ...]]] = defaultdict(list)
    for rank in range(world):
        loader = build_loader(
            config,
            seed=seed,
            batch={"image": batch},
            world=world,
            rank=rank,
            accumulate=accumulate,
            start_step=start,
            stop_step=start + steps,
        )
        items = list(loader)
        assert len(items) == steps * accumulate
        for i, item in enumerate(items):
            found[i // accumulate] += map(content, item["image"])
    assert [entry for step in range(steps) for entry in found[step]] == reference


@given(st.integers(2, 12), st.integers(1, 5), st.integers(0, 11), seeds, st.integers(1, 4))
@settings(max_examples=20)
def test_an_epoch_has_every_record_once_but_a_broken_one_which_is_named(
    records: int, per_shard: int, broken: int, seed: int, batch: int
):
    bad = broken if broken < records else None
    sources = {"a": SourceConfig(str(folder(records, per_shard, bad)))}
    config = DataConfig(image=ModalityConfig(sources, ClipConfig(frames=1, size=4)), workers=0)
    loader = build_loader(config, seed=seed, batch={"image": batch}, stop_step=records)
    samples = [sample for item in loader for sample in item["image"]]
    for epoch in range(batch):
        part = samples[epoch * records : (epoch + 1) * records]
        wanted = [sample.rejected[0].key if sample.rejected else sample.key for sample in part]
        assert sorted(wanted, key=int) == [f"{i}" for i in range(records)]
        assert [bad.key for sample in part for bad in sample.rejected[:1]] == ([] if bad is None else [f"{bad}"])
        assert all(sample.key != f"{bad}" for sample in part)
