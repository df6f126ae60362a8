"""Claims: shards are plain WebDataset, read back exactly, and say clearly what is wrong with them."""

import errno
import hashlib
import json
import mmap
import os
import pickle
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cache import fork
from test_loader import config
from webdataset.compat import WebDataset

from data_pipeline.folders import LocalFolder
from data_pipeline.loader import build_loader
from data_pipeline.shards import RecordError, ShardError, Shards, modalities


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    """A shard folder that a test may damage."""
    return Path(shutil.copytree(shards, tmp_path / "copy"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its tar open
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize(("modality", "ext", "count"), [("video", "mp4", 10), ("image", "png", 7)])
def test_webdataset_and_the_index_read_the_same_bytes(shards: Path, modality: str, ext: str, count: int):
    tars = [str(path) for path in sorted(shards.glob(f"{modality}-*.tar"))]
    theirs = {sample["__key__"]: sample for sample in WebDataset(tars, shardshuffle=False)}
    ours = Shards(shards, modality)
    assert len(theirs) == len(ours) == count
    for i in range(count):
        data, row = ours.read(i, verify=True)
        sample = theirs[row["key"]]
        assert sample[ext] == data
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
        meta = json.loads(sample["json"])
        assert meta == {name: row[name] for name in meta}
        assert meta["labels"]["shape"] in (0, 1)


def test_both_modalities_lie_in_one_folder(shards: Path):
    assert modalities(shards) == modalities(shards / "manifest.json") == ["video", "image"]
    assert len(Shards(shards, "video")) == 10
    assert len(Shards(shards, "image")) == 7
    assert Shards(shards, "video").total_bytes == sum(path.stat().st_size for path in shards.glob("video-*.tar"))


def test_an_index_outside_the_shards_is_an_error(shards: Path):
    for index in (-1, 10):
        with pytest.raises(IndexError, match="outside"):
            Shards(shards, "video").read(index)


def test_a_forked_process_reads_on_and_closes_only_its_own(shards: Path):
    opened = Shards(shards, "video")
    expected = opened.read(3)[0]
    child = os.fork()
    if child == 0:
        same = opened.read(3)[0] == expected
        opened.close()  # must not close the parent's
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert opened.read(3)[0] == expected


def test_a_pickled_folder_opens_its_files_anew(shards: Path):
    opened = Shards(shards, "video")
    expected = opened.read(3)[0]
    sent = pickle.dumps(opened)
    opened.close()  # the descriptors of this process mean nothing in another one
    assert pickle.loads(sent).read(3)[0] == expected


def _no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _old_schema(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"schema": 0}))


def _half_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 100)


def _no_tar(folder: Path) -> None:
    (folder / "video-000000.tar").unlink()


def _short_tar(folder: Path) -> None:
    os.chmod(folder / "video-000000.tar", 0o644)
    os.truncate(folder / "video-000000.tar", 5000)


def _no_index(folder: Path) -> None:
    (folder / "video-000000.index.jsonl").unlink()


def _short_index(folder: Path) -> None:
    os.truncate(folder / "video-000000.index.jsonl", 300)


def _wrong_count(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["samples"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_manifest, r"manifest\.json: no such file; give a folder written by .*ingest"),
        (_old_schema, r"manifest\.json: schema version 0, but this code reads 1; ingest .* again"),
        (_half_manifest, r"manifest\.json: not JSON .*ingest .* again"),
        (_no_tar, r"video-000000\.tar: named by the manifest but missing; ingest .* again"),
        (_short_tar, r"video-000000\.tar: 5000 bytes, but the manifest says \d+; ingest .* again"),
    ],
)
def test_a_damaged_folder_names_the_file_and_the_remedy(copy: Path, damage: Callable[[Path], None], message: str):
    damage(copy)
    with pytest.raises(ShardError, match=message):
        Shards(copy, "video")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_index, r"video-000000\.index\.jsonl: named by the manifest but missing; ingest .* again"),
        (_short_index, r"video-000000\.index\.jsonl: differs from the sha256 .*ingest .* again"),
        (_wrong_count, r"video-000000\.index\.jsonl: 10 rows, but the manifest says 11; ingest .* again"),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_index_stops_a_run_by_name_at_its_first_record(
    copy: Path, damage: Callable[[Path], None], message: str, workers: int
):
    damage(copy)
    opened = Shards(copy, "video")  # the manifest is whole
    for _ in range(2):
        with pytest.raises(ShardError, match=message):
            opened.read(0)
    with pytest.raises(ShardError, match=message):
        next(iter(build_loader(config(copy, workers), seed=0, batch={"video": 2, "image": 1})))


