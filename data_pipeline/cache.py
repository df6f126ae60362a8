"""Records of remote sources on a local disk: bounded in bytes, shared by all processes of a machine, safe to kill.

A record is a file named by its sha256, and what is read back is compared with that name: no half-written, damaged or
foreign file is ever served, whatever was killed when. The same record in two sources or runs is kept once.

Every epoch reads every record once, in a new order; throwing out what was used least lately would then throw out what
comes next. So where not everything fits, a fixed share of the records, chosen by their sums, is kept, and the others
never: a cache of half the data answers half the reads. Only what other runs have left behind is thrown out.
"""

import contextlib
import fcntl
import hashlib
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import Semaphore
from pathlib import Path

from data_pipeline.counters import Counters

log = logging.getLogger(__name__)
_FILL = 0.85  # share of the size that this run's records may take; indices need a little more
_CLEAR = 0.9  # share of the size that is left after throwing out, so that this happens seldom
_LOCK_TRIES, _LOCK_PAUSE = 50, 0.002  # a tenth of a second; a record that is not kept now may be later
_TOUCH = 3600.0  # seconds after which a file that is read counts as used again
_REST = 600.0  # seconds without writing after the disk has refused


@dataclass
class CacheConfig:
    """The local cache of remote sources. Never changes the samples."""

    dir: str | None = None
    """Folder on a local disk, the same for all processes of a machine; null: no cache."""
    max_gb: float = 100.0
    """Most gigabytes (1e9 bytes) that it takes."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_gb) and self.max_gb > 0):
            raise ValueError(f"cache.max_gb={self.max_gb!r}: must be positive; without a cache set cache.dir=null")


class RecordCache:
    """Files by sha256 in `folder`, at most `max_bytes` in all.

    Any number of processes may use the folder at once. A disk that is full or fails is no error: one warning, and
    reading goes on without it.
    """

    def __init__(self, folder: str | Path, max_bytes: int):
        self._folder = Path(folder)
        self._max_bytes = max_bytes
        self._share = 1.0
        self._rest_until = 0.0
        self._warning = Semaphore(1)  # a warning that forked workers share

    def __reduce__(self) -> tuple[Callable[..., "RecordCache"], tuple[object, ...]]:
        return _restored, (self._folder, self._max_bytes, self._share)

    def expect(self, total_bytes: int) -> None:
        """Say how many bytes of records will be read again and again, so that the share that fits is known."""
        self._share = min(1.0, _FILL * self._max_bytes / max(1, total_bytes))

    def admits(self, sha256: str) -> bool:
        """Whether this record is among those that are kept."""
        return int(sha256[:13], 16) < self._share * 16**13

    def get(self, sha256: str, counters: Counters) -> bytes | None:
        """The bytes with this sum, or None."""
        path = self._path(sha256)
        try:
            with path.open("rb") as file:
                data = file.read()
                if time.time() - os.fstat(file.fileno()).st_mtime > _TOUCH:
                    os.utime(file.fileno())
        except FileNotFoundError:
            data = None
        except OSError as error:
            data = None
            self._refused(error, counters)
        if data is not None and hashlib.sha256(data).hexdigest() != sha256:  # a machine that lost power, a bad disk
            with contextlib.suppress(OSError):
                path.unlink()
            data = None
        return data

    def put(self, sha256: str, data: bytes, counters: Counters, *, always: bool = False) -> None:
        """Keep the bytes, whose sum was checked, if they are among those that are kept (or `always`) and fit."""
        if not (always or self.admits(sha256)) or time.monotonic() < self._rest_until:
            return
        try:
            self._write(self._path(sha256), data)
        except OSError as error:
            self._rest_until = time.monotonic() + _REST
            self._refused(error, counters)

    def _write(self, path: Path, data: bytes) -> None:
        part = self._folder / "parts" / secrets.token_hex(16)
        path.parent.mkdir(parents=True, exist_ok=True)
        part.parent.mkdir(exist_ok=True)
        with self._locked() as book:
            if book is None or path.exists() or not self._make_room(book, len(data)):
                return
            file = part.open("xb")
            fcntl.flock(file, fcntl.LOCK_EX)  # says that its writer lives
            file.truncate(len(data))  # counted in full from now on
        try:
            with file:
                file.write(data)
                file.flush()
                os.rename(part, path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()
            raise

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int | None]:
        """The file that holds the number of bytes, locked; None where others hold the lock for long."""
        book = os.open(self._folder / "bytes", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            yield book if _try_lock(book) else None
        finally:
            os.close(book)  # and unlock

    def _make_room(self, book: int, size: int) -> bool:
        """Add `size` to the bytes counted, after throwing out old files where needed; False if it cannot fit."""
        if size > _CLEAR * self._max_bytes:
            return False
        text = os.pread(book, 32, 0)
        held = int(text) if text.strip().isdigit() else self._clear(self._max_bytes)
        if held + size > self._max_bytes:
            held = self._clear(int(_CLEAR * self._max_bytes) - size)
        fits = held + size <= self._max_bytes
        os.pwrite(book, b"%-32d" % (held + size * fits), 0)
        return fits

    def _clear(self, most: int) -> int:
        """Remove what dead writers left, then the files used least lately until `most` bytes are left; those left."""
        parts = self._folder / "parts"
        for part in parts.iterdir():
            _remove_orphan(part)
        files: list[tuple[float, int, str]] = []
        folders = [entry.path for entry in os.scandir(self._folder) if entry.is_dir() and entry.name != parts.name]
        for folder in (str(parts), *folders):  # a part that becomes a record meanwhile counts twice, never not at all
            for entry in os.scandir(folder):
                with contextlib.suppress(FileNotFoundError):
                    files.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
        held = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if held <= most:
                break
            if Path(path).parent != parts:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                held -= size
        return held

    def _path(self, sha256: str) -> Path:
        return self._folder / sha256[:2] / sha256

    def _refused(self, error: OSError, counters: Counters) -> None:
        counters.add(cache_failures=1)
        if self._warning.acquire(block=False):
            log.warning("cache %s: %s; reading goes on without it", self._folder, error.strerror or error)


def _restored(folder: Path, max_bytes: int, share: float) -> RecordCache:
    """A cache that was pickled: a semaphore passes only through a fork."""
    cache = RecordCache(folder, max_bytes)
    cache._share = share
    return cache


def _try_lock(descriptor: int) -> bool:
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_PAUSE)
        else:
            return True
    return False


def _remove_orphan(part: Path) -> None:
    """Remove a part whose writer no longer holds it."""
    with contextlib.suppress(OSError), part.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: it is being written
        part.unlink()
