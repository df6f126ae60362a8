"""Claims: shards are plain WebDataset, read back exactly, and say clearly what is wrong with them."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from webdataset.compat import WebDataset

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


def _short_index(folder: Path) -> None:
    os.truncate(folder / "video-000000.index.jsonl", 300)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_manifest, r"manifest\.json: no such file; give a folder written by .*ingest"),
        (_old_schema, r"manifest\.json: schema version 0, but this code reads 1; ingest .* again"),
        (_half_manifest, r"manifest\.json: not JSON .*ingest .* again"),
        (_no_tar, r"video-000000\.tar: named by the manifest but missing; ingest .* again"),
        (_short_tar, r"video-000000\.tar: 5000 bytes, but the manifest says \d+; ingest .* again"),
        (_short_index, r"video-000000\.index\.jsonl: differs from the sha256 .*ingest .* again"),
    ],
)
def test_a_damaged_folder_names_the_file_and_the_remedy(copy: Path, damage: Callable[[Path], None], message: str):
    damage(copy)
    with pytest.raises(ShardError, match=message):
        Shards(copy, "video")


def test_a_tar_cut_after_opening_is_a_clear_error_not_a_short_record(copy: Path):
    opened = Shards(copy, "video")
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