def test_of_a_large_set_some_tars_are_looked_at_when_it_is_opened_the_others_when_they_are_first_read(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, _ = many_shards(shards, tmp_path / "many")
    monkeypatch.setattr(LocalFolder, "checked_at_opening", 3)  # of ten: the first, the fifth and the last
    os.truncate(folder / "7.tar", 9)
    opened = Shards(folder, "video")
    with pytest.raises(ShardError, match=r"7\.tar: 9 bytes, but the manifest says"):
        opened.read(7)
    opened.read(6)
    (folder / "9.tar").unlink()
    with pytest.raises(ShardError, match=r"9\.tar: named by the manifest but missing"):
        Shards(folder, "video")


def test_opening_reads_no_index_and_a_run_reads_each_one_once(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, rows = many_shards(shards, tmp_path / "many")
    reads = np.frombuffer(mmap.mmap(-1, 80), np.int64)  # by shard, counted in the forked processes too
    plain = LocalFolder.index

    def counted(self: LocalFolder, name: str, sha256: str) -> bytes:
        reads[int(name.partition(".")[0])] += 1
        return plain(self, name, sha256)

    monkeypatch.setattr(LocalFolder, "index", counted)
    opened = Shards(folder, "video")
    assert len(opened) == 10
    assert opened.fingerprint == Shards(folder / "manifest.json", "video").fingerprint
    assert not reads.any()
    assert opened.row(3)["key"] == rows[3]["key"]
    assert reads.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]

    def all_right() -> None:
        assert [opened.row(i)["key"] for i in range(10)] == [row["key"] for row in rows]

    for _ in range(2):  # one after the other: each reads what the ones before have not
        assert os.waitpid(fork(all_right), 0)[1] == 0
    all_right()
    assert reads.tolist() == [1] * 10


def many_shards(shards: Path, folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The ten videos in ten shards, all of the same tar's bytes; the folder and the rows."""
    folder.mkdir()
    tar = (shards / "video-000000.tar").read_bytes()
    rows = [json.loads(line) for line in (shards / "video-000000.index.jsonl").read_text().splitlines()]
    entries = []
    for number, row in enumerate(rows):
        (folder / f"{number}.tar").write_bytes(tar)
        index = (json.dumps(row | {"note": "x" * number}) + "\n").encode()  # no two of the same length
        (folder / f"{number}.index.jsonl").write_bytes(index)
        entry = {"name": f"{number}.tar", "index": f"{number}.index.jsonl", "modality": "video", "samples": 1}
        entries.append(entry | {"bytes": len(tar), "index_sha256": hashlib.sha256(index).hexdigest()})
    (folder / "manifest.json").write_text(json.dumps({"schema": 1, "shards": entries}))
    return folder, rows


def test_processes_that_read_all_indices_at_once_see_the_same_rows(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = os.fstat

    def slow(descriptor: int) -> os.stat_result:
        found = plain(descriptor)
        time.sleep(0.05)  # between looking where the shared file ends and writing there
        return found

    monkeypatch.setattr(os, "fstat", slow)
    folder, rows = many_shards(shards, tmp_path / "many")
    opened = Shards(folder, "video")

    def work(worker: int) -> None:
        for i in [(i + worker) % 10 for i in range(10)] * 20:
            assert opened.row(i)["key"] == rows[i]["key"]

    children = [fork(partial(work, worker)) for worker in range(6)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6


def test_a_full_temporary_folder_is_named(shards: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    opened = Shards(shards, "video")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(ShardError, match=r"no room for .*No space left.*set TMPDIR"):
            opened.read(0)
    assert opened.read(0)[0]


def test_a_tar_cut_during_the_run_is_a_clear_error_not_a_short_record(copy: Path):
    opened = Shards(copy, "video")
    opened.read(0)
    _short_tar(copy)
    with pytest.raises(ShardError, match=r"video-000000\.tar: ends \d+ bytes early"):
        opened.read(9)


def test_changed_bytes_are_noticed(copy: Path):
    opened = Shards(copy, "video")
    row = opened.row(4)
    path = copy / row["shard"]
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(row["offset"] + row["size"] // 2)
        file.write(b"damage")
    with pytest.raises(RecordError, match="sha256"):
        opened.read(4, verify=True)
