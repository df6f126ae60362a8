"""The folder that `python -m evals.embed` fills: what lies where, what is finished, and how to read it again.

DIR/embed.json              the settings and the model's sha256 that all of it depends on
DIR/features/NAME.npy       [T, h, w, D] or [T, D], or NAME.parquet; NAME is the file's path in its input folder
DIR/features/NAME.times.npy seconds of each row, float64 [T]
DIR/features/NAME.json      facts of the file; written last: what has one is finished
DIR/manifest.json           all of these facts, and what failed
DIR/failures.jsonl          {"name", "path", "reason"} of the last run
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evals.embed_rows import journal_of, partial, read_parquet, write_whole


class Embedding(NamedTuple):
    """Features of a file, a row for each time step."""

    features: np.ndarray
    """[T, h, w, D] or [T, D]; a .npy is mapped, so that only what is looked at is read."""
    times: np.ndarray
    """Seconds, float64 [T]."""


class EmbedFolder:
    """Paths and records of a folder of features."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def features(self, name: str, ending: str) -> Path:
        return self.root / "features" / f"{name}.{ending}"

    def facts_path(self, name: str) -> Path:
        return self.features(name, "json")

    def times_path(self, name: str) -> Path:
        return self.features(name, "times.npy")

    def facts(self, name: str) -> dict[str, Any] | None:
        """What is known of a finished file, None of one that is not."""
        path = self.facts_path(name)
        return json.loads(path.read_text()) if path.is_file() else None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """ValueError where another process fills the folder."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError(
                    f"{self.root}: another process writes there; wait for it or take another --out"
                ) from error
            yield

    def claim(self, key: dict[str, Any]) -> None:
        """Note what the folder depends on; ValueError naming what differs where it was begun with something else."""
        path = self.root / "embed.json"
        if not path.is_file():
            write_whole(path, json.dumps(key, indent=1).encode())
            return
        before = json.loads(path.read_text())
        differing = [name for name in sorted(before.keys() | key.keys()) if before.get(name) != key.get(name)]
        if differing:
            said = ", ".join(f"{name} was {before.get(name)} and is now {key.get(name)}" for name in differing)
            raise ValueError(f"{self.root} was begun with other settings: {said}. Take another --out, or the old ones")

    def clear(self, name: str) -> None:
        """Take away what an unfinished file has left."""
        for path in (self.features(name, "npy"), self.features(name, "parquet"), self.times_path(name)):
            for each in (path, partial(path), journal_of(path), partial(journal_of(path))):
                each.unlink(missing_ok=True)

    def write_failures(self, failures: Sequence[dict[str, str]]) -> None:
        lines = "".join(json.dumps(failure) + "\n" for failure in failures)
        write_whole(self.root / "failures.jsonl", lines.encode())

    def write_manifest(self, names: Sequence[str], failures: Sequence[dict[str, str]]) -> None:
        key = json.loads((self.root / "embed.json").read_text())
        failed = {failure["name"] for failure in failures}
        files = [facts for name in names if name not in failed and (facts := self.facts(name)) is not None]
        record = {"settings": key, "files": files, "failures": list(failures)}
        write_whole(self.root / "manifest.json", json.dumps(record, indent=1).encode())


def read_embedding(folder: Path | str, name: str) -> Embedding:
    """What `evals.embed` wrote of a file: its features and the time of each row.

    `name` is the file's path in the folder it was found in, with its ending. ValueError where there is none.
    """
    there = EmbedFolder(Path(folder))
    if there.facts(name) is None:
        root = there.root / "features"
        known = sorted(str(path.relative_to(root))[: -len(".json")] for path in root.rglob("*.json"))
        raise ValueError(f"{folder} holds no finished {name!r}; it holds {', '.join(known[:8]) or 'nothing'}")
    parquet = there.features(name, "parquet")
    if parquet.is_file():
        return Embedding(*read_parquet(parquet))
    return Embedding(np.load(there.features(name, "npy"), mmap_mode="r"), np.load(there.times_path(name)))
