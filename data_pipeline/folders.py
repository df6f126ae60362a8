"""Where a shard folder lies: on a disk of this machine here, behind HTTP or S3 in remote.py."""

import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from data_pipeline.counters import Counters
from data_pipeline.errors import RecordError, ShardError

T = TypeVar("T")
R = TypeVar("R")
REDO = "ingest the videos again (python -m data_pipeline.prepare.ingest ... --overwrite), or copy the folder again"
_MAX_HANDLES = 128  # well under the usual limit of 1024 open files
_SCHEME = re.compile(r"(\w[\w+.-]+):/+")


class Folder(Protocol):
    """Files by name, whole or in parts. Every method raises ShardError with the file's full name and what to do."""

    is_remote: bool
    checked_at_opening: int
    """How many tars' sizes are looked at when the folder is opened."""

    def call(self, name: str) -> str:
        """The file's full name, for messages."""
        ...

    def manifest(self, name: str) -> bytes:
        """The manifest's bytes."""
        ...

    def size(self, name: str) -> int:
        """A file's size in bytes."""
        ...

    def index(self, name: str, sha256: str) -> bytes:
        """An index file's bytes, which have this sum."""
        ...

    def record(self, row: dict[str, Any], tar_bytes: int, verify: bool) -> bytes:
        """A record's media bytes, from a tar of this size; RecordError where their sha256 is not its row's."""
        ...

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """`function` of every item, several at a time where that is faster."""
        ...

    def close(self) -> None:
        """Let go of files and connections; they open again when needed."""
        ...


def scheme(path: str | Path) -> str | None:
    """`http`, `https`, `s3`, `gs` for an address of that kind, None for a path; ShardError for other schemes."""
    found = _SCHEME.match(str(path))
    if not found:
        return None
    if found[1] not in ("http", "https", "s3", "gs"):
        raise ShardError(f"{path}: {found[1]}:// is not known; use a local path, http(s)://, s3:// or gs://")
    return found[1]


class LocalFolder:
    """A folder on a disk, read with pread."""

    is_remote = False
    checked_at_opening = 1000  # milliseconds on a disk, a second on a slow network file system

    def __init__(self, path: Path, counters: Counters):
        self.path = path
        self._counters = counters
        self._handles = _Handles()

    def call(self, name: str) -> str:
        """See `Folder`."""
        return str(self.path / name)

    def manifest(self, name: str) -> bytes:
        """See `Folder`."""
        file = self.path / name
        if not file.is_file():
            raise ShardError(
                f"{file}: no such file; give a folder written by `python -m data_pipeline.prepare.ingest VIDEOS... "
                f"--out {file.parent}` (an ingest that was interrupted leaves none)"
            )
        return file.read_bytes()

    def size(self, name: str) -> int:
        """See `Folder`."""
        try:
            return os.stat(self.path / name).st_size
        except OSError as error:
            raise _missing(self.path / name, error) from error

    def index(self, name: str, sha256: str) -> bytes:
        """See `Folder`."""
        try:
            content = (self.path / name).read_bytes()
        except OSError as error:
            raise _missing(self.path / name, error) from error
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ShardError(f"{self.call(name)}: differs from the sha256 in the manifest; {REDO}")
        return content

    def row(self, name: str, start: int, size: int) -> bytes:
        """A row of an index file, where it lies."""
        return self._pread(self.path / name, size, start)

    def record(self, row: dict[str, Any], tar_bytes: int, verify: bool) -> bytes:
        """See `Folder`; a tar that has become shorter is noticed, one that has grown is not."""
        data = self._pread(self.path / row["shard"], row["size"], row["offset"])
        if verify and hashlib.sha256(data).hexdigest() != row["sha256"]:
            raise damaged(row)
        return data

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """See `Folder`."""
        return [function(item) for item in items]

    def close(self) -> None:
        """See `Folder`."""
        self._handles.close()

    def _pread(self, path: Path, size: int, offset: int) -> bytes:
        data = os.pread(self._handles.get(path), size, offset)
        while len(data) < size:  # a signal or a network file system may cut a read short; the end of the file is final
            more = os.pread(self._handles.get(path), size - len(data), offset + len(data))
            if not more:
                raise ShardError(f"{path}: ends {size - len(data)} bytes early at {offset}; {REDO}")
            data += more
        return data


def _missing(file: Path, error: OSError) -> ShardError:
    if isinstance(error, FileNotFoundError):
        return ShardError(f"{file}: named by the manifest but missing; {REDO}")
    return ShardError(f"{file}: cannot be read ({error.strerror}); {REDO}")


def damaged(row: dict[str, Any]) -> RecordError:
    """The error for a record with another sha256 than its row says."""
    return RecordError(f"bytes differ from the index's sha256 ({row['shard']} at {row['offset']})")


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
            raise ShardError(f"{path}: cannot be opened ({error.strerror}); {REDO}") from error
        self._open[path] = descriptor
        if len(self._open) > _MAX_HANDLES:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()
