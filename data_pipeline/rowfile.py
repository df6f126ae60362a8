"""Where the rows of the shards' indices begin, learnt shard by shard, in one file that a rank's processes share."""

import fcntl
import mmap
import os
import struct
import tempfile
import weakref
from threading import Lock

import numpy as np

from data_pipeline.errors import ShardError
from data_pipeline.per_process import PerProcess

_BLOCKS = 8  # byte at which the first block begins: a place of 0 says that there is none
_POSITION = 4  # bytes of a row's position: uint32
_LONGEST = 1 << 32


class RowFile:
    """Row positions of shards, and the rows themselves where they are far away, in a temporary file without a name.

    It lies on the local disk (TMPDIR), is no process's memory, and is gone when its processes are. Processes that are
    forked read and add to the same file, so that each index is read once for all of them; one that is spawned begins
    with an empty file of its own.

    A shard's block holds the positions, uint32 `[rows + 1]`, and then the rows, if they are kept. Its place is noted
    last, in memory that the processes share: a process killed while it writes leaves nothing that is read.
    """

    def __init__(self, shards: int):
        self._shards = shards
        self._places = np.frombuffer(mmap.mmap(-1, 8 * max(1, shards)), np.int64)
        self._locks: PerProcess[Lock] = PerProcess()
        try:
            file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 -- closed with this object, in every process
            weakref.finalize(self, file.close)
            self._descriptor = file.fileno()
            os.ftruncate(self._descriptor, _BLOCKS)
        except OSError as error:
            raise _no_room(error) from error

    def __reduce__(self) -> tuple[type["RowFile"], tuple[int]]:
        return RowFile, (self._shards,)

    def __contains__(self, shard: int) -> bool:
        return self._places[shard] > 0

    def add(self, shard: int, positions: np.ndarray, rows: bytes = b"") -> None:
        """Keep a shard's row positions (`[rows + 1]`, the last is where the last row ends), and its rows."""
        if positions[-1] >= _LONGEST:
            raise ShardError(f"an index of {positions[-1]} bytes: at most {_LONGEST} are read; make smaller shards")
        block = memoryview(positions.astype(np.uint32).tobytes() + rows)
        try:
            with self._locks.get(Lock):  # fcntl's lock is between processes only
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
                try:
                    place = os.fstat(self._descriptor).st_size
                    written = 0
                    while written < len(block):
                        written += os.pwrite(self._descriptor, block[written:], place + written)
                    self._places[shard] = place
                finally:
                    fcntl.lockf(self._descriptor, fcntl.LOCK_UN)
        except OSError as error:
            raise _no_room(error) from error

    def span(self, shard: int, number: int) -> tuple[int, int]:
        """Where a row begins in its index, and its size; of a shard that was added."""
        place = int(self._places[shard]) + _POSITION * number
        start, end = struct.unpack("=II", os.pread(self._descriptor, 2 * _POSITION, place))
        return start, end - start

    def row(self, shard: int, number: int, rows: int) -> bytes:
        """One of a shard's `rows` rows; of a shard that was added with them."""
        start, size = self.span(shard, number)
        return os.pread(self._descriptor, size, int(self._places[shard]) + _POSITION * (rows + 1) + start)


def _no_room(error: OSError) -> ShardError:
    return ShardError(
        f"no room for the shards' row positions in {tempfile.gettempdir()} ({error.strerror}): set TMPDIR"
    )
