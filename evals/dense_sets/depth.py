"""Sets with depth, float32 metres with 0 where nothing was measured: NYUv2, KITTI, folders of RGB-D."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data_pipeline.transforms import Box
from evals.dense_sets.files import PICTURES, below, files, first_of, missing, png, some, whole
from evals.dense_sets.items import DenseItem, DenseSet, DenseSetError, FileItem, MaskName, evaluated
from evals.media import stamp

DepthName = Literal["nyuv2", "kitti", "rgbd"]


def open_depth(name: DepthName, root: Path | str, split: str, *, mask: MaskName = "none") -> DenseSet:
    """A split of a set with depth, 0 outside the mask. Raises DenseSetError where the tree is not as `LAYOUTS` says.

    `eigen` keeps rows 45:471 and columns 41:601 of NYUv2's 480 x 640 (evaluation.md 1.4) and Eigen's shares of a KITTI
    frame, `garg` Garg's shares of a KITTI frame; both are of the frame before anything is cut off.
    """
    openers = {"nyuv2": _nyuv2, "kitti": _kitti, "rgbd": _rgbd}
    if name not in openers:
        raise DenseSetError(f"there is no depth set {name!r}: choose one of {', '.join(openers)}")
    return DenseSet(name, split, some(openers[name](Path(root), split, mask), name, root))


def depth_reader(unit: float, unknown: tuple[int, ...] = (0,)) -> Callable[[Path], Tensor]:
    """A reader of 16-bit PNGs whose value 1 is `unit` metres."""

    def read(path: Path) -> Tensor:
        values = png(path)
        if values.dtype.itemsize < 2:
            raise DenseSetError(
                f"{path} has 8 bits a pixel, a depth 16, with 1 for {unit:g} m: is it a picture of a depth?"
            )
        values = values.astype(np.int64)
        depth = torch.from_numpy(values.astype(np.float32)) * unit
        depth[torch.from_numpy(np.isin(values, unknown))] = 0
        return depth

    return read


def _rgbd(root: Path, split: str, mask: MaskName) -> list[DenseItem]:
    """`split` is a folder, or a range of frame numbers FROM:TO."""
    frames = re.fullmatch(r"(\d*):(\d*)", split)
    folder = below(root, "frames") if frames else root / split
    pictures = [path for path in files("rgbd", folder, "**/*.color.*") if path.suffix in PICTURES]
    if frames:
        first, end = int(frames[1] or 0), int(frames[2] or 10**9)
        pictures = [path for path in pictures if first <= _frame_number(path) < end]
    read = depth_reader(1e-3, (0, 65535))
    items: list[DenseItem] = []
    for path in pictures:
        stem = path.name.partition(".color.")[0]
        key = (path.parent.relative_to(folder) / stem).as_posix()
        items.append(FileItem(key, path, path.with_name(f"{stem}.depth.png"), read, mask=mask))
    return whole("rgbd", items)


def _frame_number(path: Path) -> int:
    found = re.findall(r"\d+", path.name)
    if not found:
        raise DenseSetError(f"{path}: a split by frame numbers needs a number in every name")
    return int(found[-1])


def _nyuv2(root: Path, split: str, mask: MaskName) -> list[DenseItem]:
    if (root / "nyu_depth_v2_labeled.mat").is_file():
        return _nyuv2_mat(root, split, mask)
    folder = below(root, "official_splits") / split
    pictures = files("nyuv2", folder, "*/rgb_*.jpg") if folder.is_dir() else []
    if not pictures:
        raise missing("nyuv2", root / "nyu_depth_v2_labeled.mat")
    read = depth_reader(1e-3)
    items: list[DenseItem] = []
    for path in pictures:
        depth = path.with_name(path.name.replace("rgb_", "sync_depth_")).with_suffix(".png")
        items.append(FileItem(f"{path.parent.name}/{path.stem}", path, depth, read, mask=mask))
    return whole("nyuv2", items)


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

    def stamp(self) -> str:
        return stamp(Path(self.file.filename))

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
        raise missing("nyuv2", splits)
    numbers = loadmat(splits)
    if f"{split}Ndxs" not in numbers:
        raise DenseSetError(f"{splits} has no split {split!r}: it has train and test")
    file = h5py.File(root / "nyu_depth_v2_labeled.mat", "r")
    return [MatItem(file, int(number) - 1, mask) for number in numbers[f"{split}Ndxs"].ravel()]


def _kitti(root: Path, split: str, mask: MaskName) -> list[DenseItem]:
    listing = root / f"kitti_eigen_{split}.txt"
    if not listing.is_file():
        raise missing("kitti", listing)
    read = depth_reader(1 / 256)
    items: list[DenseItem] = []
    for line in listing.read_text().splitlines():
        image, depth = [*line.split(), "None", "None"][:2]
        if "None" in (image, depth):  # 45 of the 697 test frames have no improved ground truth
            continue
        picture = first_of(root, ("", "input", "raw"), image)
        truth = first_of(root, ("", "gt_depth", "train", "val"), depth)
        items.append(FileItem(image, picture, truth, read, kitti_box, mask))
    return whole("kitti", items)


def kitti_box(height: int, width: int) -> Box:
    """The 352 x 1216 at the bottom and in the middle of a KITTI frame, as every Eigen evaluation since BTS cuts it."""
    if height < 352 or width < 1216:
        raise DenseSetError(f"a KITTI frame of {height} x {width} is smaller than 352 x 1216")
    return Box(height - 352, (width - 1216) // 2, 352, 1216)
