"""Claims: shards over HTTP and from S3 give the same stream as a local folder, or stop with a clear error."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from servers import (
    Fault,
    Proxy,
    busy,
    faulty_proxy,
    find_nginx,
    flip,
    nginx,
    reset,
    reset_at_once,
    silent,
    too_many,
    trickle,
    truncate,
)
from test_loader import config, content, corrupted, digest, stream
from test_shards import many_shards

from data_pipeline import loader, retries
from data_pipeline.cache import CacheConfig
from data_pipeline.config import ClipConfig, DataConfig, ModalityConfig, SourceConfig
from data_pipeline.dataset import BadDataError, ClipDataset
from data_pipeline.loader import build_loader
from data_pipeline.remote import RemoteFolder
from data_pipeline.retries import RemoteConfig
from data_pipeline.s3 import _signer
from data_pipeline.shards import RecordError, RemoteError, ShardError, Shards, modalities

QUICK = RemoteConfig(backoff=0.01, slowest=1.0, attempts=4)  # with a time-out that a busy machine does not reach
SHORT_S = 1.0  # time-out where a fault is one only because it lasts
FAULTS = [reset, reset_at_once, truncate, busy, too_many, trickle, silent, flip]
LASTING = [
    (reset, "Connection reset by peer"),
    (reset_at_once, "Connection reset by peer"),
    (truncate, "7 more expected"),
    (busy, "HTTP 503"),
    (too_many, "HTTP 429"),
    (trickle, "too slow"),
    (silent, "Read timed out"),
]


def patience(policy: RemoteConfig, fault: Fault) -> RemoteConfig:
    """A short time-out for the faults that are noticed by it."""
    return dataclasses.replace(policy, timeout=SHORT_S) if fault in (trickle, silent) else policy


class Clock:
    """Stands for `time` where pauses are made: they pass at once, and are noted."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, list[float]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """By which repetitions are timed."""
    made = Clock()
    monkeypatch.setattr(retries, "time", made)
    return made


@pytest.fixture(scope="module")
def root(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the web server serves: `shards`, and what tests add."""
    folder = tmp_path_factory.mktemp("www")
    shutil.copytree(shards, folder / "shards")
    return folder


@pytest.fixture(scope="module")
def web(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real nginx."""
    if find_nginx() is None:
        pytest.skip("there is no nginx (`make setup` gets it from apt): nothing can be read over HTTP")
    with nginx(root, tmp_path_factory.mktemp("nginx")) as url:
        yield url


@pytest.fixture(scope="module")
def store(root: Path) -> Iterator[str]:
    """The address of moto's S3, with the shards under s3://clips/some/prefix."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with contextlib.redirect_stderr(io.StringIO()):
        server.start()
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=url, **keys)
        client.create_bucket(Bucket="clips")
        for path in (root / "shards").iterdir():
            client.put_object(Bucket="clips", Key=f"some/prefix/{path.name}", Body=path.read_bytes())
        client.close()
        yield url
        server.stop()


