"""Claims: a worker that is killed, crashes, hangs or leaks is named and replaced, and the data stay exact."""

import ctypes
import faulthandler
import hashlib
import json
import logging
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from test_loader import config, stream

from data_pipeline import dataset as dataset_module
from data_pipeline import loader as loader_module
from data_pipeline import workers as workers_module
from data_pipeline.config import ClipConfig, DataConfig, ModalityConfig, SourceConfig
from data_pipeline.decode import open_decoder
from data_pipeline.loader import Loader, build_loader
from data_pipeline.prepare.synthetic import make_debug_shards
from data_pipeline.sample import BadSample, Sample
from data_pipeline.shards import Shards

STEPS = 6


def built(shards: Path, workers: int = 2, steps: int = STEPS, **values: object) -> Loader:
    settings: DataConfig = config(shards, workers, **values)
    return build_loader(settings, seed=1, batch={"video": 5, "image": 7}, stop_step=steps)


def crash() -> None:
    """A segmentation fault, without the test runner's report of it."""
    faulthandler.disable()
    os.kill(os.getpid(), signal.SIGSEGV)


def rejected(items: list[dict[str, list[Sample]]]) -> list[BadSample]:
    return [bad for item in items for samples in item.values() for sample in samples for bad in sample.rejected]


@pytest.fixture
def on_decoding(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], str]:
    """Set what happens in a worker when the fourth video is decoded; its key."""
    data, row = Shards(shards, "video").read(3)
    wanted, parent = hashlib.sha256(data).digest(), os.getpid()

    def install(happen: Callable[[], Any]) -> str:
        def opened(data: bytes, *arguments: Any, **options: Any) -> Any:
            if hashlib.sha256(data).digest() == wanted and os.getpid() != parent:
                happen()
            return open_decoder(data, *arguments, **options)

        monkeypatch.setattr(dataset_module, "open_decoder", opened)
        return row["key"]

    return install


def wait_until(is_so: Callable[[], bool]) -> None:
    """Returns when it is so; fails after two minutes."""
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen within two minutes"
        time.sleep(0.002)


def worker_pids() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid]


