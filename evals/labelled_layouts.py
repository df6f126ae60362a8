"""Where the files of labelled sets lie: a list of `path label` lines (the CSV files of V-JEPA), class folders, the
trees and annotation files of the sets' own makers.

A layout is a function of a root and a split. `DATASETS` says which layouts a set is found in.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "validation"]
SPLIT_NAMES: Mapping[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "test", "testing"),
}


class LayoutError(ValueError):
    """Files are not as a layout has them; the message says which one, where and what to do."""


Entries = tuple[list[Path], list[int], Sequence[str]]
Layout = Callable[[Path, Split], Entries | None]
"""Paths, labels and class names of a split below a root; None where the layout is not there."""


@dataclass(frozen=True)
class Dataset:
    """A set by name: how many classes it has, the layouts it is found in, and what to tell who does not have it."""

    name: str
    num_classes: int  # 0: as many as are found
    layouts: tuple[Layout, ...]
    tree: str
    source: str


# -------------------------------------------------------------------------------------------------- general layouts


def read_list(path: Path, root: Path) -> Entries:
    """Lines of `path label`, blank or comma between them; a relative path is below `root`."""
    paths, labels = [], []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        entry = re.fullmatch(r"(.*[^\s,])[\s,]\s*(\d+)", line.strip())  # a path may hold blanks and commas
        if entry is None:
            raise LayoutError(f"{path}, line {number}: {line!r} is not 'path label' with the label a number")
        paths.append(root / entry[1])
        labels.append(int(entry[2]))
    return paths, labels, ()


def listed(name: str) -> Layout:
    """A list in the root: SPLIT.csv, NAME_SPLIT.csv or NAME_SPLIT_paths.csv, as V-JEPA's configurations name them."""

    def layout(root: Path, split: Split) -> Entries | None:
        for word in SPLIT_NAMES[split]:
            for file in (f"{word}.csv", f"{name}_{word}.csv", f"{name}_{word}_paths.csv"):
                if (root / file).is_file():
                    return read_list(root / file, root)
        return None

    return layout


def class_folders(root: Path, split: Split) -> Entries | None:
    """SPLIT/CLASS/FILE; classes in the order of their names, those of the training split where it is there.

    Raises LayoutError where the split has a class that training lacks: its files would be left out, unsaid.
    """
    folder = _first_existing(root / word for word in SPLIT_NAMES[split])
    classes_of = _first_existing(root / word for word in SPLIT_NAMES["train"]) or folder
    if folder is None or classes_of is None:
        return None
    classes = _folders_in(classes_of)
    if not classes:
        return None
    if strange := sorted(set(_folders_in(folder)) - set(classes)):
        raise LayoutError(
            f"{folder} has {len(strange)} classes that {classes_of} has not, such as {strange[0]!r}: name the folders "
            "of both alike, or move those away"
        )
    here = {name: label for label, name in enumerate(classes) if (folder / name).is_dir()}
    pairs = [(folder / name / file, label) for name, label in here.items() for file in _files_in(folder / name)]
    return [path for path, _ in pairs], [label for _, label in pairs], classes