@pytest.fixture
def aws(store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment with which AWS tools find that store."""
    _signer.cache_clear()  # it has read the environment of before
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("ENDPOINT_URL_S3", store)):
        monkeypatch.setenv(f"AWS_{name}", value)
    yield
    _signer.cache_clear()


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


@dataclasses.dataclass
class Faulty:
    """The shards behind a proxy, and how they are to be read."""

    url: str
    proxy: Proxy
    policy: RemoteConfig

    def inject(self, *faults: Fault | None, always: Fault | None = None) -> None:
        self.proxy.inject(*faults, always=always)


@pytest.fixture(scope="module", params=["http", "s3"])
def proxied(request: pytest.FixtureRequest) -> Iterator[Faulty]:
    """The same shards on each kind of store, behind a proxy."""
    kind = request.param
    upstream = request.getfixturevalue("web" if kind == "http" else "store")
    with faulty_proxy(("127.0.0.1", port_of(upstream))) as proxy:
        here = f"http://127.0.0.1:{proxy.port}"
        url = f"{here}/shards" if kind == "http" else "s3://clips/some/prefix"
        yield Faulty(url, proxy, dataclasses.replace(QUICK, endpoint=here))


@pytest.fixture
def faulty(proxied: Faulty, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    """`proxied`, without a fault yet."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    proxied.inject()
    yield proxied
    proxied.inject()


def at(url: str, workers: int = 0, remote: RemoteConfig = QUICK, **values: object) -> DataConfig:
    """`config` with the two sources at an address."""
    source = {"debug": SourceConfig(url)}
    plain = config(Path("unused"), workers)
    video, image = (dataclasses.replace(part, sources=dict(source)) for part in (plain.video, plain.image))
    return dataclasses.replace(plain, video=video, image=image, remote=remote, **values)


def test_digest_is_the_same_locally_over_http_and_from_s3(
    shards: Path, web: str, aws: None, capsys: pytest.CaptureFixture[str]
):
    whole = digest(shards, capsys)
    for url, workers in ((f"{web}/shards", 0), (f"{web}/shards/manifest.json", 2), ("s3://clips/some/prefix", 2)):
        assert modalities(url) == ["video", "image"]
        assert digest(url, capsys, workers=workers) == whole  # pyright: ignore[reportArgumentType]


def test_a_mixture_of_a_local_and_a_remote_source_is_that_of_two_local_ones(shards: Path, web: str):
    def items(url: str) -> list[tuple[int, str, bytes]]:
        sources = {"here": SourceConfig(str(shards), 2.0), "there": SourceConfig(url)}
        part = ModalityConfig(sources, ClipConfig(frames=1, size=8))
        built = build_loader(DataConfig(image=part, workers=0), seed=3, batch={"image": 5}, stop_step=3)
        return [each for item in built for each in content(item["image"])]

    assert items(f"{web}/shards") == items(str(shards))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_a_repetition_and_no_bit(shards: Path, faulty: Faulty, fault: Fault):
    opened, local = Shards(faulty.url, "video", remote=patience(faulty.policy, fault)), Shards(shards, "video")
    before = opened.counters.total()
    faulty.inject(fault, None, fault)  # of the index, and of the record
    assert opened.read(3) == local.read(3)
    asked = [line.split()[1].partition("?")[0].rpartition("/")[2] for line in faulty.proxy.requests]
    if fault not in (trickle, silent):  # a busy machine may be too late within a short time-out, too
        assert asked == ["video-000000.index.jsonl"] * 2 + ["video-000000.tar"] * 2
    assert asked == sorted(asked)  # the index first
    assert min(map(asked.count, ("video-000000.index.jsonl", "video-000000.tar"))) >= 2
    counted = opened.counters.total()
    repeated = sum(counted[name] - before[name] for name in ("retries", "rereads"))
    assert repeated == counted["requests"] - before["requests"] - 2 == len(asked) - 2


def test_faults_while_opening_cost_repetitions(faulty: Faulty):
    faulty.inject(reset, truncate, busy, None, too_many)  # the manifest, a tar's size
    opened = Shards(faulty.url, "video", remote=faulty.policy)
    assert len(opened) == 10
    counted = opened.counters.total()
    assert (counted["requests"], counted["retries"]) == (6, 4)


def test_a_stream_through_a_hail_of_faults_is_exact(shards: Path, faulty: Faulty):
    chance = random.Random(0)
    hail = [chance.choice(FAULTS[:5]) if chance.random() < 0.4 else None for _ in range(400)]
    built = build_loader(
        at(faulty.url, 2, dataclasses.replace(faulty.policy, attempts=20)),
        seed=1,
        batch={"video": 6, "image": 12},
        stop_step=4,
    )
    faulty.inject(*hail)
    found = stream(built)
    assert found == stream(build_loader(config(shards), seed=1, batch={"video": 6, "image": 12}, stop_step=4))
    by_modality = built.dataset.counters()  # counted in the workers, seen here
    suffered = sum(fault is not None for fault in hail[: len(faulty.proxy.requests)])
    assert suffered > 10
    # Whose requests they were is chance; that each was repeated is not.
    assert sum(by_modality[name]["debug"]["retries"] for name in ("video", "image")) == suffered
    counted = by_modality["video"]["debug"]
    assert counted["records"] == 24
    asked = counted["requests"] - counted["retries"]
    assert 24 + 3 <= asked <= 24 + 4  # manifest, size, and the index once or, where both workers begin at once, twice
    assert counted["wait_seconds"] > 0


@pytest.mark.parametrize(("fault", "reason"), LASTING)
def test_a_fault_that_lasts_stops_by_name_and_never_swaps_the_sample(faulty: Faulty, fault: Fault, reason: str):
    policy = dataclasses.replace(patience(faulty.policy, fault), attempts=2)
    dataset = ClipDataset(at(faulty.url, remote=policy), seed=0)
    faulty.inject(always=fault)
    with pytest.raises(RemoteError, match=rf"video-000000\.index\.jsonl: not to be had .*{reason}.* resume the run"):
        dataset.sample("video", 0)
    faulty.inject()
    dataset.sample("video", 1)
    faulty.inject(always=fault)
    message = rf"video-000000\.tar: not to be had in 2 attempts over .*{reason}.* resume the run"
    with pytest.raises(RemoteError, match=message):
        dataset.sample("video", 0)
    assert len(faulty.proxy.requests) == 2
    assert all("video-000000.tar" in line for line in faulty.proxy.requests)


def test_a_fault_that_lasts_stops_a_run_with_workers_by_the_same_error(faulty: Faulty):
    built = build_loader(at(faulty.url, 2, faulty.policy), seed=1, batch={"video": 6, "image": 6}, stop_step=50)
    items = iter(built)
    next(items)
    faulty.inject(always=reset)
    with pytest.raises(RemoteError, match="not to be had in 4 attempts"):
        list(items)


def test_the_time_for_all_attempts_is_limited(faulty: Faulty, clock: Clock):
    def slow(answer: bytes, send: Callable[[bytes], None]) -> None:
        clock.now += 3.0
        busy(answer, send)

    policy = dataclasses.replace(faulty.policy, backoff=1.0, attempts=1000, give_up=50.0, longest_wait=10.0)
    opened = Shards(faulty.url, "video", remote=policy)
    faulty.inject(always=slow)
    with pytest.raises(RemoteError):
        opened.read(0)
    assert len(faulty.proxy.requests) == len(clock.pauses) + 1
    assert clock.now == pytest.approx(sum(clock.pauses) + 3.0 * len(faulty.proxy.requests))
    assert max(clock.pauses) <= 10.0
    assert 50.0 - 10.0 < clock.now <= 50.0 + 3.0  # the next pause would have led past it; the last attempt may


def test_retry_after_is_obeyed_up_to_the_longest_wait(web: str, clock: Clock):
    def later(answer: bytes, send: object) -> None:
        send(b"HTTP/1.1 503 Busy\r\nConnection: close\r\nRetry-After: 3600\r\nContent-Length: 0\r\n\r\n")  # pyright: ignore

    with faulty_proxy(("127.0.0.1", port_of(web))) as proxy:
        policy = dataclasses.replace(QUICK, longest_wait=60.0)
        opened = Shards(f"http://127.0.0.1:{proxy.port}/shards", "video", remote=policy)
        proxy.inject(later)
        opened.read(0)
        assert clock.pauses == [60.0]


@pytest.mark.parametrize("verify", [True, False])
def test_a_corrupt_record_is_a_bad_sample_as_on_a_disk(shards: Path, root: Path, web: str, verify: bool):
    folder, keys = corrupted(shards, root / f"bad-{verify}", {2, 7})
    local = dataclasses.replace(config(folder), verify_bytes=verify)
    there = at(f"{web}/{folder.name}", verify_bytes=verify)
    runs = []
    for settings in (local, there):
        items = list(build_loader(settings, seed=1, batch={"video": 5, "image": 1}, stop_step=4))
        bad = [(bad.ordinal, bad.key) for item in items for each in item["video"] for bad in each.rejected]
        runs.append((stream(items), bad))
    assert runs[0] == runs[1]
    assert {key for _, key in runs[1][1]} == keys
    with pytest.raises(RecordError, match="sha256"):
        Shards(f"{web}/{folder.name}", "video").read(2)


def test_too_many_corrupt_records_stop_the_run(shards: Path, root: Path, web: str):
    corrupted(shards, root / "all-bad", set(range(10)))
    with pytest.raises(BadDataError, match="3 records in a row"):
        ClipDataset(at(f"{web}/all-bad", bad_attempts=2), seed=0).sample("video", 0)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("nothing/there", r"nothing/there/manifest\.json: HTTP 404; no such file: check the address"),
        ("forbidden/shards", r"forbidden/shards/manifest\.json: HTTP 403; access is refused: check the credentials"),
        ("secret/shards", r"secret/shards/manifest\.json: HTTP 401; .*~/\.netrc"),
        ("norange/shards", r"000000\.tar: the server ignores range requests .*use a server that knows them"),
    ],
)
def test_what_will_not_get_better_is_said_at_once(web: str, clock: Clock, folder: str, message: str):
    with pytest.raises(ShardError, match=message) as caught:
        Shards(f"{web}/{folder}", "video")
    assert not isinstance(caught.value, RemoteError)
    assert clock.pauses == []


