"""Claims: the labelled digits are what their labels say, the same every time, and leak nothing between their splits."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset.compat import WebDataset

from data_pipeline.config import ClipConfig, DataConfig, ModalityConfig, SourceConfig
from data_pipeline.decode import frames_at, open_decoder
from data_pipeline.loader import build_loader
from data_pipeline.prepare.digits import MADE_OF, SHEET, encode, main, make_digits
from data_pipeline.prepare.digits_scene import DIRECTIONS, SPLITS, DigitsConfig, SplitPlan, draw, load_glyphs
from data_pipeline.shards import Shards, pack_masks, unpack_masks

CONFIG = DigitsConfig(train_clips=70, probe_train_clips=24, test_clips=20)  # 70: more than are encoded at a time
AS_IT_IS = ClipConfig(frames=8, fps=8.0, size=32, scale_min=1, scale_max=1, aspect_min=1, aspect_max=1, flip=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp("digits") / "set", CONFIG)


def plan(split: str, config: DigitsConfig = CONFIG) -> SplitPlan:
    return SplitPlan(config, split, load_glyphs())


def rendered(split: str, index: int) -> np.ndarray:
    """The frames of a clip as they were drawn: uint8 `[T, H, W, 3]`."""
    the_plan = plan(split)
    scene, generator = the_plan.scene(index)
    return draw(scene, the_plan.ink, CONFIG, generator)[0]


def all_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the set as a whole ---------------------------------------------------------------------------------------------


def test_the_same_configuration_gives_the_same_bytes(made: Path, tmp_path: Path):
    again = make_digits(tmp_path / "again", CONFIG)
    assert all_files(again) == all_files(made)
    assert {MADE_OF, SHEET, *(f"{split}/manifest.json" for split in SPLITS)} <= set(all_files(made))


def test_another_probe_seed_gives_fresh_probe_clips_of_the_same_glyphs_and_the_same_training_clips(made: Path):
    other = dataclasses.replace(CONFIG, probe_seed=CONFIG.probe_seed + 1)
    for split in SPLITS:
        assert (plan(split, other).glyphs == plan(split).glyphs).all()
        ours, theirs = (plan(split, config).scene(0)[0] for config in (CONFIG, other))
        assert (ours.moving.colour == theirs.moving.colour) == (split == "train")


def test_a_set_that_is_there_is_left_alone(made: Path, monkeypatch: pytest.MonkeyPatch):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # so that making anything would fail
    assert make_digits(made, CONFIG) == made
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_a_folder_of_anything_else_is_refused_and_kept(made: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds digits of .* give another folder"):
        make_digits(made, dataclasses.replace(CONFIG, seed=5))
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        make_digits(tmp_path, CONFIG)
    assert all_files(tmp_path) == {"note.txt": b"mine"}


def test_a_set_with_another_split_in_it_is_refused(made: Path, tmp_path: Path):
    copy = make_digits(tmp_path / "copy", CONFIG)
    (copy / "test" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"test/manifest.json: missing, or not the one that was made"):
        make_digits(copy, CONFIG)


def test_where_another_process_is_faster_its_set_stays(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    theirs = tmp_path / "set"
    monkeypatch.setattr("data_pipeline.prepare.digits.write_sheet", lambda *_: shutil.copytree(made, theirs))
    assert make_digits(theirs, CONFIG) == theirs
    assert (theirs / SHEET).exists()  # ours has none: nothing was drawn on it
    assert list(tmp_path.iterdir()) == [theirs]


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data_pipeline.prepare.digits.write_sheet", full)
    with pytest.raises(OSError, match="No space"):
        make_digits(tmp_path / "set", DigitsConfig(train_clips=2, probe_train_clips=2, test_clips=2))
    assert list(tmp_path.iterdir()) == []


def test_without_scikit_learn_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        make_digits(tmp_path / "set", CONFIG)


@pytest.mark.parametrize(
    ("field", "value"),
    [("glyph_max", 22.0), ("speed_max", 0.1), ("size", 31), ("test_clips", 0), ("seed", -1), ("colour_min", 0.05)],
)
def test_an_impossible_value_names_its_field(field: str, value: Any):
    with pytest.raises(ValueError, match=f"^{field}="):
        DigitsConfig(**{field: value})


def test_glyphs_that_leave_none_for_test_are_refused():
    with pytest.raises(ValueError, match="train_glyphs=1500, probe_train_glyphs=400"):
        plan("test", DigitsConfig(train_glyphs=1500))


def test_the_command_line_makes_the_same_set(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "set"
    flags = ["--train-clips", "70", "--probe-train-clips", "24", "--test-clips", "20"]
    assert main([str(out), *flags]) == 0
    assert "test: 20 clips" in capsys.readouterr().out
    assert all_files(out) == all_files(made)
    assert main([str(out), *flags, "--seed", "3"]) == 1
    assert "give another folder" in capsys.readouterr().err


def test_the_manifest_counts_what_the_shards_hold(made: Path):
    manifest = json.loads((made / MADE_OF).read_text())
    assert manifest["config"] == dataclasses.asdict(CONFIG)
    for split in ("probe_train", "test"):
        shards = Shards(made / split, "video")
        labels = [shards.row(i)["labels"] for i in range(len(shards))]
        held = manifest["splits"][split]
        assert held["clips"] == len(shards) == CONFIG.clips(split)
        assert held["directions"] == {
            name: sum(label["direction"] == i for label in labels) for i, name in enumerate(DIRECTIONS)
        }
        for role in ("moving", "static"):
            digits = [label[f"{role}_digit"] for label in labels]
            assert held[f"{role}_digits"] == [digits.count(digit) for digit in range(10)]
        masks = np.stack([unpack_masks(label["masks"]) for label in labels])
        assert held["pixel_shares"]["moving"] == pytest.approx((masks == 2).mean(), abs=1e-5)


# --- the splits -----------------------------------------------------------------------------------------------------


def test_no_two_splits_share_a_glyph_and_none_is_left_out(made: Path):
    splits = json.loads((made / MADE_OF).read_text())["splits"]
    glyphs = {split: set(splits[split]["glyphs"]) for split in SPLITS}
    assert [len(glyphs[split]) for split in SPLITS] == [1000, 400, 397]
    assert set.union(*glyphs.values()) == set(range(1797))
    images = load_glyphs().ink
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == 1797  # nor the same drawing twice


def test_a_split_shows_its_own_glyphs_only(made: Path):
    splits = json.loads((made / MADE_OF).read_text())["splits"]
    for split in SPLITS:
        scenes = [plan(split).scene(i)[0] for i in range(CONFIG.clips(split))]
        shown = {thing.glyph for scene in scenes for thing in (scene.moving, scene.static)}
        assert shown <= set(splits[split]["glyphs"])
        assert len(shown) > CONFIG.clips(split) / 2


def test_the_training_split_carries_no_labels_and_no_clip_of_the_others(made: Path):
    rows = {split: [Shards(made / split, "video").row(i) for i in range(CONFIG.clips(split))] for split in SPLITS}
    assert not any("labels" in row for row in rows["train"])
    assert all("labels" in row for split in ("probe_train", "test") for row in rows[split])
    sums = [row["sha256"] for split in SPLITS for row in rows[split]]
    assert len(set(sums)) == len(sums)


@pytest.mark.parametrize("split", SPLITS)
def test_directions_and_digits_occur_equally_often(split: str):
    the_plan = plan(split)
    for values, kinds in ((the_plan.directions, 4), (the_plan.moving_digits, 10), (the_plan.static_digits, 10)):
        counts = np.bincount(values, minlength=kinds)
        assert counts.max() - counts.min() <= 1


# --- what is in a clip ----------------------------------------------------------------------------------------------


def test_masks_are_the_pixels_that_the_digits_cover():
    """Drawn without noise, the static digit red and the moving one green, the colours give the masks."""
    config = dataclasses.replace(CONFIG, background=0.0)
    the_plan = plan("test", config)
    hidden = 0
    for index in range(CONFIG.test_clips):
        scene, _ = the_plan.scene(index)
        red = dataclasses.replace(scene.static, colour=(1.0, 0.0, 0.0))
        green = dataclasses.replace(scene.moving, colour=(0.0, 1.0, 0.0))
        both, masks = draw(dataclasses.replace(scene, static=red, moving=green), the_plan.ink, config, None)
        no_green = dataclasses.replace(green, colour=(0.0, 0.0, 0.0), side=1e-9)
        alone, _ = draw(dataclasses.replace(scene, static=red, moving=no_green), the_plan.ink, config, None)
        is_moving, is_static = both[..., 1] >= 128, alone[..., 0] >= 128
        np.testing.assert_array_equal(masks == 2, is_moving)
        np.testing.assert_array_equal(masks == 1, is_static & ~is_moving)
        hidden += int((is_static & is_moving).sum())
    assert hidden > 100  # the moving digit does pass in front of the static one


def test_one_digit_moves_as_labelled_and_the_other_stands_still():
    the_plan = plan("test")
    for index in range(CONFIG.test_clips):
        scene, _ = the_plan.scene(index)
        away = dataclasses.replace(scene.moving, centres=scene.moving.centres + 1000.0)
        _, static = draw(dataclasses.replace(scene, moving=away), the_plan.ink, CONFIG, None)
        assert (static == static[0]).all()
        assert static.any()
        _, masks = draw(scene, the_plan.ink, CONFIG, None)
        y, x = (np.array([axis.mean() for axis in axes]) for axes in zip(*map(np.nonzero, masks == 2), strict=True))
        travelled = np.array([y[-1] - y[0], x[-1] - x[0]]) / (CONFIG.frames - 1)
        expected = scene.speed * np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])[scene.direction]
        np.testing.assert_allclose(travelled, expected, atol=0.15)


def test_the_path_stays_inside_and_lies_in_the_boxes(made: Path):
    shards = Shards(made / "test", "video")
    for index in range(len(shards)):
        labels = shards.row(index)["labels"]
        boxes = np.array([*labels["moving_boxes"], labels["static_box"]])  # [T + 1, (x0, y0, x1, y1)]
        assert boxes.min() >= 0
        assert boxes.max() <= CONFIG.size
        np.testing.assert_allclose((boxes[:-1, :2] + boxes[:-1, 2:]) / 2, labels["path"], atol=2e-3)
        for mask, (x0, y0, x1, y1) in zip(unpack_masks(labels["masks"]), boxes[:-1], strict=True):
            y, x = np.nonzero(mask == 2)
            assert x0 - 1 <= x.min()
            assert x.max() + 1 <= x1 + 1
            assert y0 - 1 <= y.min()
            assert y.max() + 1 <= y1 + 1


def test_the_time_averaged_position_carries_no_direction():
    """A path that began at a place of its own choice would be some 3.7 pixels off on average, where it goes."""
    the_plan = plan("probe_train", DigitsConfig(probe_train_clips=800))
    scenes = [the_plan.scene(index)[0] for index in range(800)]
    position = np.array([scene.moving.centres.mean(axis=0) for scene in scenes])  # [800, 2]
    direction = np.array([scene.direction for scene in scenes])
    for axis, forward, backward in ((1, 0, 2), (0, 1, 3)):
        there, back = position[direction == forward, axis], position[direction == backward, axis]
        spread = np.sqrt(there.var() / len(there) + back.var() / len(back))
        assert abs(there.mean() - back.mean()) < 4 * spread
        assert 4 * spread < 1.5  # pixels: the test would see a path that begins, not lies, at its centre
    start = np.array([scene.moving.centres[0] for scene in scenes])
    assert linear_accuracy(position, direction) < 0.32
    assert linear_accuracy(start, direction) > 0.42  # where it starts does tell, and this fit finds it


def linear_accuracy(features: np.ndarray, labels: np.ndarray) -> float:
    """Least squares on the first half, accuracy on the second."""
    inputs, half = np.c_[features, np.ones(len(features))], len(features) // 2
    weights = np.linalg.lstsq(inputs[:half], np.eye(4)[labels[:half]], rcond=None)[0]
    return float(((inputs[half:] @ weights).argmax(axis=1) == labels[half:]).mean())


# --- as video -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["torchcodec", "pyav"])
@pytest.mark.parametrize("split", SPLITS)
def test_the_loader_gives_every_clip_exactly_as_it_was_drawn(made: Path, split: str, decoder: Any):
    """No resampling, no crop, no loss: shard, decoder and transforms change no value."""
    source = SourceConfig(str(made / split))
    config = DataConfig(video=ModalityConfig({"digits": source}, AS_IT_IS), decoder=decoder, workers=0)
    clips = CONFIG.clips(split)
    samples = next(iter(build_loader(config, seed=0, batch={"video": clips}, stop_step=1)))["video"]
    assert {sample.key for sample in samples} == {f"{split}-{i:06d}" for i in range(clips)}
    for sample in samples:
        assert not sample.rejected
        expected = rendered(split, int(sample.key.rpartition("-")[2]))
        np.testing.assert_array_equal(sample.clip.permute(1, 2, 3, 0).numpy(), expected)
        np.testing.assert_array_equal(sample.extra["timestamps"], np.arange(8) / 8)
        if split != "train":
            assert unpack_masks(sample.extra["labels"]["masks"]).shape == (8, 32, 32)


@pytest.mark.parametrize("decoder", ["torchcodec", "pyav"])
def test_every_frame_can_be_had_alone(decoder: Any):
    clips = np.random.default_rng(0).integers(0, 256, (3, 8, 32, 32, 3), dtype=np.uint8)
    for data, frames in zip(encode(clips, 8.0), clips, strict=True):
        for i in (7, 3, 0):
            alone = frames_at(open_decoder(data, "video", backend=decoder), np.array([i / 8]))
            np.testing.assert_array_equal(alone[0].permute(1, 2, 0).numpy(), frames[i])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its tar open
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_webdataset_reads_the_videos_and_the_labels(made: Path):
    tars = [str(path) for path in sorted((made / "test").glob("*.tar"))]
    shards = Shards(made / "test", "video")
    samples = list(WebDataset(tars, shardshuffle=False))
    assert len(samples) == len(shards) == CONFIG.test_clips
    for i, sample in enumerate(samples):
        data, row = shards.read(i, verify=True)
        assert sample["mp4"] == data
        assert json.loads(sample["json"])["labels"] == row["labels"]


def test_masks_survive_the_json():
    masks = np.random.default_rng(0).integers(0, 3, (8, 32, 32), dtype=np.uint8)
    np.testing.assert_array_equal(unpack_masks(json.loads(json.dumps(pack_masks(masks)))), masks)
