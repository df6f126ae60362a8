"""Claims: folders of media files, lists of paths and VideoFolders are sources with the order and resume of shards."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_loader import config, content, digest, stream

from data_pipeline.config import ClipConfig, DataConfig, ModalityConfig, SourceConfig
from data_pipeline.dataset import BadDataError, ClipDataset
from data_pipeline.files import Files
from data_pipeline.loader import build_loader
from data_pipeline.shards import RecordError, ShardError, Shards
from data_pipeline.sources import open_source, source_modalities


@pytest.fixture(scope="module")
def media(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of the debug shards as single files in sub-folders `left` and `right`, beside other things."""
    folder = tmp_path_factory.mktemp("files") / "media"
    for modality in ("video", "image"):
        opened = Shards(shards, modality)
        for i in range(len(opened)):
            data, row = opened.read(i)
            path = folder / ("left" if i % 3 else "right") / f"{row['key']}.{row['ext']}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    (folder / "README.md").write_text("not a record")
    (folder / "left" / "._hidden.mp4").write_text("not one either")
    return folder


def table(media: Path, lines: list[str], name: str = "list.csv") -> Path:
    path = media.parent / name
    path.write_text("\n".join(lines) + "\n")
    return path


def videos(media: Path) -> list[str]:
    return sorted(path.relative_to(media.parent).as_posix() for path in media.rglob("*.mp4") if path.name[0] != ".")


def labels(opened: Files) -> list[Any]:
    return [opened.row(i).get("labels") for i in range(len(opened))]


def test_the_stream_of_a_folder_is_exact_for_any_workers_world_and_start(
    media: Path, capsys: pytest.CaptureFixture[str]
):
    assert source_modalities(media) == ["video", "image"]
    whole = digest(media, capsys)
    assert len({key for row in whole[:1] for key in row["keys"]}) == 6
    assert sorted({key for row in whole for key in row["keys"]}) == [
        name.removeprefix("media/") for name in videos(media)
    ]
    assert digest(media, capsys, workers=2) == whole
    assert digest(media, capsys, start=2, steps=2) == whole[2:]
    parts = [digest(media, capsys, world=2, rank=rank) for rank in range(2)]
    for step, row in enumerate(whole):
        assert [digest for part in parts for digest in part[step]["sha256"]] == row["sha256"]


def test_both_modalities_of_a_folder_train_together(media: Path, shards: Path):
    built = build_loader(config(media), seed=1, batch={"video": 10, "image": 7}, stop_step=2)
    found = stream(built)
    assert len({key for _, key, _ in found["video"]}) == 10
    assert len({key for _, key, _ in found["image"]}) == 7
    assert built.info["video"]["debug"]["samples"] == 10
    assert built.info["video"]["debug"]["bytes"] == sum((media.parent / name).stat().st_size for name in videos(media))
    assert built.dataset.counters()["image"]["debug"]["records"] == 14


def test_a_list_gives_its_own_order_and_labels(media: Path):
    names = videos(media)[::-1]
    lines = [f"{name} {i}" for i, name in enumerate(names)]
    lines[1] = f"{media.parent / names[1]} 1"  # absolute, as V-JEPA's lists are
    opened = open_source(table(media, ["", *lines, " "]), "video")
    assert isinstance(opened, Files)
    assert labels(opened) == [{"label": i} for i in range(10)]
    assert [opened.read(i)[0] for i in range(10)] == [(media.parent / name).read_bytes() for name in names]
    sample = ClipDataset(one_video_source(table(media, lines)), seed=0).sample("video", 0)
    assert sample.extra["labels"]["label"] == [line.rpartition(" ")[0] for line in lines].index(sample.key)


def one_video_source(path: Path, **values: Any) -> DataConfig:
    part = ModalityConfig({"files": SourceConfig(str(path))}, ClipConfig(frames=2, size=16))
    return dataclasses.replace(DataConfig(video=part, workers=0), **values)


def test_a_list_may_lack_labels_and_hold_spaces_tabs_and_images(media: Path):
    spaced = media.parent / "with space 2.mp4"
    shutil.copy(media.parent / videos(media)[0], spaced)
    lines = ["with space 2.mp4", "with space 2.mp4 -7", "with space 2.mp4\t8", '"with space 2.mp4" 9', "some.png 3"]
    path = table(media, lines, "odd.txt")
    opened = Files(path, "video")
    assert labels(opened) == [None, {"label": -7}, {"label": 8}, {"label": 9}]
    assert {opened.read(i)[0] for i in range(4)} == {spaced.read_bytes()}
    assert len(Files(path, "image")) == 1


