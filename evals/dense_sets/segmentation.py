"""Sets with a class for every pixel, int64 with IGNORE: ADE20K, Cityscapes, VOC12, CamVid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from evals.dense_sets.files import below, files, missing, pairs, png, some, whole
from evals.dense_sets.items import DenseItem, DenseSet, DenseSetError, FileItem
from evals.protocol import IGNORE

SegmentationName = Literal["ade20k", "cityscapes", "voc12", "camvid"]

CITYSCAPES_TRAIN_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # label ids in order
CITYSCAPES = [
    "road",
    "sidewalk",
    "building",
    "wall",
    "fence",
    "pole",
    "traffic_light",
    "traffic_sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
]
VOC12 = [
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]
CAMVID = [
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign_symbol",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
]
ADE20K = [f"class_{number}" for number in range(1, 151)]  # as numbered in objectInfo150.txt


def open_segmentation(name: SegmentationName, root: Path | str, split: str) -> DenseSet:
    """A split of a labelled set. Raises DenseSetError where the tree is not as `LAYOUTS` says."""
    openers = {"ade20k": _ade20k, "cityscapes": _cityscapes, "voc12": _voc12, "camvid": _camvid}
    if name not in openers:
        raise DenseSetError(f"there is no segmentation set {name!r}: choose one of {', '.join(openers)}")
    items = openers[name](Path(root), split)
    classes = {"ade20k": ADE20K, "cityscapes": CITYSCAPES, "voc12": VOC12, "camvid": CAMVID}[name]
    return DenseSet(name, split, some(items, name, root), tuple(classes))


def class_reader(classes: Mapping[int, int] | int) -> Callable[[Path], Tensor]:
    """A reader of label PNGs: value -> class, all others IGNORE; a number of classes keeps 0 .. classes - 1."""
    table = torch.full((256,), IGNORE, dtype=torch.int64)
    for value, number in (dict(enumerate(range(classes))) if isinstance(classes, int) else classes).items():
        table[value] = number

    def read(path: Path) -> Tensor:
        values = torch.from_numpy(png(path).astype(np.int64))
        if values.max() >= len(table):
            raise DenseSetError(f"{path} has the value {values.max()}; classes are 8 bits a pixel, 0..255")
        return table[values]

    return read


def _ade20k(root: Path, split: str) -> list[DenseItem]:
    root = below(root, "ADEChallengeData2016")
    read = class_reader({value: value - 1 for value in range(1, 151)})  # 0 is "other", no class of the benchmark
    return pairs("ade20k", root / "images" / split, root / "annotations" / split, read)


def _cityscapes(root: Path, split: str) -> list[DenseItem]:
    pictures = files("cityscapes", root / "leftImg8bit" / split, "*/*_leftImg8bit.png")
    items: list[DenseItem] = []
    for picture in pictures:
        stem = picture.name.removesuffix("_leftImg8bit.png")
        folder = root / "gtFine" / split / picture.parent.name
        train_ids, ids = (folder / f"{stem}_gtFine_label{kind}.png" for kind in ("TrainIds", "Ids"))
        if train_ids.is_file():
            items.append(FileItem(stem, picture, train_ids, class_reader(len(CITYSCAPES))))
        else:
            of_ids = class_reader({value: number for number, value in enumerate(CITYSCAPES_TRAIN_IDS)})
            items.append(FileItem(stem, picture, ids, of_ids))
    return whole("cityscapes", items)


def _voc12(root: Path, split: str) -> list[DenseItem]:
    root = below(below(root, "VOCdevkit"), "VOC2012")
    listing = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not listing.is_file():
        raise missing("voc12", listing)
    labels = root / ("SegmentationClassAug" if split.endswith("aug") else "SegmentationClass")
    read = class_reader(len(VOC12))
    names = [line.split()[0] for line in listing.read_text().splitlines() if line.strip()]
    return whole(
        "voc12",
        [
            FileItem(
                Path(name).stem, root / "JPEGImages" / f"{Path(name).stem}.jpg", labels / f"{Path(name).stem}.png", read
            )
            for name in names
        ],
    )


def _camvid(root: Path, split: str) -> list[DenseItem]:
    ours = (root / "images" / split, root / "labels" / split)
    images, labels = (
        ours if ours[0].is_dir() else (below(root, "CamVid") / split, below(root, "CamVid") / f"{split}annot")
    )
    return pairs("camvid", images, labels, class_reader(len(CAMVID)))
