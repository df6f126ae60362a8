"""A folder of WebDataset tars with exact random access: open it, count it, read any record's bytes.

The folder is a local one or lies behind HTTP or S3; records, their order and their bytes are the same. The index files
stay on disk: a row is looked up by its line's position, so a folder of ten million records costs 80 MB and no Python
objects. Local files are read with pread, which is safe after a fork.
"""

import base64
import hashlib
import json
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
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

__all__ = ["RecordError", "RemoteError", "ShardError", "Shards", "modalities", "pack_masks", "unpack_masks"]

SCHEMA = 1
MANIFEST = "manifest.json"


class Shards:
    """The records of one modality in one shard folder.

    Args:
        path: the folder, or its manifest.json; `http(s)://`, `s3://` and `gs://` addresses are read over the network.
        modality: `video` or `image`; the folder may hold both.
        remote: how to read over the network; the defaults of RemoteConfig if None.
        cache: where records of the network are kept; not at all if None.
        counters: where reading is counted.

    Raises ShardError when a file is missing, has another size than the manifest says, or is of another schema; as every
    method does where a file cannot be read, and RemoteError where the network fails for longer than `remote` allows.
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
        lines = self._files.map(self._row_starts, self._entries)
        self._starts = np.concatenate(lines) if lines else np.zeros(0, np.int64)  # [rows + one end per shard]
        self._ends = np.cumsum([len(line) - 1 for line in lines], dtype=np.int64)  # samples up to and with shard i
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
        entry, start, end = self._row_place(index)
        line = self._files.row(entry["index"], start, end - start)
        try:
            return json.loads(line) | {"shard": entry["name"]}
        except ValueError as error:
            where = self._files.call(entry["index"])
            raise ShardError(f"{where}: the row at byte {start} is not JSON ({error}); {REDO}") from error

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
        return self._files.record(row, verify), row

    def _row_place(self, index: int) -> tuple[dict[str, Any], int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside [0, {len(self)}) of {self._files.call('')}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        at = index + shard  # every earlier shard holds one extra entry: where its last line ends
        return self._entries[shard], int(self._starts[at]), int(self._starts[at + 1])

    def _row_starts(self, entry: dict[str, Any]) -> np.ndarray:
        """Byte positions of a shard's index rows and of their end: int64 `[samples + 1]`, checked with the manifest."""
        size = self._files.size(entry["name"])
        if size != entry["bytes"]:
            where = self._files.call(entry["name"])
            raise ShardError(f"{where}: {size} bytes, but the manifest says {entry['bytes']}; {REDO}")
        content = self._files.index(entry["index"], entry["index_sha256"])
        ends = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n")) + 1
        if len(ends) != entry["samples"]:
            where = self._files.call(entry["index"])
            raise ShardError(f"{where}: {len(ends)} rows, but the manifest says {entry['samples']}; {REDO}")
        return np.concatenate([np.zeros(1, np.int64), ends.astype(np.int64)])


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
