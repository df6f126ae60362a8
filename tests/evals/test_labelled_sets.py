"""A labelled set is read whole, in order and the same every time; its labels are those of the metadata."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.prepare.digits import DigitsConfig, make_digits
from data_pipeline.prepare.digits_scene import DIRECTIONS as DRAWN_DIRECTIONS
from data_pipeline.prepare.synthetic import make_debug_shards
from data_pipeline.shards import Shards, unpack_masks
from evals.datasets import LabelError, LabelledClips, read_labelled, token_classes
from evals.labelled_suite import read_splits, run_suite
from evals.protocol import EvalConfig, FitConfig
from evals.results import read_summary_rows
from evals.run import main
from evals.suites import DIRECTIONS, MOTION
from tests.evals.sources import MaskFeatures
from vjepa import create_model, hub

CLIPS = {"train_clips": 1, "probe_train_clips": 60, "test_clips": 20}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp("labelled") / "digits", DigitsConfig(**CLIPS))


def read(digits: Path, split: str = "test", **options: int) -> LabelledClips:
    return read_labelled(digits / split, MOTION.label_reader(patch_size=8, tubelet_size=2), **options)


def test_a_set_is_read_whole_in_the_order_of_its_shards(digits: Path) -> None:
    data, shards = read(digits), Shards(digits / "test", "video")
    assert data.clips.shape == (20, 3, 8, 32, 32)
    assert data.clips.dtype == torch.uint8
    assert list(data.keys) == [shards.row(index)["key"] for index in range(20)]
    assert torch.equal(read(digits).clips, data.clips)
    assert torch.equal(read(digits, limit=3).clips, data.clips[:3])


def test_labels_are_those_of_the_record_on_the_grid_of_the_tokens(digits: Path) -> None:
    data, shards = read(digits), Shards(digits / "test", "video")
    for index in range(len(shards)):
        labels = shards.row(index)["labels"]
        masks = unpack_masks(labels["masks"]).reshape(4, 2, 4, 8, 4, 8)
        shares = np.stack([(masks == value).mean(axis=(1, 3, 5)) for value in (1, 2)])  # static, moving
        layout = np.where(shares.max(axis=0) > 0.2, np.where(shares[1] >= shares[0], 2, 1), 0)
        assert data.labels["direction"][index] == labels["direction"]
        assert data.labels["digit"][index] == labels["moving_digit"]
        assert np.array_equal(data.labels["layout"][index].numpy(), layout)
        assert np.array_equal(data.labels["object"][index].numpy(), layout > 0)
        directions = np.where(layout == 2, 1 + labels["direction"], 0)
        assert np.array_equal(data.labels["token_direction"][index].numpy(), directions)
    assert DIRECTIONS == DRAWN_DIRECTIONS


def test_masks_lie_on_the_frames_that_are_read(digits: Path) -> None:
    """In every single frame digits are bright and the background is dark: a shift by one frame would show."""
    data, shards = read(digits), Shards(digits / "test", "video")
    brightness = data.clips.float().mean(dim=1)  # [N, T, H, W]
    masks = torch.stack([torch.from_numpy(unpack_masks(shards.row(index)["labels"]["masks"])) for index in range(20)])
    assert (masks[:, 1:] != masks[:, :-1]).any()
    is_bright = brightness > 255 * 0.4
    wrong = (is_bright != (masks > 0)).float().mean(dim=(2, 3))  # [N, T]
    shifted = (is_bright[:, :-1] != (masks[:, 1:] > 0)).float().mean()
    assert wrong.max() < 0.08
    assert wrong.mean() < 0.5 * shifted


def test_tokens_lie_where_their_pixels_are() -> None:
    masks = torch.zeros(8, 32, 32, dtype=torch.uint8)
    masks[2:4, 8:16, 24:32] = 2
    masks[6:8, 0:8, 16:24] = 1
    expected = torch.zeros(4, 4, 4, dtype=torch.int64)
    expected[1, 1, 3], expected[3, 0, 2] = 2, 1
    assert torch.equal(token_classes(masks, 3, patch_size=8, tubelet_size=2), expected)


def test_a_token_belongs_to_the_class_with_most_of_its_pixels() -> None:
    masks = torch.zeros(2, 4, 8, dtype=torch.uint8)
    masks[0, :2, :2], masks[1, :, 1] = 1, 2  # 4 of 32 pixels, then 4 of 32 more: neither above a fifth
    masks[:, :, 4], masks[:, :, 5] = 1, 2  # 8 and 8 of 32: equal
    assert token_classes(masks, 3, patch_size=4, tubelet_size=2).tolist() == [[[0, 2]]]
    masks[0, 0, 6] = 1
    assert token_classes(masks, 3, patch_size=4, tubelet_size=2).tolist() == [[[0, 1]]]
    with pytest.raises(ValueError, match="do not divide"):
        token_classes(masks, 3, patch_size=3, tubelet_size=2)


def test_records_without_the_labels_are_named(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="record train-000000 has no labels"):
        read(digits, "train")
    shapes = make_debug_shards(tmp_path / "shapes", videos=1, images=1, seconds=0.5)
    with pytest.raises(LabelError, match="do not fit this suite: KeyError"):
        read_labelled(shapes, MOTION.label_reader(patch_size=8, tubelet_size=2))


def test_one_record_in_both_splits_is_refused(digits: Path, tmp_path: Path) -> None:
    for split in ("probe_train", "test"):
        (tmp_path / split).symlink_to(digits / "test")
    with pytest.raises(ValueError, match="20 records are in both splits, such as test-000000"):
        read_splits(MOTION, tmp_path, patch_size=8, tubelet_size=2)


def test_a_source_that_knows_the_truth_is_scored_right(digits: Path) -> None:
    """The whole chain, shards to rows: tokens made of the true masks and direction answer every layout question."""
    train, test = read_splits(MOTION, digits, patch_size=8, tubelet_size=2)
    source = MaskFeatures("truth", [train, test])
    config = EvalConfig(seeds=(0,), fit=FitConfig(steps=150, lr=5e-2))
    rows = run_suite(MOTION, [source], train, test, config, stage="primary", step=7, training_seed=2)
    values = {row.task: row.value for row in rows}
    for task in ("segmentation", "direction_segmentation", "object_segmentation", "motion"):
        assert values[task] == 1.0, task
    assert values["class"] < 0.5, "the digit is not among its features"
    order = [row.task for row in rows if row.task in {task.name for task in MOTION.tasks}]
    assert order == [task.name for task in MOTION.tasks], "the table is in the suite's order"
    assert {(row.stage, row.model, row.step, row.training_seed) for row in rows} == {("primary", "truth", 7, 2)}


def test_the_command_fills_results_and_summary(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "exports" / "primary", tmp_path / "run"
    hub.save_pretrained(create_model("vit_debug", patch_size=8), model, extra={"pretraining": {"stage": "primary"}})
    main(["--model", str(model), "--suite", "motion", "--data", str(digits), "--seeds", "1", "--out", str(out)])
    rows = read_summary_rows(out)
    assert {row.model for row in rows} == {"trained", "untrained", "rgb", "rgb_difference"}
    assert {task.name for task in MOTION.tasks} <= {row.task for row in rows}
    assert {row.stage for row in rows} == {"primary"}
    lines = (out / "evals" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [row.to_json() for row in rows]
    values = {(row.task, row.model): row.value for row in rows}
    assert values["motion", "trained"] == values["motion", "untrained"], "it was saved at its initialisation, seed 0"
    printed = capsys.readouterr().out
    assert all(row.task in printed for row in rows), "rows that lose are printed too"
