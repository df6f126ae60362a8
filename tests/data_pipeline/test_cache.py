"""Claims: the local cache serves exact bytes or nothing, stays within its size, and never stops a run."""

import contextlib
import dataclasses
import errno
import hashlib
import logging
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Proxy, faulty_proxy, find_nginx, nginx, reset_at_once
from test_loader import config, stream

from data_pipeline.cache import CacheConfig, RecordCache
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.counters import Counters
from data_pipeline.loader import build_loader
from data_pipeline.shards import RemoteError, Shards


@pytest.fixture(scope="module")
def served(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Proxy]]:
    """The debug shards behind nginx and a proxy that counts requests."""
    if find_nginx() is None:
        pytest.skip("there is no nginx (`make setup` gets it from apt): nothing can be read over HTTP")
    with (
        nginx(shards.parent, tmp_path_factory.mktemp("nginx")) as url,
        faulty_proxy(("127.0.0.1", int(url.rpartition(":")[2]))) as proxy,
    ):
        yield f"http://127.0.0.1:{proxy.port}/{shards.name}", proxy


def cached(url: str, folder: Path, workers: int = 0, max_gb: float = 1.0) -> DataConfig:
    plain = config(Path("unused"), workers)
    video, image = (
        dataclasses.replace(part, sources={"debug": SourceConfig(url)}) for part in (plain.video, plain.image)
    )
    return dataclasses.replace(plain, video=video, image=image, cache=CacheConfig(str(folder), max_gb))


def record(number: int, size: int = 10_000) -> tuple[str, bytes]:
    data = random.Random(number).randbytes(size)
    return hashlib.sha256(data).hexdigest(), data


def held(folder: Path) -> list[Path]:
    """The records' files, without the parts that are being written."""
    return [path for path in folder.glob("??/*") if path.is_file()]


def size_of(folder: Path) -> int:
    """Bytes of all files, those that are being written too; taken while none can be begun or thrown out."""
    sizes = {}
    with RecordCache(folder, 1)._locked() as book:
        for path in [*folder.glob("parts/*"), *folder.glob("??/*")] if book is not None else []:
            with contextlib.suppress(FileNotFoundError):
                sizes[path.stat().st_ino] = path.stat().st_size
    return sum(sizes.values())


