"""A folder of WebDataset tars with exact random access: open it, count it, read any record's bytes.

The folder is a local one or lies behind HTTP or S3; records, their order and their bytes are the same. Opening reads
the manifest alone, which says how many records each shard has; a shard's index is read, and checked, when one of its
records is first wanted. Where its rows begin is then kept for all of a rank's processes (see `rowfile.py`). Local files
are read with pread, which is safe after a fork.
"""

import base64
import hashlib
import json
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from data_pipeline.ahead import Ahead
from data_pipeline.cache import RecordCache
from data_pipeline.counters import Counters
from data_pipeline.errors import RecordError, RemoteError, ShardError
from data_pipeline.folders import REDO, Folder, LocalFolder, scheme
from data_pipeline.per_process import PerProcess
from data_pipeline.remote import RemoteFolder
from data_pipeline.retries import RemoteConfig
from data_pipeline.rowfile import RowFile

__all__ = ["RecordError", "RemoteError", "ShardError", "Shards", "modalities", "pack_masks", "unpack_masks"]

SCHEMA = 1
MANIFEST = "manifest.json"
_LOADS = 64  # indices that the threads of a process may read at once; threads that want the same one wait


class Shards:
    """The records of one modality in one shard folder.

    Args:
        path: the folder, or its manifest.json; `http(s)://`, `s3://` and `gs://` addresses are read over the network.
        modality: `video` or `image`; the folder may hold both.
        remote: how to read over the network; the defaults of RemoteConfig if None.
        cache: where records of the network are kept; not at all if None.
        counters: where reading is counted.

    Raises ShardError where the manifest is missing or of another schema, or a tar is missing or has another size than
    the manifest says; of a large set only some tars are looked at (1000 on a disk, 16 over the network, evenly spread).
    The others, and every index, are checked when a record of theirs is first read. Every method raises ShardError where
    a file is not as the manifest says, and RemoteError where the network fails for longer than `remote` allows.
    """

    def __init__(
        self,
        path: str | Path,
        modality: str,
        *,
        remote: RemoteConfig | None = None,
        cache: RecordCache | None = None,
        counters: Counters | None = None,
    ):
        self.modality = modality
        self.counters = counters or Counters()
        self._remote = remote or RemoteConfig()
        self._files = open_folder(path, self._remote, cache, self.counters)
        self.manifest = _read_manifest(self._files)
        self._entries = [entry for entry in self.manifest["shards"] if entry["modality"] == modality]
        self._ends = np.cumsum([entry["samples"] for entry in self._entries], dtype=np.int64)  # up to and with shard i
        self._rows = RowFile(len(self._entries))
        self._loads: PerProcess[list[Lock]] = PerProcess()
        self._files.map(self._check_tar, _spread(self._entries, self._files.checked_at_opening))
        self._ahead: PerProcess[Ahead[tuple[bytes, dict[str, Any]]]] = PerProcess()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def folder(self) -> Path:
        """The folder on this machine; ShardError where it is not on this machine."""
        return _on_disk(self._files)

    @property
    def is_remote(self) -> bool:
        """Whether records come over the network."""
        return self._files.is_remote

    @property
    def total_bytes(self) -> int:
        """Size of the tars, in bytes."""
        return sum(entry["bytes"] for entry in self._entries)

    @property
    def fingerprint(self) -> str:
        """What identifies the records and their order: a sum of the sums of the indices."""
        return hashlib.sha256("".join(entry["index_sha256"] for entry in self._entries).encode()).hexdigest()

    def row(self, index: int) -> dict[str, Any]:
        """A record's index row (key, ext, offset, size, sha256, frames, fps, ...), plus `shard`, its tar's name."""
        shard, number = self._place(index)
        entry, line = self._entries[shard], self._line(shard, number)
        try:
            return json.loads(line) | {"shard": entry["name"]}
        except ValueError as error:
            where = self._files.call(entry["index"])
            raise ShardError(f"{where}: row {number} is not JSON ({error}); {REDO}") from error

    def read(self, index: int, *, verify: bool = False) -> tuple[bytes, dict[str, Any]]:
        """A record's media bytes and its index row; with `verify`, RecordError unless the sha256 agrees.

        Over the network it is compared in any case.
        """
        started = time.perf_counter()
        ahead = self._ahead.made()
        begun = ahead.take(index) if ahead else None
        try:
            return begun.result() if begun else self._load(index, verify)
        finally:
            self.counters.add(records=1, wait_seconds=time.perf_counter() - started)

    def read_ahead(self, indices: Iterable[int]) -> None:
        """Begin to fetch these records, which will be read next; of the network only, a disk does so by itself."""
        if not self.is_remote:
            return
        ahead = self._ahead.get(lambda: Ahead(self._remote.parallel))
        ahead.clear()  # what an error left behind
        for index in indices:
            ahead.start(index, lambda index=index: self._load(index, True))

    def close(self) -> None:
        """Close this process's file handles and connections; they open again when needed."""
        self._files.close()

    def _load(self, index: int, verify: bool) -> tuple[bytes, dict[str, Any]]:
        row = self.row(index)
        return self._files.record(row, self._entries[self._place(index)[0]]["bytes"], verify), row

    def _place(self, index: int) -> tuple[int, int]:
        """A record's shard, and which of its rows it is."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside [0, {len(self)}) of {self._files.call('')}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard]) + self._entries[shard]["samples"]

    def _line(self, shard: int, number: int) -> bytes:
        """A row of a shard's index, which is read if this is the first of its rows that a process wants."""
        if shard not in self._rows:
            locks = self._loads.get(lambda: [Lock() for _ in range(_LOADS)])
            with locks[shard % _LOADS]:
                if shard not in self._rows:
                    self._load_index(shard)
        entry = self._entries[shard]
        if isinstance(self._files, LocalFolder):
            return self._files.row(entry["index"], *self._rows.span(shard, number))
        return self._rows.row(shard, number, entry["samples"])

    def _load_index(self, shard: int) -> None:
        """Read a shard's index, hold it and the tar against the manifest, and keep where its rows begin."""
        entry = self._entries[shard]
        if not self._files.is_remote:  # of a remote tar, every answer tells the size
            self._check_tar(entry)
        content = self._files.index(entry["index"], entry["index_sha256"])
        ends = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n")) + 1
        if len(ends) != entry["samples"]:
            where = self._files.call(entry["index"])
            raise ShardError(f"{where}: {len(ends)} rows, but the manifest says {entry['samples']}; {REDO}")
        positions = np.concatenate([np.zeros(1, np.int64), ends])
        self._rows.add(shard, positions, content if self._files.is_remote else b"")

    def _check_tar(self, entry: dict[str, Any]) -> None:
        size = self._files.size(entry["name"])
        if size != entry["bytes"]:
            where = self._files.call(entry["name"])
            raise ShardError(f"{where}: {size} bytes, but the manifest says {entry['bytes']}; {REDO}")


