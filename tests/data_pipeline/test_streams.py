"""Claims: plain WebDataset tars are an endless stream that is named as such, never repeats on resume, never hangs."""

import contextlib
import dataclasses
import io
import itertools
import json
import logging
import os
import pickle
import re
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from servers import Proxy, faulty_proxy, find_nginx, nginx, reset, truncate

from data_pipeline.config import ClipConfig, DataConfig, ModalityConfig, SourceConfig
from data_pipeline.dataset import BadDataError, ClipDataset
from data_pipeline.loader import build_loader
from data_pipeline.retries import RemoteConfig
from data_pipeline.shards import RemoteError, ShardError, Shards
from data_pipeline.sources import open_source
from data_pipeline.stream import Stream, StreamConfig, is_stream

QUICK = RemoteConfig(backoff=0.01, attempts=3)
TARS, EACH = 4, 6
HANG = f"sleep 600.{os.getpid()}"  # the name of processes of no other run of these tests


def picture(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value % 256, value // 2 % 256, 90)).save(file, "png")
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def samples(tar: int, count: int = EACH) -> dict[str, bytes]:
    """Pictures and labels, as anybody's tar has them."""
    files: dict[str, bytes] = {}
    for i in range(count):
        files[f"{tar}-{i}.png"] = picture(20 * tar + i)
        files[f"{tar}-{i}.json"] = json.dumps({"number": i}).encode()
    return files


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tars")
    for tar in range(TARS):
        write_tar(folder / f"x-{tar:03d}.tar", samples(tar))
    return folder


@pytest.fixture(scope="module")
def web(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if find_nginx() is None:
        pytest.skip("there is no nginx (`make setup` gets it from apt): nothing can be read over HTTP")
    with nginx(tars, tmp_path_factory.mktemp("nginx")) as url:
        yield url


@pytest.fixture(scope="module")
def proxy(web: str) -> Iterator[Proxy]:
    with faulty_proxy(("127.0.0.1", int(web.rpartition(":")[2]))) as running:
        yield running


def opened(path: str, *, key: int = 0, buffer: int = 4, remote: RemoteConfig = QUICK) -> Stream:
    return Stream(path, "image", StreamConfig(buffer=buffer), key=key, remote=remote)


def keys(stream: Stream, count: int, first: int = 7) -> list[str]:
    return [stream.read(first + i)[1]["key"] for i in range(count)]


def processes_of(marker: str) -> list[str]:
    """The command lines of running processes with this in them, arguments joined by blanks."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_text(errors="replace").replace("\0", " "))
    return [line for line in found if marker in line]


def is_gone(marker: str) -> bool:
    """Whether no such process runs, soon: the kernel takes a moment to end a group of them."""
    deadline = time.monotonic() + 60
    while processes_of(marker) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not processes_of(marker)


def until_error(stream: Stream) -> list[str]:
    """The keys that come before the stream stops; there must be an error."""
    found: list[str] = []
    with pytest.raises(RemoteError, match=r"damaged\.tar: not to be had in 3 attempts.*mend or remove it"):
        found.extend(stream.read(i)[1]["key"] for i in range(20))
    return found


def test_what_is_a_stream_and_what_a_folder():
    assert all(map(is_stream, ["pipe:cat x", "/disk/x-{0..9}.tar", "http://h/x.tar?token=1", "/a.tar::/b.tar"]))
    assert not any(map(is_stream, ["/disk/shards", "http://h/shards", "s3://bucket/shards", "list.csv"]))


@pytest.mark.parametrize("kind", ["local", "joined", "http", "pipe"])
def test_records_and_labels_come_from_anywhere(tars: Path, kind: str, request: pytest.FixtureRequest):
    pattern = f"x-{{000..{TARS - 1:03d}}}.tar"
    path = {
        "local": lambda: f"{tars}/{pattern}",
        "joined": lambda: "::".join(map(str, sorted(tars.glob("*.tar")))),
        "http": lambda: f"{request.getfixturevalue('web')}/{pattern}",
        "pipe": lambda: f"pipe:cat {tars}/{pattern}",
    }[kind]()
    stream = opened(path)
    expected = {
        f"{tar}-{i}": (picture(20 * tar + i), {"number": i}) for tar, i in itertools.product(range(TARS), range(EACH))
    }
    found: dict[str, tuple[bytes, dict[str, int]]] = {}
    for i in range(12 * TARS * EACH):
        data, row = stream.read(i)
        found[row["key"]] = (data, row["labels"])
    assert found == expected
    assert stream.is_remote == (kind in ("http", "pipe"))
    assert stream.counters.total()["records"] == 12 * TARS * EACH


def test_the_tars_of_ingest_give_the_same_records_as_a_shard_folder(shards: Path):
    exact = Shards(shards, "video")
    rows = {exact.row(i)["key"]: exact.read(i) for i in range(len(exact))}
    stream = open_source(str(shards / "video-000000.tar"), "video", remote=QUICK)
    for i in range(2 * len(exact)):
        data, row = stream.read(i)
        original, expected = rows[row["key"]]
        assert data == original
        for name in ("labels", "fps", "frames", "duration", "source_path", "start"):
            assert row[name] == expected[name]


def test_the_order_is_of_the_key_and_of_the_first_index_that_a_process_asks_for(tars: Path):
    path = f"{tars}/x-{{000..003}}.tar"
    order = keys(opened(path), 20)
    assert order == keys(opened(path), 20)
    assert order != keys(opened(path), 20, first=8)
    assert order != keys(opened(path, key=1), 20)
    assert opened(path).fingerprint != opened(f"{tars}/x-{{000..002}}.tar").fingerprint


def test_a_buffer_of_one_keeps_a_tars_order(tars: Path):
    assert keys(opened(str(tars / "x-002.tar"), buffer=1), EACH) == [f"2-{i}" for i in range(EACH)]
    assert keys(opened(str(tars / "x-002.tar")), EACH) != [f"2-{i}" for i in range(EACH)]


def mixture(tars: Path, folder: Path, streamed: str, workers: int = 0) -> DataConfig:
    """Half an exact source, half `streamed`, of the same nominal length."""
    stream = StreamConfig(samples=7, buffer=4) if is_stream(streamed) else StreamConfig()
    sources = {"exact": SourceConfig(str(folder)), "other": SourceConfig(streamed, stream=stream)}
    return DataConfig(image=ModalityConfig(sources, ClipConfig(frames=1, size=8)), workers=workers, remote=QUICK)


def test_a_stream_in_a_mixture_leaves_the_exact_source_as_it_is(tars: Path, shards: Path):
    streamed = ClipDataset(mixture(tars, shards, f"{tars}/x-{{000..003}}.tar"), seed=3)
    exact = ClipDataset(mixture(tars, shards, str(shards)), seed=3)
    for ordinal in range(40):
        one, other = streamed.sample("image", ordinal), exact.sample("image", ordinal)
        assert one.source == other.source
        if one.source == "exact":
            assert (one.key, one.clip.tolist()) == (other.key, other.clip.tolist())
    assert [info["exact"] for info in streamed.info()["image"].values()] == [True, False]
    assert streamed.info()["image"]["other"]["samples"] == 7


def test_it_is_named_at_the_start(tars: Path, shards: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        ClipDataset(mixture(tars, shards, str(tars / "x-000.tar")), seed=3)
    expected = "source other is a webdataset stream: resume is statistical, not exact: records may repeat or be missed"
    assert [record.getMessage() for record in caplog.records] == [expected]


def test_workers_ranks_and_resumes_do_not_repeat_each_others_stream(tars: Path, shards: Path):
    def seen(workers: int, start: int, rank: int = 0) -> list[str]:
        settings = dataclasses.replace(mixture(tars, shards, f"{tars}/x-{{000..003}}.tar"), workers=workers)
        sources = {"other": settings.image.sources["other"]}
        settings = dataclasses.replace(settings, image=ModalityConfig(sources, settings.image.clip))
        built = build_loader(
            settings, seed=0, batch={"image": 12}, world=2, rank=rank, start_step=start, stop_step=start + 4
        )
        return [sample.key for item in built for sample in item["image"]]

    alone = seen(0, 0)
    assert alone == seen(0, 0)
    assert len(alone) == 24
    assert alone[6:] != seen(0, 1)[:18]  # a resume starts anew
    assert seen(0, 0, rank=1) != alone
    shared = seen(2, 0)
    first, second = shared[0:6] + shared[12:18], shared[6:12] + shared[18:24]
    assert first == alone[:12]  # that worker's first request is this process's
    assert second != first


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"a.txt": b"no picture", "a.json": b"{}"}, "no image among its files"),
        ({"a.png": picture(1), "a.json": b"{"}, "its metadata is not JSON"),
        ({"a.png": picture(1), "a.json": b"[1]"}, "must be a JSON object, not list"),
        ({"a.png": b"not a picture"}, "cannot identify image|not an image"),
    ],
)
def test_a_bad_record_is_replaced_by_the_streams_next_and_named(
    tars: Path, shards: Path, tmp_path: Path, files: dict[str, bytes], reason: str
):
    path = write_tar(tmp_path / "bad.tar", {**files, **samples(9)})
    dataset = ClipDataset(mixture(tars, shards, str(path)), seed=3)
    found = [dataset.sample("image", ordinal) for ordinal in range(40)]
    rejected = [bad for sample in found for bad in sample.rejected]
    assert rejected
    assert {(bad.source, bad.key) for bad in rejected} == {("other", "a")}
    assert re.search(reason, rejected[0].reason)


def test_a_stream_without_good_records_stops(tars: Path, shards: Path, tmp_path: Path):
    path = write_tar(tmp_path / "bad.tar", {"a.txt": b"x"})
    dataset = ClipDataset(mixture(tars, shards, str(path)), seed=3)
    ordinal = next(i for i in range(40) if dataset.plans["image"].locate(i).source == 1)
    with pytest.raises(BadDataError, match=r"11 records in a row are bad .*other/a: no image among its files"):
        dataset.sample("image", ordinal)


def damage(path: Path, how: str) -> Path:
    """A tar of six samples that is not whole."""
    whole = write_tar(path, samples(0)).read_bytes()
    middle = 512 * 12  # the header of the fourth sample
    assert whole[middle : middle + 7] == b"0-3.png"
    damaged = {
        "header": whole[:middle] + b"\xff" * 512 + whole[middle + 512 :],
        "cut in a header": whole[: middle + 100],
        "cut between members": whole[:middle],
        "cut in a file": whole[: middle + 600],
        "joined": whole + whole,
        "no tar": b"<html>" * 400,
        "empty file": b"",
    }[how]
    path.write_bytes(damaged)
    return path


@pytest.mark.parametrize(
    "how", ["header", "cut in a header", "cut between members", "cut in a file", "joined", "no tar", "empty file"]
)
@pytest.mark.parametrize("kind", ["local", "pipe"])
def test_a_tar_that_is_not_whole_stops_the_run_by_name_and_never_ends_in_silence(tmp_path: Path, kind: str, how: str):
    path = damage(tmp_path / "damaged.tar", how)
    stream = opened(f"pipe:cat {path}" if kind == "pipe" else str(path), buffer=1)
    found = until_error(stream)
    complete = {"no tar": 0, "empty file": 0, "joined": EACH}.get(how, 3)
    assert found in ([f"0-{i}" for i in range(complete)], [f"0-{i}" for i in range(complete - 1)])
    assert stream.counters.total()["retries"] == 2


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("curl -sf {web}/none.tar", "ended with status 22"),
        ("no_such_program_there 2>/dev/null", "ended with status 127"),
        ("cat {tars}/x-000.tar; exit 3", "ended with status 3"),
        ("head -c 3000 {tars}/x-000.tar", "cut short or damaged"),
    ],
)
def test_a_command_that_fails_stops_the_run(tars: Path, web: str, command: str, reason: str):
    stream = opened("pipe:" + command.format(web=web, tars=tars))
    with pytest.raises(RemoteError, match=reason):
        keys(stream, EACH + 1)


def test_an_address_without_a_tar_stops_the_run(web: str):
    with pytest.raises(RemoteError, match=r"none\.tar: not to be had in 3 attempts.*HTTP 404"):
        keys(opened(f"{web}/none.tar"), 1)


@pytest.mark.parametrize("command", ["{hang}", "cat {tars}/x-000.tar; {hang}", "yes | {hang}"])
def test_a_command_that_hangs_is_killed_with_all_its_processes(tars: Path, command: str):
    stream = opened("pipe:" + command.format(tars=tars, hang=HANG), remote=dataclasses.replace(QUICK, timeout=0.2))
    with pytest.raises(RemoteError, match=r"printed nothing for 0\.2 s"):
        keys(stream, EACH + 1)
    assert is_gone(HANG)  # which would go on for ten minutes


def test_closing_a_stream_ends_its_command(tars: Path):
    stream = opened(f"pipe:cat {tars}/x-000.tar /dev/zero; {HANG}", buffer=1)
    keys(stream, 2)
    assert processes_of(HANG)
    stream.close()
    assert is_gone(HANG)


@pytest.mark.parametrize("fault", [reset, truncate])
def test_a_connection_that_breaks_is_made_again_and_nothing_repeats(proxy: Proxy, web: str, fault):
    pattern = "x-{000..003}.tar"
    proxy.inject()
    whole = keys(opened(f"{web}/{pattern}"), 3 * EACH)
    proxy.inject(fault, None, fault, fault)
    stream = opened(f"http://127.0.0.1:{proxy.port}/{pattern}")
    assert keys(stream, 3 * EACH) == whole
    assert stream.counters.total()["retries"] == 3


def test_an_address_that_cannot_work_is_refused_at_once(tmp_path: Path, shards: Path):
    with pytest.raises(ShardError, match=r"x-001\.tar: no such tar"):
        opened(f"{write_tar(tmp_path / 'x-000.tar', {}).parent}/x-{{000..001}}.tar")
    with pytest.raises(ShardError, match=r"s3://bucket/x\.tar: .*pipe:aws s3 cp"):
        opened("s3://bucket/x.tar")
    with pytest.raises(ShardError, match=r"http://host/x\.tar: passwords do not belong") as refused:
        opened("http://me:secret@host/x.tar?token=hidden")
    assert "secret" not in str(refused.value)
    assert "hidden" not in str(refused.value)
    with pytest.raises(ValueError, match=r"stream=.*is for plain WebDataset tars"):
        SourceConfig(str(shards), stream=StreamConfig(buffer=2))
    with pytest.raises(ValueError, match=r"stream\.buffer=0: must be at least 1"):
        StreamConfig(buffer=0)
    with pytest.raises(ShardError, match=r"x-000\.tar: holds no samples"):
        keys(opened(str(tmp_path / "x-000.tar")), 1)


def test_a_process_that_is_spawned_gets_a_stream_of_its_own(tars: Path):
    stream = opened(f"{tars}/x-{{000..003}}.tar")
    order = keys(stream, 10)
    assert keys(pickle.loads(pickle.dumps(stream)), 10) == order  # anew, not where the other one stands