def fork(work: object) -> int:
    """Run `work` in a forked process, which exits with 0 if it returns."""
    child = os.fork()
    if child == 0:
        try:
            work()  # pyright: ignore[reportCallIssue]
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def test_a_second_pass_asks_the_server_for_nothing(
    shards: Path, served: tuple[str, Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("data_pipeline.cache._LOCK_TRIES", 30_000)  # no record is left out because the machine is busy
    url, proxy = served
    proxy.inject()
    batch = {"video": 5, "image": 7}
    expected = stream(build_loader(config(shards), seed=1, batch=batch, stop_step=4))
    first = build_loader(cached(url, tmp_path / "cache", 2), seed=1, batch=batch, stop_step=4)
    assert stream(first) == expected
    asked = len(proxy.requests)
    second = build_loader(cached(url, tmp_path / "cache", 2), seed=1, batch=batch, stop_step=4)
    opening = len(proxy.requests) - asked
    assert opening == 4  # manifest and one byte of the tar, for two modalities: the indices are cached as well
    assert stream(second) == expected
    assert len(proxy.requests) == asked + opening
    counted = second.dataset.counters()["video"]["debug"]
    assert (counted["cache_hits"], counted["cache_misses"]) == (20, 0)
    assert first.dataset.counters()["video"]["debug"]["cache_misses"] >= 10


def test_what_is_cached_is_read_while_the_server_is_away(shards: Path, served: tuple[str, Proxy], tmp_path: Path):
    url, proxy = served
    proxy.inject()
    opened = Shards(url, "video", cache=RecordCache(tmp_path, 10**9))
    expected = opened.read(3)
    proxy.inject(always=reset_at_once)
    opened._remote.attempts = 1
    assert opened.read(3) == expected == Shards(shards, "video").read(3)
    with pytest.raises(RemoteError):
        opened.read(4)


def test_damaged_files_are_not_served_but_replaced(served: tuple[str, Proxy], tmp_path: Path):
    url, proxy = served
    proxy.inject()
    opened = Shards(url, "video", cache=RecordCache(tmp_path, 10**9))
    expected = [opened.read(i) for i in range(4)]
    paths = [tmp_path / row["sha256"][:2] / row["sha256"] for _, row in expected]
    os.truncate(paths[0], 100)  # as after a loss of power
    os.truncate(paths[1], 0)
    paths[2].write_bytes(bytes(len(expected[2][0])))
    asked = len(proxy.requests)
    assert [opened.read(i) for i in range(4)] == expected
    assert len(proxy.requests) == asked + 3
    assert [path.read_bytes() for path in paths] == [data for data, _ in expected]


def test_many_processes_at_once_stay_within_the_size(tmp_path: Path):
    most = 400_000

    def work(worker: int) -> None:
        cache, counters = RecordCache(tmp_path, most), Counters()
        for number in range(150):
            sha256, data = record(1000 * (worker % 2) + number)  # two and two write the same ones
            found = cache.get(sha256, counters)
            assert found in (None, data)
            cache.put(sha256, data, counters)
        assert counters.total()["cache_failures"] == 0

    children = [fork(lambda worker=worker: work(worker)) for worker in range(4)]
    largest = 0
    while children:
        largest = max(largest, size_of(tmp_path))
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            assert status == 0
            children.remove(pid)
    last = size_of(tmp_path)
    assert 0.5 * most < last <= most
    assert largest <= most


def test_a_writer_killed_at_any_moment_leaves_nothing_wrong(tmp_path: Path):
    most = 300_000
    good = {record(number)[0]: record(number)[1] for number in range(200)}

    def work() -> None:
        cache, counters = RecordCache(tmp_path, most), Counters()
        while True:
            for sha256, data in good.items():
                cache.put(sha256, data, counters)

    chance = random.Random(1)
    for _ in range(15):
        child = fork(work)
        time.sleep(0.01 + 0.05 * chance.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for path in held(tmp_path):
            assert path.read_bytes() == good[path.name]
        assert size_of(tmp_path) <= most
    cache, counters = RecordCache(tmp_path, most), Counters()
    for sha256, data in good.items():  # more than fits: room is made, and what the dead have left goes
        cache.put(sha256, data, counters)
    assert list((tmp_path / "parts").iterdir()) == []
    assert counters.total()["cache_failures"] == 0
    assert len(held(tmp_path)) > 20


@pytest.mark.parametrize("step", ["open", "truncate", "write", "rename"])
def test_a_kill_before_each_step_of_writing_is_survived(tmp_path: Path, step: str):
    sha256, data = record(0)

    def work() -> None:
        def die(*arguments: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        cache = RecordCache(tmp_path, 10**6)
        if step == "rename":
            os.rename = die
        elif step == "open":
            os.pwrite = die
        else:
            plain = Path.open

            def opened(path: Path, mode: str = "r") -> object:
                file = plain(path, mode)
                return _Dying(file, step) if mode == "xb" else file

            Path.open = opened  # pyright: ignore[reportAttributeAccessIssue]
        cache.put(sha256, data, Counters())

    child = fork(work)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    cache, counters = RecordCache(tmp_path, 10**6), Counters()
    assert cache.get(sha256, counters) is None
    cache.put(sha256, data, counters)
    assert cache.get(sha256, counters) == data


class _Dying:
    """A file whose process is killed when it does `step`; writing, in the middle."""

    def __init__(self, file: object, step: str):
        self._file, self._step = file, step

    def __getattr__(self, name: str) -> object:
        if name == self._step == "truncate":
            os.kill(os.getpid(), signal.SIGKILL)
        return getattr(self._file, name)

    def write(self, data: bytes) -> None:
        self._file.write(data[: len(data) // 2])  # pyright: ignore[reportAttributeAccessIssue]
        self._file.flush()  # pyright: ignore[reportAttributeAccessIssue]
        os.kill(os.getpid(), signal.SIGKILL)

    def __enter__(self) -> "_Dying":
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def test_a_cache_for_half_of_the_bytes_answers_half_of_the_reads(tmp_path: Path):
    records = [record(number, 1000) for number in range(600)]
    cache, counters, chance = RecordCache(tmp_path, 300_000), Counters(), random.Random(0)
    cache.expect(600_000)
    shares = []
    for _ in range(4):
        hits = 0
        for sha256, data in chance.sample(records, len(records)):
            found = cache.get(sha256, counters)
            hits += found is not None
            if found is None:
                cache.put(sha256, data, counters)
        shares.append(hits / len(records))
    assert shares[0] == 0
    assert all(0.37 < share < 0.5 for share in shares[1:])  # 0.85 / 2; used-least-lately would give 0.1
    assert len(set(shares[1:])) == 1


def test_what_other_runs_left_makes_room(tmp_path: Path):
    cache, counters = RecordCache(tmp_path, 100_000), Counters()
    for number in range(9):
        cache.put(*record(number), counters)
    old = time.time() - 7200
    for path in held(tmp_path):
        os.utime(path, (old, old))
    assert cache.get(record(4)[0], counters) is not None  # used again
    for number in range(100, 107):
        cache.put(*record(number), counters)
    assert all(cache.get(record(number)[0], counters) for number in (4, *range(100, 107)))
    assert len(held(tmp_path)) <= 10
    cache.put(*record(1, 200_000), counters)  # larger than the cache: must not empty it in vain
    assert len(held(tmp_path)) >= 8


def test_a_lock_that_is_held_for_ever_costs_only_the_caching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache, counters, pauses = RecordCache(tmp_path, 10**6), Counters(), list[float]()
    with cache._locked(), monkeypatch.context() as patch:
        patch.setattr("data_pipeline.cache.time.sleep", pauses.append)
        cache.put(*record(0), counters)
    assert 0 < sum(pauses) < 1
    assert held(tmp_path) == []
    cache.put(*record(0), counters)
    assert len(held(tmp_path)) == 1


@pytest.fixture
def warnings_of_all(tmp_path: Path) -> Iterator[Path]:
    """A file with what the cache's logger says, in workers too."""
    handler = logging.FileHandler(tmp_path / "log")
    logging.getLogger("data_pipeline.cache").addHandler(handler)
    yield tmp_path / "log"
    logging.getLogger("data_pipeline.cache").removeHandler(handler)
    handler.close()


@pytest.mark.parametrize("workers", [0, 3])
def test_a_full_disk_costs_one_warning_and_no_sample(
    shards: Path,
    served: tuple[str, Proxy],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warnings_of_all: Path,
    workers: int,
):
    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    url, proxy = served
    proxy.inject()
    folder, batch = tmp_path / "cache", {"video": 5, "image": 5}
    expected = stream(build_loader(config(shards), seed=1, batch=batch, stop_step=4))
    built = build_loader(cached(url, folder, workers), seed=1, batch=batch, stop_step=4)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        assert stream(built) == expected
    assert warnings_of_all.read_text().count("No space left on device; reading goes on without it") == 1
    assert not held(folder)
    assert not list((folder / "parts").iterdir())
    failures = [source["debug"]["cache_failures"] for source in built.dataset.counters().values()]
    assert sum(failures) >= 1  # of whichever modality came first: then the cache rests


def test_a_folder_that_cannot_be_is_no_error(served: tuple[str, Proxy], tmp_path: Path, warnings_of_all: Path):
    url, proxy = served
    proxy.inject()
    (tmp_path / "file").write_text("in the way")
    opened = Shards(url, "video", cache=RecordCache(tmp_path / "file" / "cache", 10**9))
    assert [opened.read(i)[1]["key"] for i in range(10)]
    assert warnings_of_all.read_text().count("reading goes on without it") == 1


@pytest.mark.parametrize("size", [0.0, -1.0, float("nan")])
def test_a_size_that_makes_no_sense_is_refused(size: float):
    with pytest.raises(ValueError, match=r"cache\.max_gb=.*: must be positive"):
        CacheConfig("somewhere", size)
