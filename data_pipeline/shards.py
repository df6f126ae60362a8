"""A folder of WebDataset tars with exact random access: open it, count it, read any record's bytes.

The index files stay on disk: a row is looked up by its line's position, so a folder of ten million records costs 80 MB
and no Python objects. Everything is read with pread, which is safe after a fork.
"""

import base64
import hashlib
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA = 1
MANIFEST = "manifest.json"
_MAX_HANDLES = 128  # well under the usual limit of 1024 open files
_REDO = "ingest the videos again (python -m data_pipeline.prepare.ingest ... --overwrite), or copy the folder again"


class ShardError(ValueError):
    """A shard folder is missing, incomplete or damaged; the message names the file and what to do."""


class RecordError(ValueError):
    """One record's bytes are not those that were ingested."""


class _Handles:
    """Open files, least recently used closed first.

    A forked process may go on using them: they are only read with pread, which knows no position. A process that is
    spawned receives none and opens its own.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()

    def __reduce__(self) -> tuple[type["_Handles"], tuple[()]]:
        return _Handles, ()

    def get(self, path: Path) -> int:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardError(f"{path}: cannot be opened ({error.strerror}); {_REDO}") from error
        self._open[path] = descriptor
        if len(self._open) > _MAX_HANDLES:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


class Shards:
    """The records of one modality in one shard folder.

    Args:
        path: the folder, or its manifest.json.
        modality: `video` or `image`; the folder may hold both.

    Raises ShardError when a file is missing, has another size than the manifest says, or is of another schema.
    """

    def __init__(self, path: str | Path, modality: str):
        self.folder, self.manifest = read_manifest(path)
        self.modality = modality
        self._entries = [entry for entry in self.manifest["shards"] if entry["modality"] == modality]
        lines = [_row_starts(self.folder, entry) for entry in self._entries]
        self._starts = np.concatenate(lines) if lines else np.zeros(0, np.int64)  # [rows + one end per shard]
        self._ends = np.cumsum([len(line) - 1 for line in lines], dtype=np.int64)  # samples up to and with shard i
        self._handles = _Handles()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def total_bytes(self) -> int:
        """Size of the tars, in bytes."""
        return sum(entry["bytes"] for entry in self._entries)

    def row(self, index: int) -> dict[str, Any]:
        """A record's index row (key, ext, offset, size, sha256, frames, fps, ...), plus `shard`, its tar's name."""
        entry, start, end = self._row_place(index)
        path = self.folder / entry["index"]
        line = self._pread(path, end - start, start)
        try:
            return json.loads(line) | {"shard": entry["name"]}
        except ValueError as error:
            raise ShardError(f"{path}: the row at byte {start} is not JSON ({error}); {_REDO}") from error

    def read(self, index: int, *, verify: bool = False) -> tuple[bytes, dict[str, Any]]:
        """A record's media bytes and its index row; with `verify`, RecordError unless the sha256 agrees."""
        row = self.row(index)
        data = self._pread(self.folder / row["shard"], row["size"], row["offset"])
        if verify and hashlib.sha256(data).hexdigest() != row["sha256"]:
            raise RecordError(f"bytes differ from the index's sha256 ({row['shard']} at {row['offset']})")
        return data, row

    def close(self) -> None:
        """Close this process's file handles; they open again when needed."""
        self._handles.close()

    def _row_place(self, index: int) -> tuple[dict[str, Any], int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside [0, {len(self)}) of {self.folder}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        at = index + shard  # every earlier shard holds one extra entry: where its last line ends
        return self._entries[shard], int(self._starts[at]), int(self._starts[at + 1])

    def _pread(self, path: Path, size: int, offset: int) -> bytes:
        data = os.pread(self._handles.get(path), size, offset)
        while len(data) < size:  # a signal or a network file system may cut a read short; the end of the file is final
            more = os.pread(self._handles.get(path), size - len(data), offset + len(data))
            if not more:
                raise ShardError(f"{path}: ends {size - len(data)} bytes early at {offset}; {_REDO}")
            data += more
        return data


def read_manifest(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder and its parsed manifest; ShardError when missing, unreadable or of another schema version."""
    file = Path(path)
    file = file if file.name == MANIFEST else file / MANIFEST
    if not file.is_file():
        raise ShardError(
            f"{file}: no such file; give a folder written by `python -m data_pipeline.prepare.ingest VIDEOS... "
            f"--out {file.parent}` (an ingest that was interrupted leaves none)"
        )
    try:
        manifest = json.loads(file.read_text())
    except ValueError as error:
        raise ShardError(f"{file}: not JSON ({error}); {_REDO}") from error
    version = manifest.get("schema") if isinstance(manifest, dict) else None
    if version != SCHEMA:
        raise ShardError(f"{file}: schema version {version!r}, but this code reads {SCHEMA}; {_REDO}")
    return file.parent, manifest


def pack_masks(masks: np.ndarray) -> dict[str, Any]:
    """Masks as a record's labels hold them: the shape, and the uint8 bytes through zlib and base64."""
    packed = zlib.compress(np.ascontiguousarray(masks, np.uint8).tobytes(), 9)
    return {"shape": list(masks.shape), "zlib": base64.b64encode(packed).decode()}


def unpack_masks(packed: Mapping[str, Any]) -> np.ndarray:
    """The masks, uint8 (writable); KeyError, ValueError or zlib.error for what `pack_masks` has not written."""
    flat = np.frombuffer(bytearray(zlib.decompress(base64.b64decode(packed["zlib"]))), np.uint8)
    return flat.reshape(packed["shape"])


def modalities(path: str | Path) -> list[str]:
    """The modalities a shard folder holds, video first."""
    found = {entry["modality"] for entry in read_manifest(path)[1]["shards"]}
    return sorted(found, reverse=True)


def _row_starts(folder: Path, entry: dict[str, Any]) -> np.ndarray:
    """Byte positions of a shard's index rows and of their end: int64 `[samples + 1]`, checked against the manifest."""
    tar, index = folder / entry["name"], folder / entry["index"]
    for file in (tar, index):
        if not file.is_file():
            raise ShardError(f"{file}: named by the manifest but missing; {_REDO}")
    if tar.stat().st_size != entry["bytes"]:
        raise ShardError(f"{tar}: {tar.stat().st_size} bytes, but the manifest says {entry['bytes']}; {_REDO}")
    content = index.read_bytes()
    if hashlib.sha256(content).hexdigest() != entry["index_sha256"]:
        raise ShardError(f"{index}: differs from the sha256 in the manifest; {_REDO}")
    ends = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n")) + 1
    if len(ends) != entry["samples"]:
        raise ShardError(f"{index}: {len(ends)} rows, but the manifest says {entry['samples']}; {_REDO}")
    return np.concatenate([np.zeros(1, np.int64), ends.astype(np.int64)])