def test_redirects_are_followed_and_passwords_come_from_netrc(
    shards: Path, web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = Shards(shards, "video").read(3)
    assert Shards(f"{web}/moved/shards", "video").read(3) == expected
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password 'pass word'\n".replace("'", '"'))
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text((tmp_path / "netrc").read_text())
    (tmp_path / ".netrc").chmod(0o600)
    assert Shards(f"{web}/secret/shards", "video").read(3) == expected


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://me:secret@host/x", r"^http://host/x: passwords do not belong into an address"),
        ("https://host/x?sig=1", r"must end in a folder"),
        ("http:///x", r"no host|404|not to be had"),
        ("hdfs://host/x", r"hdfs:// is not known; use a local path, http\(s\)://, s3:// or gs://"),
    ],
)
def test_an_address_that_cannot_work_is_refused(url: str, message: str):
    with pytest.raises(ShardError, match=message):
        Shards(url, "video", remote=dataclasses.replace(QUICK, attempts=1))


def test_a_file_that_is_missing_or_of_another_size_is_named(shards: Path, root: Path, web: str):
    broken = Path(shutil.copytree(shards, root / "broken"))
    tar, index = broken / "video-000000.tar", broken / "video-000000.index.jsonl"
    for path in (tar, index):
        path.chmod(0o644)
    index.write_text(index.read_text().replace("video-", "wideo-"))
    opened = Shards(f"{web}/broken", "video")
    with pytest.raises(ShardError, match=r"index\.jsonl: differs from the sha256 in the manifest, twice; upload"):
        opened.read(0)
    index.unlink()
    with pytest.raises(ShardError, match=r"index\.jsonl: HTTP 404; no such file"):
        opened.read(0)
    os.truncate(tar, 5000)
    with pytest.raises(ShardError, match=r"video-000000\.tar: 5000 bytes, but the manifest says"):
        Shards(f"{web}/broken", "video")
    tar.unlink()
    with pytest.raises(ShardError, match=r"video-000000\.tar: HTTP 404; no such file"):
        Shards(f"{web}/broken", "video")


