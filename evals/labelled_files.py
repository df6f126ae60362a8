"""Labelled videos and images by the name of their data set, in the layouts that users have on disk.

The layouts are in `labelled_layouts.py`. An index holds paths and labels only; nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.labelled_layouts import DATASETS, Dataset, Entries, LayoutError, Split, listed, read_list
from evals.protocol import NotThere

log = logging.getLogger(__name__)


class DataMissing(NotThere):
    """A data set is not there, or not whole; the message says what was looked for and how the tree should look."""


@dataclass(frozen=True)
class FileIndex:
    """Files and their classes, in a fixed order: an entry's place is its ordinal."""

    name: str
    split: Split
    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]  # names in the order of labels

    def __post_init__(self) -> None:
        if len(self.paths) != len(self.labels):
            raise ValueError(f"{self.name}: {len(self.paths)} paths and {len(self.labels)} labels")
        outside = [label for label in self.labels if not 0 <= label < len(self.classes)]
        if outside:
            raise ValueError(f"{self.name} {self.split}: label {outside[0]} is not in 0..{len(self.classes) - 1}")

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, places: Iterable[int]) -> FileIndex:
        """The entries at these places."""
        chosen = list(places)
        paths, labels = tuple(self.paths[i] for i in chosen), tuple(self.labels[i] for i in chosen)
        return FileIndex(self.name, self.split, paths, labels, self.classes)


def hold_out(keys: Sequence[str], share: float, *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Places of the rest, and of about `share` of the keys held out: by a hash of each key, whatever the others are."""
    if not 0 < share < 1:
        raise ValueError(f"share={share} must be between 0 and 1")
    is_held = [_unit_hash(f"{seed}/{key}") < share for key in keys]
    return [i for i, held in enumerate(is_held) if not held], [i for i, held in enumerate(is_held) if held]


def _unit_hash(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56


def read_index(
    name: str, root: Path | str, split: Split, *, files: Path | str | None = None, skip_missing: bool = False
) -> FileIndex:
    """The files of a split of the set called `name`, found below `root` in the first layout that is there.

    `files` names a list of `path label` lines to read in its place. Files that a list or an annotation names and that
    are not on disk are refused, or left out and counted in the log with `skip_missing`: a figure on part of a set is
    another figure.

    Raises DataMissing.
    """
    if name not in DATASETS:
        raise ValueError(f"data.name={name} is unknown: choose one of {', '.join(sorted(DATASETS))}")
    dataset, root = DATASETS[name], Path(root)
    found = read_list(Path(files), root) if files else _first_layout(dataset, root, split)
    paths, labels, classes = found
    if not paths:
        raise DataMissing(f"{name}: no files for the split {split!r} below {root}.\n{_how_it_should_look(dataset)}")
    numbers = tuple(str(number) for number in range(dataset.num_classes or max(labels) + 1))
    index = FileIndex(name, split, tuple(paths), tuple(labels), tuple(classes) or numbers)
    if dataset.num_classes and len(index.classes) != dataset.num_classes:
        log.warning("%s has %d classes here, %d in the set as published", name, len(classes), dataset.num_classes)
    return _without_missing(index, dataset, skip_missing)


def _first_layout(dataset: Dataset, root: Path, split: Split) -> Entries:
    for layout in (listed(dataset.name), *dataset.layouts) if root.is_dir() else ():
        try:
            found = layout(root, split)
        except LayoutError:  # it says where
            raise
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{dataset.name}: an annotation of the split {split!r} below {root} is not as its makers wrote it "
                f"({error!r}).\n{_how_it_should_look(dataset)}"
            ) from error
        if found is not None:
            return found
    reason = "has none of the known layouts" if root.is_dir() else "is no folder"
    raise DataMissing(f"{dataset.name}: {root} {reason} for the split {split!r}.\n{_how_it_should_look(dataset)}")


def _how_it_should_look(dataset: Dataset) -> str:
    return (
        f"Expected below data.root, or a list of 'path label' lines as data.train_files and data.validation_files "
        f"(or in data.root as train.csv and validation.csv):\n{dataset.tree}\n"
        + (f"Get it from {dataset.source}; " if dataset.source else "")
        + "nothing is downloaded for you."
    )


def check_splits(train: FileIndex, validation: FileIndex) -> None:
    """Raise ValueError for a class that no head can answer with; a warning where figures would say little.

    That is where files are in both splits, and where a class that is asked for has no training file.
    """
    if strange := [label for label in validation.labels if label >= len(train.classes)]:
        raise ValueError(
            f"{train.name}: validation has the label {strange[0]}, training the labels 0..{len(train.classes) - 1}: "
            "number the classes of both lists alike"
        )
    if shared := sorted(set(train.paths) & set(validation.paths)):
        log.warning(
            "%s: %d of %d validation files are training files too, such as %s: figures say nothing of unseen files",
            train.name, len(shared), len(validation), shared[0],
        )  # fmt: skip
    if unseen := set(validation.labels) - set(train.labels):
        log.warning(
            "%s: %d classes of validation have no training file, such as %s: their files cannot be right",
            train.name, len(unseen), train.classes[min(unseen)],
        )  # fmt: skip


def _without_missing(index: FileIndex, dataset: Dataset, skip: bool) -> FileIndex:
    there = _existing(index.paths)
    missing = [i for i, is_there in enumerate(there) if not is_there]
    if not missing:
        return index
    first = ", ".join(str(index.paths[i]) for i in missing[:3])
    found = f"{len(missing)} of {len(index)} files of {index.name} {index.split} are not on disk, such as {first}"
    if not skip or len(missing) == len(index):
        raise DataMissing(
            f"{found}.\nSet data.skip_missing=true to go on without them, if some are there.\n"
            f"{_how_it_should_look(dataset)}"
        )
    log.warning("%s; they are left out, and the figures are those of the rest", found)
    return index.take(i for i, is_there in enumerate(there) if is_there)


def _existing(paths: Sequence[Path]) -> list[bool]:
    """Which of these exist; every folder is listed once, for a look at each file alone takes long on shared disks."""
    folders = {parent: set(os.listdir(parent)) if parent.is_dir() else set() for parent in {p.parent for p in paths}}
    return [path.name in folders[path.parent] for path in paths]
