"""Media files as they are, for small sets: a folder of them, a list of paths, or Hugging Face's VideoFolder layout.

The index is made when the source is opened, by listing (nothing is decoded), in an order that depends on the names
alone; from there on everything is as for shards. A file is read whole and has no checksum: a broken or missing one is a
bad sample. Long videos and large sets are better ingested: see README.md.
"""

import csv
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_pipeline.counters import Counters
from data_pipeline.errors import RecordError, ShardError

LISTS = {".csv", ".txt", ".list", ".tsv"}
"""Suffixes of lists of paths."""
SUFFIXES = {
    "video": {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ogv", ".ts"},
    "image": {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"},
}
_METADATA = ("metadata.csv", "metadata.jsonl")


class Files:
    """The files of one modality, in the order of their names (a list: in its own order).

    Args:
        path: a folder, or a list with one `path label` a line (space-separated, as V-JEPA and VideoMAE have them; the
            label, a whole number, may be missing; relative paths start where the list lies).
        modality: `video` or `image`, told apart by suffix.
        counters: where reading is counted.

    Labels: of a list, `{"label": number}`; of a folder, the columns of `metadata.csv` or `metadata.jsonl` where there
    is one; else, where all files lie in sub-folders, `{"label": number, "class": sub-folder}`.

    Raises ShardError for a list or metadata that cannot be read.
    """

    is_remote = False

    def __init__(self, path: str | Path, modality: str, *, counters: Counters | None = None):
        self.path = Path(path)
        self.counters = counters or Counters()
        found = _listed(self.path) if self.path.is_file() else _in_folder(self.path, modality)
        self._rows = [(name, labels) for name, labels in found if _is(modality, name)]
        self._base = self.path.parent if self.path.is_file() else self.path

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def total_bytes(self) -> int:
        """Size of the files that are there, in bytes."""
        paths = (self._base / name for name, _ in self._rows)
        return sum(path.stat().st_size for path in paths if path.is_file())

    @property
    def fingerprint(self) -> str:
        """What the order depends on, as one sum: it changes when files are added, removed or renamed."""
        return hashlib.sha256(json.dumps([name for name, _ in self._rows]).encode()).hexdigest()

    def row(self, index: int) -> dict[str, Any]:
        """A record's `key` and `source_path` (its name in the folder or list), and `labels` where there are some."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside [0, {len(self)}) of {self.path}")
        name, labels = self._rows[index]
        return {"key": name, "source_path": name} | ({"labels": labels} if labels else {})

    def read(self, index: int, *, verify: bool = False) -> tuple[bytes, dict[str, Any]]:
        """A file's bytes and its row; RecordError where it is gone. There is nothing to verify."""
        started, row = time.perf_counter(), self.row(index)
        path = self._base / row["key"]
        try:
            data = path.read_bytes()
        except (FileNotFoundError, IsADirectoryError) as error:
            raise RecordError(f"{path}: no such file") from error
        except OSError as error:  # the disk, not the record
            raise ShardError(f"{path}: {error.strerror}; check the disk and its permissions") from error
        self.counters.add(records=1, wait_seconds=time.perf_counter() - started)
        return data, row

    def read_ahead(self, indices: Iterable[int]) -> None:
        """Nothing: a disk reads ahead by itself."""

    def close(self) -> None:
        """Nothing is kept open."""


def holds_files(path: Path) -> bool:
    """Whether this is a list of paths or a folder with media files in it."""
    if path.is_file():
        return path.suffix.lower() in LISTS
    return any(_is(modality, name) for name in _walk(path) for modality in SUFFIXES)


def _is(modality: str, name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES[modality]


def _listed(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The paths and labels of a list."""
    rows: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not (line := line.strip()):
            continue
        name, _, last = line.rpartition("\t" if "\t" in line else " ")
        labelled = bool(name) and last.lstrip("-").isdigit()
        name = name.strip().strip('"') if labelled else line.strip('"')
        if Path(name).suffix.lower() not in SUFFIXES["video"] | SUFFIXES["image"] or "://" in name:
            raise ShardError(
                f"{path}, line {number}: {line[:200]!r} is not `PATH LABEL` with the path of a local media file"
            )
        rows.append((name, {"label": int(last)} if labelled else {}))
    return rows


def _in_folder(folder: Path, modality: str) -> list[tuple[str, dict[str, Any]]]:
    """The media files below a folder, sorted, with their labels."""
    names = sorted(_walk(folder))
    files = [name for name in names if _is(modality, name)]
    metadata = [name for name in names if Path(name).name in _METADATA]
    if metadata:
        columns = dict(row for name in metadata for row in _metadata(folder, name))
        return [(name, columns.get(name, {})) for name in files]
    parents = [Path(name).parent.name for name in files]
    if not all(parents):
        return [(name, {}) for name in files]
    numbers = {parent: number for number, parent in enumerate(sorted(set(parents)))}
    return [(name, {"label": numbers[parent], "class": parent}) for name, parent in zip(files, parents, strict=True)]


def _walk(folder: Path) -> Iterator[str]:
    """Files below a folder, links followed, hidden ones left out; relative, with `/`."""
    seen: set[str] = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith("."):
                yield Path(here, name).relative_to(folder).as_posix()


def _metadata(folder: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Per file of a metadata table, its name in the folder and the other columns."""
    path = folder / name
    try:
        lines = _text(path).splitlines()
        rows = [json.loads(line) for line in lines if line] if path.suffix == ".jsonl" else list(csv.DictReader(lines))
        for row in rows:
            file = Path(name).parent / row.pop("file_name")
            yield file.as_posix(), row
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ShardError(f"{path}: not a table with the column file_name ({type(error).__name__}: {error})") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ShardError(f"{path}: cannot be read as text ({error})") from error