def test_opening_a_large_set_costs_few_requests_and_the_other_tars_are_checked_when_read(
    shards: Path, root: Path, web: str, monkeypatch: pytest.MonkeyPatch
):
    folder, _ = many_shards(shards, root / "many")
    monkeypatch.setattr(RemoteFolder, "checked_at_opening", 3)  # of ten: the first, the fifth and the last
    with (folder / "7.tar").open("ab") as file:
        file.write(bytes(512))
    opened, local = Shards(f"{web}/many", "video"), Shards(shards, "video")
    assert opened.counters.total()["requests"] == 4
    for index in (6, 6, 8):
        assert opened.read(index)[0] == local.read(index)[0]
    assert opened.counters.total()["requests"] == 4 + 2 + 3  # two indices, three records
    with pytest.raises(ShardError, match=r"7\.tar: \d+ bytes, but the manifest says \d+: it is damaged, or"):
        opened.read(7)
    assert opened.counters.total()["rereads"] == 0


def test_an_index_that_many_threads_want_at_once_is_fetched_once(shards: Path, web: str):
    opened = Shards(f"{web}/shards", "video")
    opened.read_ahead(range(8))
    assert [opened.read(i) for i in range(8)] == [Shards(shards, "video").read(i) for i in range(8)]
    assert opened.counters.total()["requests"] == 2 + 1 + 8


def test_a_tar_replaced_during_the_run_is_an_error_not_a_bad_sample(shards: Path, root: Path, web: str):
    folder = Path(shutil.copytree(shards, root / "replaced"))
    tar = folder / "video-000000.tar"
    tar.chmod(0o644)
    opened = Shards(f"{web}/replaced", "video")
    opened.read(0)
    with tar.open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(ShardError, match="was replaced while it is in use"):
        opened.read(0)
    os.truncate(tar, 5000)
    with pytest.raises(ShardError, match=r"ends before byte \d+"):
        opened.read(9)


def test_a_view_over_another_folders_tars_is_read(shards: Path, root: Path, web: str):
    view = root / "views" / "some"
    view.mkdir(parents=True)
    manifest = json.loads((shards / "manifest.json").read_text())
    for entry in manifest["shards"]:
        shutil.copy(shards / entry["index"], view)
        entry["name"] = f"../../shards/{entry['name']}"
    (view / "manifest.json").write_text(json.dumps(manifest))
    assert Shards(f"{web}/views/some", "video").read(3)[0] == Shards(shards, "video").read(3)[0]


