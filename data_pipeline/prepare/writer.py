"""Samples into shards: WebDataset tars, an index beside each, the manifest last.

Everything is written into a folder beside the output and renamed at the end: there is never half a shard folder.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from data_pipeline.shards import MANIFEST, SCHEMA

if TYPE_CHECKING:
    from webdataset.writer import TarWriter

REJECTED = "rejected.jsonl"


class SeriesWriter:
    """One numbered series of shards, `NAME-000000.tar` and so on, all of one modality.

    `entries` are the manifest's entries of the shards that are closed, those of an earlier process first.
    """

    def __init__(
        self,
        folder: Path,
        modality: str,
        *,
        shard_bytes: int,
        shard_count: int,
        entries: list[dict[str, Any]] | None = None,
    ):
        self.folder, self.modality = folder, modality
        self.shard_bytes, self.shard_count = shard_bytes, shard_count
        self.entries = entries or []
        self._file: BinaryIO | None = None
        self._tar: TarWriter | None = None
        self._rows: dict[str, dict[str, Any]] = {}
        self._bytes = 0

    @property
    def is_open(self) -> bool:
        """Whether there are samples in a shard that is not closed yet."""
        return self._tar is not None

    def write(self, key: str, ext: str, data: bytes, meta: dict[str, Any]) -> None:
        """Append one sample; a shard that has reached its size is closed."""
        if self._tar is None:
            from webdataset.writer import TarWriter  # imports torch, which the processes that only convert do without

            self._file = self._path().open("wb")
            self._tar = TarWriter(self._file, encoder=False, mtime=0)
        meta = {"key": key, "modality": self.modality} | meta
        self._tar.write({"__key__": key, ext: data, "json": json.dumps(meta).encode()})
        self._rows[f"{key}.{ext}"] = {"key": key, "ext": ext, "sha256": hashlib.sha256(data).hexdigest()} | meta
        self._bytes += len(data)
        if self._bytes >= self.shard_bytes or len(self._rows) >= self.shard_count:
            self.close()

    def close(self) -> None:
        """Finish the open shard: its index is read back from the tar as written."""
        if self._tar is None:
            return
        self._tar.close()
        assert self._file is not None
        self._file.close()
        path = self._path()
        self.entries.append(
            write_index(path.with_suffix(".index.jsonl"), _placed(path, self._rows), path, self.modality)
        )
        _sync(path)
        self._tar, self._rows, self._bytes = None, {}, 0

    def abandon(self) -> None:
        """Let go of a shard that was left open by an error; it will be written again or removed."""
        for part in (self._tar, self._file):
            if part is not None:
                with contextlib.suppress(OSError):  # what is still buffered may not fit on the disk
                    part.close()

    def _path(self) -> Path:
        return self.folder / f"{self.modality}-{len(self.entries):06d}.tar"


def write_index(index: Path, rows: Iterable[dict[str, Any]], tar: Path, modality: str) -> dict[str, Any]:
    """Write the index of some or all samples of a tar, wherever that lies; returns the manifest's entry."""
    lines = [json.dumps(row) + "\n" for row in rows]
    content = "".join(lines).encode()
    index.write_bytes(content)
    _sync(index)
    return {
        "name": os.path.relpath(tar, index.parent),
        "index": index.name,
        "modality": modality,
        "samples": len(lines),
        "bytes": tar.stat().st_size,
        "index_sha256": hashlib.sha256(content).hexdigest(),
    }


def _placed(tar: Path, rows: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of the media members with their offset and size, in the tar's order."""
    with tarfile.open(tar) as archive:
        for member in archive:
            if member.name in rows:
                row = rows[member.name]
                head = {"key": row["key"], "ext": row["ext"], "offset": member.offset_data, "size": member.size}
                yield head | {name: value for name, value in row.items() if name not in head}


def write_manifest(folder: Path, entries: list[dict[str, Any]], notes: list[dict[str, Any]] | None = None) -> None:
    """rejected.jsonl where there are notes, then manifest.json: a folder with a manifest is complete."""
    if notes is not None:
        rejected = folder / REJECTED
        rejected.write_text("".join(json.dumps(note) + "\n" for note in notes))
        _sync(rejected)
    write_atomically(folder / MANIFEST, json.dumps({"schema": SCHEMA, "shards": entries}, indent=1) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """A file that is there whole or not at all, whoever else writes the same."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    _sync(partial)
    os.replace(partial, path)


def check_output(out: Path, overwrite: bool) -> None:
    """ValueError where `out` holds something that may not be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"--out {out}: is a file; give a folder")
    held = {path.name for path in out.iterdir()}
    if not held:
        return
    if MANIFEST not in held:
        raise ValueError(f"--out {out}: not empty and not a shard folder (no {MANIFEST}); give another folder")
    if not overwrite:
        raise ValueError(f"--out {out}: already holds shards; give another folder, or --overwrite to replace them")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to fill; it takes `out`'s place at the end, and is removed where anything fails."""
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        replace_folder(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def claim(made: Path, out: Path, is_same: Callable[[], bool]) -> None:
    """Move the folder `made` to `out`; where another process was faster and `is_same()` holds, its folder stays."""
    try:
        os.rename(made, out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not is_same():
            raise


def replace_folder(new: Path, out: Path) -> None:
    """Rename `new` to `out`; what was there is removed."""
    old = out.with_name(f"{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # of a process that was killed in the next lines
    if out.exists() and any(out.iterdir()):
        os.rename(out, old)
    os.rename(new, out)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