def _folders_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _files_in(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def _first_existing(paths: Iterable[Path]) -> Path | None:
    return next((path for path in paths if path.exists()), None)


class _ByStem:
    """The entries of a folder by their names without the ending, which annotations leave out."""

    def __init__(self, folder: Path, suffix: str) -> None:
        names = os.listdir(folder) if folder.is_dir() else []
        self.folder, self.suffix = folder, suffix
        self.names = {name.partition(".")[0]: name for name in names}

    def path(self, stem: str) -> Path:
        """Where it is, or where it should be."""
        return self.folder / self.names.get(stem, f"{stem}{self.suffix}")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text
        raise LayoutError(f"{path} is no readable JSON ({error}): get it anew") from error


def _label_of(name: str, classes: Mapping[str, int], where: Path) -> int:
    if name not in classes:
        raise LayoutError(f"{where}: {name!r} is not among its {len(classes)} classes, such as {min(classes)!r}")
    return classes[name]


# ------------------------------------------------------------------------------------------- layouts of the makers


def something_something(root: Path, split: Split) -> Entries | None:
    """Labels and splits as JSON, a `template` with [something] in brackets naming the class; videos as ID.webm."""
    for folder, form in ((root, "something-something-v2-{}.json"), (root / "labels", "{}.json")):
        labels, entries = folder / form.format("labels"), folder / form.format(split)
        if labels.is_file() and entries.is_file():
            classes = {name: int(number) for name, number in _json(labels).items()}
            videos = _ByStem(root / "20bn-something-something-v2", ".webm")
            rows = _json(entries)
            templates = [row["template"].replace("[", "").replace("]", "") for row in rows]
            found = [_label_of(template, classes, entries) for template in templates]
            return [videos.path(str(row["id"])) for row in rows], found, sorted(classes, key=lambda name: classes[name])
    return None


def diving48(root: Path, split: Split) -> Entries | None:
    """Diving48_V2_train.json and Diving48_V2_test.json (vid_name, label); videos as rgb/ID.mp4."""
    entries = root / f"Diving48_V2_{'train' if split == 'train' else 'test'}.json"
    if not entries.is_file():
        return None
    videos, rows, vocabulary = _ByStem(root / "rgb", ".mp4"), _json(entries), root / "Diving48_vocab.json"
    names = [" ".join(words) for words in _json(vocabulary)] if vocabulary.is_file() else ()
    return [videos.path(row["vid_name"]) for row in rows], [int(row["label"]) for row in rows], names


def jester(root: Path, split: Split) -> Entries | None:
    """jester-v1-SPLIT.csv (ID;class) and jester-v1-labels.csv; a folder of frames, or a video, for each ID."""
    labels, entries = root / "jester-v1-labels.csv", root / f"jester-v1-{split}.csv"
    if not (labels.is_file() and entries.is_file()):
        return None
    names = [line.strip() for line in labels.read_text().splitlines() if line.strip()]
    classes, videos = {name: number for number, name in enumerate(names)}, _ByStem(root / "20bn-jester-v1", "")
    rows = [line.strip().split(";") for line in entries.read_text().splitlines() if line.strip()]
    return [videos.path(row[0]) for row in rows], [_label_of(row[1], classes, entries) for row in rows], names


def coin(root: Path, split: Split) -> Entries | None:
    """COIN.json (a database of subset, class, recipe_type); videos as videos/RECIPE_TYPE/ID.mp4 or videos/ID.mp4."""
    file = root / "COIN.json"
    if not file.is_file():
        return None
    database = _json(file)["database"]
    classes = {name: i for i, name in enumerate(sorted({row["class"] for row in database.values()}))}
    subset = "training" if split == "train" else "testing"
    rows = {key: row for key, row in sorted(database.items()) if row["subset"] == subset}
    folders: dict[Path, _ByStem] = {}
    paths = []
    for key, row in rows.items():
        nested = root / "videos" / str(row["recipe_type"])
        folder = nested if nested.is_dir() else root / "videos"
        paths.append(folders.setdefault(folder, _ByStem(folder, ".mp4")).path(key))
    return paths, [classes[row["class"]] for row in rows.values()], sorted(classes)


def kinetics_annotations(root: Path, split: Split) -> Entries | None:
    """annotations/SPLIT.csv (label, youtube_id, time_start, time_end); videos as SPLIT/ID_START_END.mp4."""
    annotation, videos = (
        _first_existing(root / form.format(word) for word in SPLIT_NAMES[split])
        for form in ("annotations/{}.csv", "{}")
    )
    if annotation is None:
        return None
    rows = _csv_rows(annotation)
    training = root / "annotations" / "train.csv"  # a class that validation lacks must not shift the others' numbers
    names_of = rows if split == "train" or not training.is_file() else _csv_rows(training)
    classes = {name: number for number, name in enumerate(sorted({row["label"] for row in names_of}))}
    found = _ByStem(videos or root / SPLIT_NAMES[split][0], ".mp4")
    names = [f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}" for row in rows]
    labels = [_label_of(row["label"], classes, annotation) for row in rows]
    return [found.path(name) for name in names], labels, sorted(classes)


def _csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


DATASETS = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            "ssv2",
            174,
            (something_something,),
            "  something-something-v2-labels.json  something-something-v2-train.json  ...-validation.json\n"
            "  20bn-something-something-v2/ID.webm\n"
            "  (or labels/labels.json, labels/train.json, labels/validation.json)",
            "https://www.qualcomm.com/developer/software/something-something-v-2-dataset",
        ),
        Dataset(
            "k400",
            400,
            (kinetics_annotations, class_folders),
            "  train/CLASS/VIDEO.mp4  val/CLASS/VIDEO.mp4\n"
            "  (or annotations/train.csv, annotations/val.csv and train/ID_START_END.mp4, val/...)",
            "https://github.com/cvdfoundation/kinetics-dataset",
        ),
        Dataset(
            "diving48",
            48,
            (diving48,),
            "  Diving48_V2_train.json  Diving48_V2_test.json  Diving48_vocab.json\n  rgb/ID.mp4",
            "http://www.svcl.ucsd.edu/projects/resound/dataset.html",
        ),
        Dataset(
            "coin",
            180,
            (coin,),
            "  COIN.json\n  videos/RECIPE_TYPE/ID.mp4 (or videos/ID.mp4)",
            "https://coin-dataset.github.io",
        ),
        Dataset(
            "jester",
            27,
            (jester,),
            "  jester-v1-labels.csv  jester-v1-train.csv  jester-v1-validation.csv\n"
            "  20bn-jester-v1/ID/00001.jpg (or 20bn-jester-v1/ID.mp4)",
            "https://www.qualcomm.com/developer/software/jester-dataset",
        ),
        Dataset(
            "in1k",
            1000,
            (class_folders,),
            "  train/n01440764/FILE.JPEG  val/n01440764/FILE.JPEG\n"
            "  (validation pictures sorted into their classes' folders)",
            "https://www.image-net.org/download.php",
        ),
        Dataset(
            "folders",
            0,
            (class_folders,),
            "  train/CLASS/FILE  val/CLASS/FILE, videos or images of your own",
            "",
        ),
    )
}
