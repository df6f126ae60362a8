"""Dense sets by name in the layouts that users have; what is missing is named with what it should look like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evals.dense_sets import (
    LAYOUTS,
    DenseSet,
    DenseSetError,
    evaluated,
    kitti_box,
    open_depth,
    open_segmentation,
)
from evals.protocol import IGNORE
from tests.evals.dense_scenes import HEIGHT, WIDTH, scene, write, write_camvid, write_rgbd


def labels(values: list[int]) -> np.ndarray:
    """A label image of these values in columns."""
    return np.array([values] * 2, dtype=np.uint8)


def pixels(values: list[int]) -> np.ndarray:
    return np.zeros((2, len(values), 3), dtype=np.uint8)


def first_row(data: DenseSet, index: int = 0) -> list[float]:
    return data.items[index].truth()[0].tolist()


def test_ade20k_counts_from_one_and_leaves_zero_out(tmp_path: Path) -> None:
    root = tmp_path / "ADEChallengeData2016"
    write(root / "images" / "validation" / "a.jpg", pixels([0, 1, 150]))
    write(root / "annotations" / "validation" / "a.png", labels([0, 1, 150]))
    for given in (tmp_path, root):
        data = open_segmentation("ade20k", given, "validation")
        assert (len(data.classes), data.items[0].key, first_row(data)) == (150, "a", [IGNORE, 0, 149])


def test_cityscapes_reads_train_ids_or_converts_label_ids(tmp_path: Path) -> None:
    ids = [0, 7, 8, 11, 33, 34]
    for name in ("b_0", "b_1"):
        write(tmp_path / "leftImg8bit" / "val" / "city" / f"{name}_leftImg8bit.png", pixels(ids))
    write(tmp_path / "gtFine" / "val" / "city" / "b_0_gtFine_labelIds.png", labels(ids))
    write(tmp_path / "gtFine" / "val" / "city" / "b_1_gtFine_labelTrainIds.png", labels([255, 0, 1, 2, 18, 255]))
    data = open_segmentation("cityscapes", tmp_path, "val")
    assert len(data.classes) == 19
    assert first_row(data, 0) == first_row(data, 1) == [IGNORE, 0, 1, 2, 18, IGNORE]


def test_voc12_has_a_background_class_palettes_and_a_list_of_names(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("x", "not_listed"):
        write(root / "JPEGImages" / f"{name}.jpg", pixels([0, 20, 255]))
        palette = Image.frombytes("P", (3, 2), labels([0, 20, 255]).tobytes())
        palette.putpalette([value % 256 for value in range(768)])
        for folder in ("SegmentationClass", "SegmentationClassAug"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            palette.save(root / folder / f"{name}.png")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("x\n")
    (lists / "train_aug.txt").write_text("/JPEGImages/x.jpg /SegmentationClassAug/x.png\n")
    for split in ("val", "train_aug"):
        data = open_segmentation("voc12", tmp_path, split)
        assert (len(data), len(data.classes), first_row(data)) == (1, 21, [0, 20, IGNORE])


@pytest.mark.parametrize("layout", ["ours", "segnet"])
def test_camvid_comes_in_two_layouts(tmp_path: Path, layout: str) -> None:
    folders = ("images/test", "labels/test") if layout == "ours" else ("CamVid/test", "CamVid/testannot")
    write(tmp_path / folders[0] / "c.png", pixels([0, 10, 11]))
    write(tmp_path / folders[1] / "c.png", labels([0, 10, 11]))
    data = open_segmentation("camvid", tmp_path, "test")
    assert (len(data.classes), first_row(data)) == (11, [0, 10, IGNORE])


def test_a_folder_of_rgbd_is_split_by_frame_numbers_or_folders(tmp_path: Path) -> None:
    write_rgbd(tmp_path, 5)
    train, test = (open_depth("rgbd", tmp_path, split) for split in ("0:3", "4:"))
    assert [item.key for item in train.items] == [f"frame-{number:06}" for number in range(3)]
    assert [item.key for item in test.items] == ["frame-000004"]
    truth, classes = test.items[0].truth(), torch.from_numpy(scene(4)[1])
    assert torch.equal(truth[5:], torch.tensor([1.0, 2.0, 4.0])[classes.long()][5:])
    assert not truth[:5].any()
    assert not open_depth("rgbd", tmp_path, "1:2").items[0].truth()[:2].any()
    assert len(open_depth("rgbd", tmp_path, "frames")) == 5


def test_nyuv2_as_a_folder(tmp_path: Path) -> None:
    scene_folder = tmp_path / "test" / "kitchen"
    write(scene_folder / "rgb_00001.jpg", np.zeros((480, 640, 3), dtype=np.uint8))
    write(scene_folder / "sync_depth_00001.png", np.full((480, 640), 2500, dtype=np.uint16))
    data = open_depth("nyuv2", tmp_path, "test", mask="eigen")
    truth = data.items[0].truth()
    assert truth[45:471, 41:601].unique().tolist() == [2.5]
    assert int((truth > 0).sum()) == (471 - 45) * (601 - 41)


def test_nyuv2_as_the_labelled_mat(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="nyu_depth_v2_labeled.mat is HDF5")
    from scipy.io import savemat

    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = np.arange(3 * 3 * 4 * 2, dtype=np.uint8).reshape(3, 3, 4, 2)  # [N, 3, W, H] as MATLAB stores
        file["rawDepths"] = np.arange(24, dtype=np.float32).reshape(3, 4, 2)
    savemat(tmp_path / "splits.mat", {"trainNdxs": np.array([[1], [3]]), "testNdxs": np.array([[2]])})
    train, test = (open_depth("nyuv2", tmp_path, split) for split in ("train", "test"))
    assert [item.key for item in (*train.items, *test.items)] == ["0001", "0003", "0002"]
    assert test.items[0].image().tolist() == np.arange(24, 48).reshape(3, 4, 2).transpose(0, 2, 1).tolist()
    assert test.items[0].truth().tolist() == [[8, 10, 12, 14], [9, 11, 13, 15]]
    assert train.items[0].content() != train.items[1].content()
    with pytest.raises(DenseSetError, match="it has train and test"):
        open_depth("nyuv2", tmp_path, "val")


def test_kitti_reads_eigens_list_and_cuts_the_bottom_middle(tmp_path: Path) -> None:
    depth = np.zeros((375, 1242), dtype=np.uint16)
    depth[200, 600], depth[100, 600] = 256 * 20, 256 * 30  # the second lies above Garg's crop
    write(tmp_path / "input" / "day" / "0.png", np.zeros((375, 1242, 3), dtype=np.uint8))
    write(tmp_path / "gt_depth" / "drive" / "0.png", depth)
    (tmp_path / "kitti_eigen_test.txt").write_text("day/0.png drive/0.png 721.5\nday/1.png None 721.5\n")
    data = open_depth("kitti", tmp_path, "test", mask="garg")
    assert len(data) == 1
    assert data.items[0].image().shape == (3, 352, 1216)
    truth = data.items[0].truth()
    assert truth.shape == (352, 1216)
    assert truth[200 - 23, 600 - 13] == 20
    assert int((truth > 0).sum()) == 1
    assert int((open_depth("kitti", tmp_path, "test").items[0].truth() > 0).sum()) == 2
    assert kitti_box(375, 1242) == (23, 13, 352, 1216)


def test_masks_of_evaluations() -> None:
    kitti = evaluated(torch.ones(375, 1242), "garg").nonzero()
    assert kitti.amin(dim=0).tolist() == [153, 44]
    assert (kitti.amax(dim=0) + 1).tolist() == [371, 1197]
    assert evaluated(torch.ones(5, 6), "none").all()
    with pytest.raises(ValueError, match="480 x 640"):
        evaluated(torch.ones(240, 320), "eigen")


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_empty_folder_is_answered_with_what_it_should_look_like(tmp_path: Path, name: str) -> None:
    opener = open_depth if name in ("nyuv2", "kitti", "rgbd") else open_segmentation
    with pytest.raises(DenseSetError) as error:
        opener(name, tmp_path, "train" if name != "rgbd" else "0:5")  # pyright: ignore[reportArgumentType]
    assert LAYOUTS[name] in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_missing_truths_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    write_camvid(tmp_path, {"train": 3})
    (tmp_path / "labels" / "train" / "001.png").unlink()
    with pytest.raises(DenseSetError, match=r"1 of 6 files are missing, the first is .*labels/train/001\.png"):
        open_segmentation("camvid", tmp_path, "train")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    write_camvid(tmp_path, {"train": 1})
    item = open_segmentation("camvid", tmp_path, "train").items[0]
    assert item.image().shape == (3, HEIGHT, WIDTH)
    (tmp_path / "images" / "train" / "000.png").write_bytes(b"no image")
    with pytest.raises(DenseSetError, match=r"000\.png is no readable image"):
        item.image()
    write(tmp_path / "labels" / "train" / "000.png", scene(0)[0])
    with pytest.raises(DenseSetError, match="not a colour"):
        item.truth()


def test_truths_of_other_bits_are_refused(tmp_path: Path) -> None:
    """A picture of a depth has values up to 255 too: a quarter of a metre, and nobody would notice."""
    write_camvid(tmp_path / "camvid", {"train": 1})
    write_rgbd(tmp_path / "rgbd", 1)
    write(tmp_path / "camvid" / "labels" / "train" / "000.png", np.full((HEIGHT, WIDTH), 300, dtype=np.uint16))
    with pytest.raises(DenseSetError, match=r"000\.png has the value 300; classes are 8 bits"):
        open_segmentation("camvid", tmp_path / "camvid", "train").items[0].truth()
    (depth,) = (tmp_path / "rgbd").rglob("*.depth.png")
    write(depth, np.full((HEIGHT, WIDTH), 200, dtype=np.uint8))
    with pytest.raises(DenseSetError, match=r"has 8 bits a pixel, a depth 16, with 1 for 0\.001 m"):
        open_depth("rgbd", tmp_path / "rgbd", "0:").items[0].truth()