def _spread(entries: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """All entries, or `most` of them at equal distances, the first and the last among them."""
    if len(entries) <= most:
        return entries
    return [entries[i] for i in np.linspace(0, len(entries) - 1, most).round().astype(int)]


def open_folder(path: str | Path, remote: RemoteConfig, cache: RecordCache | None, counters: Counters) -> Folder:
    """The folder at a path or address; the name of its manifest may stand at the end."""
    if scheme(path):
        return RemoteFolder(str(path).removesuffix(f"/{MANIFEST}"), remote, cache, counters)
    file = Path(path)
    return LocalFolder(file.parent if file.name == MANIFEST else file, counters)


def _read_manifest(folder: Folder) -> dict[str, Any]:
    """The parsed manifest; ShardError when missing, unreadable or of another schema version."""
    where = folder.call(MANIFEST)
    try:
        manifest = json.loads(folder.manifest(MANIFEST))
    except ShardError:
        raise
    except ValueError as error:
        raise ShardError(f"{where}: not JSON ({error}); {REDO}") from error
    version = manifest.get("schema") if isinstance(manifest, dict) else None
    if version != SCHEMA:
        raise ShardError(f"{where}: schema version {version!r}, but this code reads {SCHEMA}; {REDO}")
    return manifest


def read_manifest(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """A folder on this machine and its parsed manifest; ShardError as for `Shards`, and where it is elsewhere."""
    folder = open_folder(path, RemoteConfig(), None, Counters())
    return _on_disk(folder), _read_manifest(folder)


def _on_disk(folder: Folder) -> Path:
    if not isinstance(folder, LocalFolder):
        raise ShardError(f"{folder.call('')}: is not on this machine; copy the folder here for this")
    return folder.path


def pack_masks(masks: np.ndarray) -> dict[str, Any]:
    """Masks as a record's labels hold them: the shape, and the uint8 bytes through zlib and base64."""
    packed = zlib.compress(np.ascontiguousarray(masks, np.uint8).tobytes(), 9)
    return {"shape": list(masks.shape), "zlib": base64.b64encode(packed).decode()}


def unpack_masks(packed: Mapping[str, Any]) -> np.ndarray:
    """The masks, uint8 (writable); KeyError, ValueError or zlib.error for what `pack_masks` has not written."""
    flat = np.frombuffer(bytearray(zlib.decompress(base64.b64decode(packed["zlib"]))), np.uint8)
    return flat.reshape(packed["shape"])


def modalities(path: str | Path, remote: RemoteConfig | None = None) -> list[str]:
    """The modalities a shard folder holds, video first."""
    manifest = _read_manifest(open_folder(path, remote or RemoteConfig(), None, Counters()))
    return sorted({entry["modality"] for entry in manifest["shards"]}, reverse=True)