@pytest.mark.parametrize("line", ["path,label", "clip.mp4,3", "https://host/clip.mp4 3", "notes.md 1"])
def test_a_line_that_is_no_path_and_label_is_named(media: Path, line: str):
    path = table(media, [videos(media)[0] + " 0", line], "wrong.csv")
    with pytest.raises(ShardError, match=r"wrong\.csv, line 2: .* is not `PATH LABEL`"):
        open_source(path, "video")


def test_folders_are_classes(media: Path):
    opened = Files(media, "video")
    assert labels(opened) == [{"label": 0, "class": "left"}] * 6 + [{"label": 1, "class": "right"}] * 4
    assert labels(Files(media / "left", "video")) == [None] * 6


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_metadata_table_gives_the_labels(media: Path, tmp_path: Path, name: str):
    folder = Path(shutil.copytree(media, tmp_path / "copy"))
    files = [path.removeprefix("media/left/") for path in videos(media) if "/left/" in path]
    if name.endswith("csv"):
        text = "file_name,caption\n" + "".join(f'{file},"no, {i}"\n' for i, file in enumerate(files))
    else:
        rows = [{"file_name": file, "caption": f"no, {i}"} for i, file in enumerate(files)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "left" / name).write_text(text)
    assert labels(Files(folder, "video")) == [{"caption": f"no, {i}"} for i in range(6)] + [None] * 4
    (folder / "left" / name).write_text("something,else\n1,2\n")
    with pytest.raises(ShardError, match=rf"{name}: not a table with the column file_name"):
        Files(folder, "video")


def test_broken_and_missing_files_are_bad_samples(media: Path):
    names = videos(media)
    (media.parent / "broken.mp4").write_bytes(b"no video")
    (media.parent / "empty.mp4").write_bytes(b"")
    path = table(media, [*names, "broken.mp4 1", "missing.mp4 1", "empty.mp4"], "some.csv")
    samples = [ClipDataset(one_video_source(path), seed=1).sample("video", ordinal) for ordinal in range(13)]
    bad = {each.key: each.reason for sample in samples for each in sample.rejected}
    assert bad.keys() == {"broken.mp4", "missing.mp4", "empty.mp4"}
    assert "no such file" in bad["missing.mp4"]
    assert {sample.key for sample in samples} <= set(names)
    again = [ClipDataset(one_video_source(path), seed=1).sample("video", ordinal) for ordinal in range(13)]
    assert content(again) == content(samples)
    nothing = ClipDataset(one_video_source(table(media, ["missing.mp4", "gone.mp4"], "gone.csv")), seed=1)
    with pytest.raises(BadDataError, match="records in a row are bad"):
        nothing.sample("video", 0)


def test_a_file_removed_after_opening_is_a_bad_record(media: Path, tmp_path: Path):
    opened = Files(shutil.copytree(media / "left", tmp_path / "copy"), "video")
    (tmp_path / "copy" / opened.row(2)["key"]).unlink()
    with pytest.raises(RecordError, match="no such file"):
        opened.read(2)
    assert opened.read(3)[0] == (media / "left" / opened.row(3)["key"]).read_bytes()


def test_the_fingerprint_tells_another_order(media: Path, shards: Path, tmp_path: Path):
    folder = Path(shutil.copytree(media, tmp_path / "copy"))
    before = Files(folder, "video").fingerprint
    assert Files(media, "video").fingerprint == before  # wherever it lies
    shutil.copy(media.parent / videos(media)[0], folder / "more.mp4")
    assert Files(folder, "video").fingerprint != before
    assert Shards(shards, "video").fingerprint != Shards(shards, "image").fingerprint


def test_links_that_lead_back_are_followed_once(media: Path, tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "sub" / "media").symlink_to(media)
    assert len(Files(tmp_path, "video")) == 10


def test_a_folder_with_neither_shards_nor_media_says_what_is_missing(tmp_path: Path):
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(ShardError, match=r"manifest\.json: no such file; give a folder written by"):
        open_source(tmp_path, "video")
    with pytest.raises(ShardError, match=r"nowhere/manifest\.json: no such file"):
        open_source(tmp_path / "nowhere", "video")


def test_a_folder_of_shards_stays_one_whatever_else_lies_in_it(shards: Path, media: Path, tmp_path: Path):
    folder = Path(shutil.copytree(shards, tmp_path / "both"))
    shutil.copy(media.parent / videos(media)[0], folder)
    assert isinstance(open_source(folder, "video"), Shards)
