"""Data sets are found in the layouts that users have, and what is missing is said."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from evals.labelled_files import DataMissing, FileIndex, check_splits, hold_out, read_index
from evals.labelled_layouts import DATASETS, Split


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_ssv2(root: Path) -> None:
    write_json(
        root / "something-something-v2-labels.json", {"Holding something next to something": "1", "Falling": "0"}
    )
    rows = [{"id": "7", "template": "Holding [something] next to [something]"}, {"id": "9", "template": "Falling"}]
    write_json(root / "something-something-v2-train.json", rows)
    write_json(root / "something-something-v2-validation.json", rows[:1])
    touch(root / "20bn-something-something-v2/7.webm", root / "20bn-something-something-v2/9.webm")


def make_diving48(root: Path) -> None:
    write_json(root / "Diving48_V2_train.json", [{"vid_name": "b", "label": 1}, {"vid_name": "a", "label": 0}])
    write_json(root / "Diving48_V2_test.json", [{"vid_name": "a", "label": 0}])
    write_json(root / "Diving48_vocab.json", [["Back", "15som"], ["Forward", "PIKE"]])
    touch(root / "rgb/a.mp4", root / "rgb/b.mp4")


def make_jester(root: Path) -> None:
    touch(root / "20bn-jester-v1/34/00001.jpg", root / "20bn-jester-v1/56/00001.jpg")
    (root / "jester-v1-labels.csv").write_text("Swiping Left\nNo gesture\n")
    (root / "jester-v1-train.csv").write_text("34;No gesture\n56;Swiping Left\n")
    (root / "jester-v1-validation.csv").write_text("56;Swiping Left\n")


def make_coin(root: Path) -> None:
    videos = {
        "x": {"subset": "training", "class": "PutOnHairExtensions", "recipe_type": 1},
        "y": {"subset": "training", "class": "MakeTea", "recipe_type": 0},
        "z": {"subset": "testing", "class": "PutOnHairExtensions", "recipe_type": 1},
    }
    write_json(root / "COIN.json", {"database": videos})
    touch(root / "videos/1/x.mp4", root / "videos/0/y.mkv", root / "videos/1/z.mp4")


def make_kinetics(root: Path) -> None:
    head = "label,youtube_id,time_start,time_end,split\n"
    (root / "annotations").mkdir(parents=True)
    (root / "annotations/train.csv").write_text(f"{head}yoga,abc,1,11,train\nabseiling,def,20,30,train\n")
    (root / "annotations/val.csv").write_text(f"{head}yoga,ghi,0,10,validate\n")
    touch(
        root / "train/abc_000001_000011.mp4", root / "train/def_000020_000030.mp4", root / "val/ghi_000000_000010.mp4"
    )


def make_folders(root: Path) -> None:
    touch(root / "train/n02/1.JPEG", root / "train/n01/2.JPEG", root / "val/n02/3.JPEG")


MAKERS: dict[str, tuple[Callable[[Path], None], list[tuple[str, int]], list[tuple[str, int]], tuple[str, ...]]] = {
    "ssv2": (
        make_ssv2,
        [("20bn-something-something-v2/7.webm", 1), ("20bn-something-something-v2/9.webm", 0)],
        [("20bn-something-something-v2/7.webm", 1)],
        ("Falling", "Holding something next to something"),
    ),
    "diving48": (
        make_diving48,
        [("rgb/b.mp4", 1), ("rgb/a.mp4", 0)],
        [("rgb/a.mp4", 0)],
        ("Back 15som", "Forward PIKE"),
    ),
    "jester": (
        make_jester,
        [("20bn-jester-v1/34", 1), ("20bn-jester-v1/56", 0)],
        [("20bn-jester-v1/56", 0)],
        ("Swiping Left", "No gesture"),
    ),
    "coin": (
        make_coin,
        [("videos/1/x.mp4", 1), ("videos/0/y.mkv", 0)],
        [("videos/1/z.mp4", 1)],
        ("MakeTea", "PutOnHairExtensions"),
    ),
    "k400": (
        make_kinetics,
        [("train/abc_000001_000011.mp4", 1), ("train/def_000020_000030.mp4", 0)],
        [("val/ghi_000000_000010.mp4", 1)],
        ("abseiling", "yoga"),
    ),
    "in1k": (
        make_folders,
        [("train/n01/2.JPEG", 0), ("train/n02/1.JPEG", 1)],
        [("val/n02/3.JPEG", 1)],
        ("n01", "n02"),
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_set_is_read_from_its_makers_tree(name: str, tmp_path: Path) -> None:
    make, train, validation, classes = MAKERS[name]
    make(tmp_path)
    for split, expected in (("train", train), ("validation", validation)):
        index = read_index(name, tmp_path, split)  # type: ignore[arg-type]
        found = [(str(p.relative_to(tmp_path)), n) for p, n in zip(index.paths, index.labels, strict=True)]
        assert found == expected
        assert index.classes == classes


def test_kinetics_is_read_from_class_folders_too(tmp_path: Path) -> None:
    touch(tmp_path / "train/yoga/a b.mp4", tmp_path / "val/yoga/c.mp4", tmp_path / "train/abseiling/d.mp4")
    assert read_index("k400", tmp_path, "validation").labels == (1,)


@pytest.mark.parametrize("file", ["train.csv", "ssv2_train.csv", "ssv2_train_paths.csv"])
def test_a_list_of_paths_and_labels_comes_first(file: str, tmp_path: Path) -> None:
    make_ssv2(tmp_path)
    outside = tmp_path / "elsewhere" / "a video.mp4"
    touch(outside, tmp_path / "mine/2.mp4")
    (tmp_path / file).write_text(f"{outside} 17\nmine/2.mp4 3\n\n")
    index = read_index("ssv2", tmp_path, "train")
    assert index.paths == (outside, tmp_path / "mine/2.mp4")
    assert index.labels == (17, 3)
    assert len(index.classes) == 174


def test_lists_may_lie_anywhere_and_bad_lines_are_named(tmp_path: Path) -> None:
    touch(tmp_path / "root/1.mp4")
    (tmp_path / "my list").write_text("1.mp4,5\n")
    assert read_index("coin", tmp_path / "root", "train", files=tmp_path / "my list").labels == (5,)
    (tmp_path / "my list").write_text("1.mp4 5\n1.mp4 tea\n")
    with pytest.raises(ValueError, match=r"line 2: '1\.mp4 tea'"):
        read_index("coin", tmp_path / "root", "train", files=tmp_path / "my list")
    (tmp_path / "my list").write_text("1.mp4 180\n")
    with pytest.raises(ValueError, match=r"label 180 is not in 0\.\.179"):
        read_index("coin", tmp_path / "root", "train", files=tmp_path / "my list")


@pytest.mark.parametrize("name", DATASETS)
def test_what_is_not_there_is_described(name: str, tmp_path: Path) -> None:
    for root, reason in ((tmp_path, "none of the known layouts"), (tmp_path / "nowhere", "is no folder")):
        with pytest.raises(DataMissing) as error:
            read_index(name, root, "train")
        message = str(error.value)
        assert reason in message
        assert DATASETS[name].tree in message
        assert "nothing is downloaded" in message


def test_files_that_are_not_on_disk_are_refused_or_left_out(tmp_path: Path) -> None:
    make_ssv2(tmp_path)
    (tmp_path / "20bn-something-something-v2/7.webm").unlink()
    with pytest.raises(DataMissing, match=r"1 of 2 files of ssv2 train are not on disk, such as .*7\.webm"):
        read_index("ssv2", tmp_path, "train")
    index = read_index("ssv2", tmp_path, "train", skip_missing=True)
    assert [path.name for path in index.paths] == ["9.webm"]
    assert index.labels == (0,)
    with pytest.raises(DataMissing, match="1 of 1 files"):
        read_index("ssv2", tmp_path, "validation", skip_missing=True)


def test_a_class_nobody_knows_is_named(tmp_path: Path) -> None:
    make_ssv2(tmp_path)
    write_json(tmp_path / "something-something-v2-train.json", [{"id": "7", "template": "Eating [something]"}])
    with pytest.raises(ValueError, match="'Eating something' is not among its 2 classes"):
        read_index("ssv2", tmp_path, "train")


def test_what_is_held_out_depends_on_its_key_alone() -> None:
    keys = [f"{i}.mp4" for i in range(400)]
    rest, held = hold_out(keys, 0.1)
    assert sorted(rest + held) == list(range(400))
    assert 20 <= len(held) <= 60
    assert hold_out(keys[:100], 0.1)[1] == [i for i in held if i < 100]
    assert hold_out(keys, 0.1, seed=1)[1] != held
    with pytest.raises(ValueError, match="share=1"):
        hold_out(keys, 1.0)


def test_a_class_that_training_lacks_is_refused_and_not_left_out(tmp_path: Path) -> None:
    """Its files would be missing from the score without a word; hidden folders are no classes."""
    touch(tmp_path / "train/a/1.mp4", tmp_path / "val/a/2.mp4", tmp_path / "train/.cache/3", tmp_path / "val/.cache/4")
    assert read_index("folders", tmp_path, "validation").classes == ("a",)
    touch(tmp_path / "val/A/5.mp4")
    with pytest.raises(ValueError, match=r"val has 1 classes that .*train has not, such as 'A'"):
        read_index("folders", tmp_path, "validation")


def test_paths_of_a_list_may_hold_blanks_and_commas(tmp_path: Path) -> None:
    touch(tmp_path / "a b.mp4", tmp_path / "c,d e.mp4")
    (tmp_path / "train.csv").write_text("a b.mp4,3\nc,d e.mp4 4\nc,d e.mp4, 5\n")
    index = read_index("folders", tmp_path, "train")
    assert [path.name for path in index.paths] == ["a b.mp4", "c,d e.mp4", "c,d e.mp4"]
    assert index.labels == (3, 4, 5)


def test_an_annotation_that_is_damaged_is_named(tmp_path: Path) -> None:
    make_ssv2(tmp_path)
    file = tmp_path / "something-something-v2-train.json"
    write_json(file, [{"id": "7"}])
    with pytest.raises(ValueError, match=r"ssv2: an annotation of the split 'train' .*KeyError\('template'\)"):
        read_index("ssv2", tmp_path, "train")
    (tmp_path / "something-something-v2-labels.json").write_text('{"Holding something": "x"}')
    with pytest.raises(ValueError, match=r"ssv2: an annotation of the split 'train' below .* literal for int"):
        read_index("ssv2", tmp_path, "train")
    make_ssv2(tmp_path)
    file.write_text("[{")
    with pytest.raises(ValueError, match=r"v2-train\.json is no readable JSON"):
        read_index("ssv2", tmp_path, "train")


def test_splits_that_share_files_or_ask_for_what_cannot_be_learnt_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    def index(split: Split, *names: str, labels: tuple[int, ...], classes: tuple[str, ...] = ("a", "b")) -> FileIndex:
        return FileIndex("folders", split, tuple(map(Path, names)), labels, classes)

    train = index("train", "1", "2", labels=(0, 1))
    check_splits(train, index("validation", "3", labels=(1,)))
    assert not caplog.records
    check_splits(train, index("validation", "2", "3", labels=(1, 0)))
    assert "1 of 2 validation files are training files too, such as 2" in caplog.text
    check_splits(index("train", "1", labels=(0,)), index("validation", "3", labels=(1,)))
    assert "1 classes of validation have no training file, such as b" in caplog.text
    with pytest.raises(ValueError, match=r"validation has the label 2, training the labels 0\.\.1"):
        check_splits(train, index("validation", "3", labels=(2,), classes=("a", "b", "c")))