def test_killed_workers_change_nothing(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def held(samples: list[Sample]) -> list[Sample]:
        """In a worker: it has made so much, and goes on when it may."""
        if samples[0].modality == "video":
            step = samples[0].ordinal // 5
            (tmp_path / f"{os.getpid()} makes {step}").touch()
            wait_until((tmp_path / f"go {step}").exists)
        return samples

    def workers_of(steps: range) -> list[int]:
        """The worker that is held at each step and was not killed there."""
        found = [path.name.split() for path in tmp_path.glob("* makes *")]
        return [int(pid) for step in steps for pid, _, at in found if int(at) == step and int(pid) not in killed]

    whole, items, killed = stream(built(shards)), [], set[int]()
    batch = {"video": 5, "image": 7}
    disturbed = build_loader(config(shards, 2, prefetch=1), seed=1, batch=batch, stop_step=STEPS, collate=held)
    with caplog.at_level(logging.WARNING):
        (tmp_path / "go 0").touch()
        for item in disturbed:
            items.append(item)
            ahead = range(len(items), min(len(items) + 2, STEPS))
            wait_until(lambda ahead=ahead: len(workers_of(ahead)) == len(ahead))
            for pid in workers_of(ahead)[len(items) % 2 :][:1]:  # now the one, now the other
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            (tmp_path / f"go {len(items)}").touch()
    assert stream(items) == whole
    assert disturbed.events.died == len(killed) == 4  # while there are two steps to go
    assert not rejected(items)
    assert "is replaced" in caplog.text
    assert not worker_pids()


def test_a_file_that_crashes_its_decoder_costs_that_sample(
    shards: Path, on_decoding: Callable[..., str], caplog: pytest.LogCaptureFixture
):
    whole = stream(built(shards))["video"]
    key = on_decoding(crash)
    crashing = built(shards)
    items = list(crashing)
    bad = rejected(items)
    assert {each.key for each in bad} == {key}
    assert all("cost 2 workers" in each.reason and "SIGSEGV" in each.reason for each in bad)
    ordinals = {each.ordinal for each in bad}
    assert len(ordinals) == 3  # of three epochs
    found = stream(items)["video"]
    assert [each for each in found if each[0] not in ordinals] == [each for each in whole if each[0] not in ordinals]
    assert f"decoding debug/{key} (video ordinal {min(ordinals)})" in caplog.text
    again = stream(built(shards, workers=1))["video"]
    assert again == found  # the substitutes too
    assert crashing.events.died == 6


def test_a_file_that_hangs_its_decoder_with_the_interpreter_locked_costs_that_sample(
    shards: Path, on_decoding: Callable[..., str]
):
    key = on_decoding(lambda: ctypes.PyDLL(None).sleep(3600))
    hanging = built(shards, sample_timeout=1.5, steps=2)  # one epoch of the videos
    items = list(hanging)
    assert {each.key for each in rejected(items)} == {key}
    assert all("took longer than 1.5 s" in each.reason for each in rejected(items))
    assert hanging.events.timed_out >= 2
    assert len(items) == 2


def test_a_crash_that_does_not_come_again_costs_nothing(shards: Path, on_decoding: Callable[..., str], tmp_path: Path):
    whole = stream(built(shards))

    def once() -> None:
        if not (tmp_path / "crashed").exists():
            (tmp_path / "crashed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    on_decoding(once)
    items = list(built(shards))
    assert (tmp_path / "crashed").exists()
    assert stream(items) == whole
    assert not rejected(items)


def test_a_worker_that_dies_before_it_begins_blames_no_sample(
    shards: Path, on_decoding: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its place still named what the worker before it was decoding."""
    whole, begin = stream(built(shards)), workers_module.start_worker

    def once_more(parent: int, number: int) -> None:
        if (tmp_path / "crashed").exists() and not (tmp_path / "again").exists():
            (tmp_path / "again").touch()
            crash()
        begin(parent, number)

    def once() -> None:
        if not (tmp_path / "crashed").exists():
            (tmp_path / "crashed").touch()
            crash()

    on_decoding(once)
    monkeypatch.setattr(workers_module, "start_worker", once_more)
    disturbed = built(shards, workers=1)
    items = list(disturbed)
    assert disturbed.events.died == 2
    assert stream(items) == whole
    assert not rejected(items)


def test_a_worker_that_has_grown_is_replaced_between_micro_batches(shards: Path, on_decoding: Callable[..., str]):
    whole, kept = stream(built(shards)), []
    on_decoding(lambda: kept.append(bytearray(os.urandom(1)) * 400_000_000))
    leaking = built(shards, worker_growth_gb=0.3)
    assert stream(leaking) == whole
    assert leaking.events.recycled == 3
    assert leaking.events.died == 0


def test_a_disk_that_hangs_stops_the_run_by_name(shards: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Shards, "read", lambda *_, **__: time.sleep(3600))
    with pytest.raises(
        RuntimeError, match=r"no sign of life for data\.worker_timeout=0\.5 s .*ordinals video 0-4, image"
    ):
        list(built(shards, worker_timeout=0.5))


def test_a_death_that_comes_again_and_again_without_a_sample_to_blame_stops_the_run(
    shards: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Shards, "read", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError, match=r"data workers in a row were lost .*SIGKILL.*Lower data\.workers"):
        list(built(shards))


def test_what_a_worker_raises_is_raised_at_its_place(shards: Path):
    def collate(samples: list[Sample]) -> list[Sample]:
        if any(sample.modality == "video" and sample.ordinal == 12 for sample in samples):
            raise KeyError("in the third micro-batch")
        return samples

    failing = build_loader(config(shards, 3), seed=1, batch={"video": 5, "image": 7}, stop_step=6, collate=collate)
    items = []
    with pytest.raises(KeyError, match="in the third"):  # noqa: PT012
        for item in failing:
            items.append(item)
    assert len(items) == 2


def test_spawned_workers_give_the_same(shards: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loader_module, "_context", lambda _: "spawn")
    assert stream(built(shards, workers=1)) == stream(built(shards, workers=0))


def test_a_loader_that_is_left_early_leaves_nothing_behind(shards: Path):
    with closing(iter(built(shards, workers=3))) as items:  # pyright: ignore[reportArgumentType]
        next(items)
    assert not multiprocessing.active_children()
    assert not [thread for thread in threading.enumerate() if thread.name == "data-workers"]


def test_workers_go_on_while_the_trainer_computes(shards: Path):
    loader = built(shards, workers=1, prefetch=3)
    with closing(iter(loader)) as items:  # pyright: ignore[reportArgumentType]
        next(items)
        deadline = time.monotonic() + 120
        while loader.dataset.counters()["video"]["debug"]["records"] < 4 * 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert loader.dataset.counters()["video"]["debug"]["records"] == 4 * 5  # the one taken, three ahead, no more


def test_ten_kills_of_the_training_process_in_an_epoch_lose_nothing_and_repeat_nothing(tmp_path: Path):
    folder, log_file = make_debug_shards(tmp_path / "images", videos=0, images=60, size=16), tmp_path / "log"
    part = ModalityConfig({"images": SourceConfig(str(folder))}, ClipConfig(frames=1, size=8))

    def epoch(workers: int, start: int) -> Loader:
        return build_loader(
            DataConfig(image=part, workers=workers), seed=4, batch={"image": 3}, start_step=start, stop_step=20
        )

    def train(start: int, most: int | None) -> None:
        """The rest of the epoch, or `most` steps of it, until it is killed."""
        with log_file.open("a", buffering=1) as file:
            for item in epoch(2, start):
                file.write(json.dumps([(sample.key, sample.clip.flatten()[:9].tolist()) for sample in item["image"]]))
                file.write("\n")
                start += 1
                if most is not None and start >= most:
                    time.sleep(3600)

    def done() -> list[str]:
        lines = log_file.read_text().splitlines(keepends=True) if log_file.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        log_file.write_text("".join(whole))  # what was half written when it was killed, as a trainer cuts its log back
        return whole

    kills, generator = 0, random.Random(7)
    while len(steps := done()) < 20:
        most = len(steps) + 2 if kills < 10 else None  # so that there are ten, however late the kill comes
        child = multiprocessing.get_context("fork").Process(target=train, args=(len(steps), most))
        child.start()
        if kills < 10:
            wanted = len(steps) + generator.randrange(3)
            wait_until(lambda wanted=wanted: log_file.read_text().count("\n") >= wanted)
            child.kill()
            kills += 1
        child.join()
    assert kills == 10
    rows = [row for line in steps for row in json.loads(line)]
    assert len(rows) == len({key for key, _ in rows}) == 60
    expected = [(sample.key, sample.clip.flatten()[:9].tolist()) for item in epoch(0, 0) for sample in item["image"]]
    assert [tuple(row) for row in rows] == expected