def test_a_forked_and_a_pickled_folder_read_on(shards: Path, web: str):
    opened = Shards(f"{web}/shards", "video")
    expected = Shards(shards, "video").read(3)
    assert opened.read(3) == expected
    child = os.fork()
    if child == 0:
        os._exit(0 if opened.read(3) == expected and opened.counters.total()["requests"] == 5 else 1)
    assert os.waitpid(child, 0)[1] == 0  # manifest, size, index and twice the record: the index came with the fork
    assert pickle.loads(pickle.dumps(opened)).read(3) == expected
    opened.close()
    assert opened.read(3) == expected
    with pytest.raises(ShardError, match="not on this machine"):
        _ = opened.folder


def test_a_worker_that_was_not_forked_reads_the_same_and_its_counts_are_seen(
    shards: Path, web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loader, "_context", lambda _: "spawn")
    settings = at(f"{web}/shards", 1, cache=CacheConfig(str(tmp_path), 1.0))
    built = build_loader(settings, seed=5, batch={"video": 4, "image": 1}, stop_step=2)
    assert stream(built) == stream(build_loader(config(shards), seed=5, batch={"video": 4, "image": 1}, stop_step=2))
    counted = built.dataset.counters()["video"]["debug"]
    assert (counted["records"], counted["cache_misses"]) == (8, 8)


def test_records_of_a_micro_batch_are_fetched_together(web: str):
    is_asked, all_asked = threading.Semaphore(0), threading.Event()

    def held(answer: bytes, send: Callable[[bytes], None]) -> None:
        is_asked.release()
        all_asked.wait()
        send(answer)

    def count() -> None:
        """Let the answers go when eight are asked for: one after the other, the second would never be."""
        found.append(all(is_asked.acquire(timeout=60) for _ in range(8)))
        all_asked.set()

    found, watcher = list[bool](), threading.Thread(target=count)
    with faulty_proxy(("127.0.0.1", port_of(web))) as proxy:
        url = f"http://127.0.0.1:{proxy.port}/shards"
        dataset = ClipDataset(at(url, remote=RemoteConfig(timeout=600, give_up=600, parallel=8)), seed=0)
        dataset.sample("video", 8)  # reads the index
        proxy.inject(always=held)
        watcher.start()
        assert len(dataset.micro_batch({"video": range(8)})["video"]) == 8
        watcher.join()
        assert found == [True]


def test_without_credentials_the_ways_to_give_them_are_named(store: str, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    _signer.cache_clear()
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(ShardError, match=r"s3://clips/.*manifest\.json: NoCredentialsError.*AWS_PROFILE.*anonymous"):
        Shards("s3://clips/some/prefix", "video", remote=RemoteConfig(endpoint=store))


def test_a_missing_bucket_or_prefix_is_named(aws: None):
    with pytest.raises(ShardError, match=r"s3://no-such/x/manifest\.json: HTTP 404 NoSuchBucket"):
        Shards("s3://no-such/x", "video")
    with pytest.raises(ShardError, match=r"s3://clips/x/manifest\.json: HTTP 404 NoSuchKey"):
        Shards("s3://clips/x", "video")


@pytest.mark.parametrize(("url", "library"), [("http://h/x", "urllib3"), ("s3://b/x", "botocore")])
def test_a_missing_library_is_named_with_the_command(url: str, library: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == library else SimpleNamespace())
    with pytest.raises(ShardError, match=rf"{library} must be installed: pip install 'vjepa-pipeline\[remote\]'"):
        Shards(url, "video")


def test_over_tls_only_a_trusted_certificate_is_accepted(
    shards: Path, root: Path, web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    certificate = tmp_path / "server.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=127.0.0.1"
    names = [
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        str(tmp_path / "server.key"),
        "-out",
        str(certificate),
    ]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    with nginx(root, tmp_path, certificate) as url:
        with pytest.raises(ShardError, match=r"certificate.*set SSL_CERT_FILE") as caught:
            Shards(f"{url}/shards", "video")
        assert not isinstance(caught.value, RemoteError)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert Shards(f"{url}/shards", "video").read(3) == Shards(shards, "video").read(3)


def test_waiting_for_a_dead_server_ends_before_the_workers_time_out():
    with pytest.raises(ValueError, match=r"worker_timeout=100.*must exceed remote\.give_up \+ remote\.timeout = 260"):
        at("http://h/x", 2, RemoteConfig(), worker_timeout=100.0)
    at("/local", 2, RemoteConfig(), worker_timeout=100.0)


def test_the_index_is_kept_on_disk_not_in_memory_and_leaves_nothing(
    web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    opened = Shards(f"{web}/shards", "video")
    assert list(tmp_path.iterdir()) == []
    assert hashlib.sha256(opened.read(3)[0]).hexdigest() == opened.row(3)["sha256"]
