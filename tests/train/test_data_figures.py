"""What the log says of the data: shares, bad records by source, times; counted by workers, summed over ranks."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline import dataset
from data_pipeline.config import ClipConfig, DataConfig, ModalityConfig, SourceConfig
from data_pipeline.dataset import ClipDataset
from data_pipeline.decode import DecodeError
from data_pipeline.figures import DataFigures
from data_pipeline.in_flight import Attempt
from data_pipeline.loader import build_loader
from tests.train.test_health import Poison
from vjepa.train.data_counts import DataCounts
from vjepa.train.distributed import World

DebugRun = Callable[..., Path]
ONE = World(0, 1, torch.device("cpu"))
COSTS = {"read_ms", "decode_ms", "crop_ms"}


def rows(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def mixture(shards: Path, *, workers: int = 0) -> DataConfig:
    """Three parts of `much` to one of `little`."""
    sources = {"much": SourceConfig(str(shards), weight=3), "little": SourceConfig(str(shards), weight=1)}
    return DataConfig(
        video=ModalityConfig(sources, ClipConfig(frames=2, fps=8.0, size=16)), workers=workers, max_bad_fraction=0.05
    )


class TwoRanks(World):
    """A rank whose other one sends the same, or `theirs`."""

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, ["video/other/samples"]]


# ------------------------------------------------------------------------------------------------------------ counting


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_of_each_source_are_counted_in_whatever_process(debug_shards: Path, workers: int) -> None:
    config = mixture(debug_shards, workers=workers)
    loader = build_loader(config, seed=0, batch={"video": 20}, stop_step=4)
    sources = [sample.source for item in loader for sample in item["video"]]
    counted = loader.dataset.counters()["video"]
    assert {name: fields["samples"] for name, fields in counted.items()} == {
        name: sources.count(name) for name in ("much", "little")
    }
    assert all(fields["decode_seconds"] > 0 and fields["crop_seconds"] > 0 for fields in counted.values())
    assert all(fields["bad"] == 0 for fields in counted.values())


def test_figures_are_shares_and_milliseconds_a_sample(debug_shards: Path) -> None:
    figures = DataFigures(mixture(debug_shards))
    figures.watch(ClipDataset(mixture(debug_shards), seed=0))
    before = dict.fromkeys(figures.read(), 0.0)
    more = {"samples": 30, "bad": 3, "records": 33, "wait_seconds": 0.66, "decode_seconds": 0.9, "crop_seconds": 0.06}
    network = {"requests": 40, "retries": 2, "cache_hits": 8, "cache_misses": 24}
    now = before | {"worker_seconds": 3.24} | {f"video/much/{name}": value for name, value in (more | network).items()}
    now |= {"video/little/samples": 10.0}
    assert figures.figures(now, now) == pytest.approx(
        {
            "video/much/share": 0.75,
            "video/much/bad_share": 0.1,
            "video/much/read_ms": 20,
            "video/much/decode_ms": 30,
            "video/much/crop_ms": 2,
            "video/much/retries": 2,
            "video/much/cache_hit_share": 0.25,
            "video/little/share": 0.25,
            "video/little/bad_share": 0,
            "workers_busy": 0.5,
            "workers_lost": 0,
            "workers_recycled": 0,
        }
    )
    later = figures.figures(before, now)  # nothing since: shares stay, times are not made up
    assert later.keys() == {f"video/{s}/{name}" for s in ("much", "little") for name in ("share", "bad_share")} | {
        "workers_busy",
        "workers_lost",
        "workers_recycled",
    }


@pytest.mark.parametrize(("samples", "bad", "is_told"), [(200, 10, False), (200, 11, True), (199, 190, False)])
def test_a_source_is_judged_by_the_limit_of_all_once_it_gave_enough_samples(
    debug_shards: Path, samples: int, bad: int, is_told: bool
) -> None:
    figures = DataFigures(mixture(debug_shards))
    figures.watch(ClipDataset(mixture(debug_shards), seed=0))
    whole = dict.fromkeys(figures.read(), 0.0) | {
        "video/little/samples": float(samples),
        "video/little/bad": float(bad),
    }
    assert list(figures.alarms(whole)) == (["video/little"] if is_told else [])


# -------------------------------------------------------------------------------------------------------- in the log


def test_a_run_logs_what_its_data_cost(debug_run: DebugRun, debug_shards: Path, tmp_path: Path) -> None:
    mixed = ("data.video.sources.debug.weight=3", f"data.video.sources.little.path={debug_shards}")
    found = rows(debug_run(tmp_path / "run", *mixed, "data.workers=1", "train.steps=12", "train.log_every=4"))
    assert [row["step"] for row in found] == [1, 4, 8, 10, 12]
    for row in found:
        wanted = {f"data/video/{source}/{name}" for source in ("debug", "little") for name in ("share", "bad_share")}
        assert wanted | {"data/clips_per_second", "data/wait_share", "data/workers_busy"} <= row.keys()
        assert not [name for name in row if name.endswith(("cache_hit_share", "retries"))]
        assert row["data/workers_busy"] >= 0  # 0 once they have made the last batches
        assert 0 <= row["data/wait_share"] <= 1
    assert found[0]["data/workers_busy"] > 0
    # What a worker was at between two rows counts in the later one, which may have more than its own seconds.
    spans = [steps / row["data/clips_per_second"] for steps, row in zip((1, 3, 4, 2, 2), found, strict=True)]
    busy = sum(span * row["data/workers_busy"] for span, row in zip(spans, found, strict=True))
    assert busy <= 1.01 * sum(spans)
    for source, share in (("debug", 0.75), ("little", 0.25)):
        assert {name.rsplit("/")[-1] for row in found for name in row if f"/{source}/" in name} >= COSTS
        assert found[-1][f"data/video/{source}/share"] == pytest.approx(share, abs=0.1)


def test_a_resumed_run_counts_from_where_it_goes_on(debug_run: DebugRun, tmp_path: Path) -> None:
    steps = ("train.steps=8", "train.log_every=1", "train.checkpoint.every=4")
    run_dir = debug_run(tmp_path / "run", *steps)
    whole = rows(run_dir)
    [last] = (run_dir / "checkpoints").glob("*8")
    last.rename(tmp_path / "step_00000008")
    again = rows(debug_run(run_dir, *steps, resume=True))
    assert [row["step"] for row in again] == list(range(1, 9))
    assert all(row["data/clips_per_second"] > 0 for row in again)
    assert again[:4] == whole[:4]
    assert all(row["data/video/debug/decode_ms"] > 0 for row in again)


def test_after_a_roll_back_the_new_loader_is_counted_from_zero(
    debug_run: DebugRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures, spent = DataFigures.figures, []

    def look(self: DataFigures, since: Mapping[str, float], whole: Mapping[str, float]) -> dict[str, float]:
        spent.append((since["video/debug/samples"], whole["video/debug/samples"]))
        return figures(self, since, whole)

    monkeypatch.setattr(DataFigures, "figures", look)
    Poison(monkeypatch, {6: math.nan})
    policy = ("train.health.non_finite=roll_back", "train.checkpoint.every=4", "train.log_every=1", "train.steps=8")
    assert len(rows(debug_run(tmp_path / "run", *policy))) == 8
    assert [since for since, _ in spent] == [12.0] * 10, "six steps, then from the fifth to the eighth again"
    assert [whole for _, whole in spent] == [12.0 * step for step in (1, 2, 3, 4, 5, 6, 1, 2, 3, 4)]


def test_a_source_with_too_many_bad_records_is_named_once_and_the_run_goes_on(
    debug_run: DebugRun, debug_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """One in four records of a source that gives one in twenty samples is bad: one in eighty of all videos."""
    sources = ("data.video.sources.debug.weight=19", f"data.video.sources.rotten.path={debug_shards}")
    load, seen = ClipDataset._load, []

    def often_bad(self: ClipDataset, attempt: Attempt, place: Any, rejected: Any) -> Any:
        if attempt.modality == "video" and place.source == 1 and not attempt.number:
            seen.append(attempt.ordinal)
            if len(seen) % 4 == 0:
                raise DecodeError("rotten")
        return load(self, attempt, place, rejected)

    monkeypatch.setattr(dataset.ClipDataset, "_load", often_bad)
    monkeypatch.setattr("data_pipeline.figures.JUDGED_FROM", 8)
    limit = ("data.max_bad_fraction=0.1", "train.steps=30", "train.log_every=1")
    found = rows(debug_run(tmp_path / "run", *sources, *limit))
    assert len(found) == 30
    told = capsys.readouterr().out
    assert told.count("ALARM at step") == told.count("video source rotten: ") == 1
    assert "above data.max_bad_fraction=10.0%" in told
    last = found[-1]
    assert last["data/video/rotten/bad_share"] == pytest.approx((len(seen) // 4) / len(seen))
    assert last["data/video/debug/bad_share"] == 0


# ------------------------------------------------------------------------------------------------------------ summing


class Made:
    """Counters by hand: what a loader of one's own may bring."""

    def __init__(self) -> None:
        self.count = 0.0

    def read(self) -> dict[str, float]:
        self.count += 5
        return {"frames": self.count}

    def figures(self, since: Mapping[str, float], whole: Mapping[str, float]) -> dict[str, float]:
        return {"new_frames": since["frames"], "all_frames": whole["frames"]}

    def alarms(self, whole: Mapping[str, float]) -> dict[str, str]:
        return {"many": "many frames"} if whole["frames"] > 7 else {}


def test_rows_are_differences_and_alarms_come_once() -> None:
    counts = DataCounts(Made(), ONE)
    counts.add(clips=6, waited=0.0)
    first = counts.row(counts.snapshot())
    assert (first["data/new_frames"], first["data/all_frames"], counts.alarms()) == (5, 5, [])
    second = counts.row(counts.snapshot())
    assert (second["data/new_frames"], second["data/all_frames"], counts.alarms()) == (5, 10, ["many frames"])
    assert first["data/clips_per_second"] > second["data/clips_per_second"] == 0
    counts.row(counts.snapshot())
    assert counts.alarms() == []


def test_sums_over_ranks_give_the_rate_of_all_and_the_mean_wait() -> None:
    two = World(0, 2, torch.device("cpu"))
    row = DataCounts(None, two).row({"clips": 60.0, "wait_seconds": 1.0, "seconds": 20.0})
    assert row == {"data/clips_per_second": 6.0, "data/wait_share": 0.05}


def test_ranks_that_count_other_things_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rank 0 and rank 1 count their data under different names \(frames, video"):
        DataCounts(Made(), TwoRanks(0, 2, torch.device("cpu"))).snapshot()
