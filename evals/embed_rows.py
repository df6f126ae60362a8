"""The rows of one file on their way to the disk: whatever ends the process, what the journal says is there is there."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

COMMIT_SECONDS = 1.0  # between two notes in the journal: what a kill costs at most, beside the batch it falls into
PARQUET_BYTES = 16 * 2**20  # of a row group, a row at least
FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskError(ValueError):
    """The features cannot be written; the message says where and what to do."""


def partial(path: Path) -> Path:
    """Where a file is written before it is whole."""
    return path.with_name(f"{path.name}.partial")


def journal_of(path: Path) -> Path:
    """Where it is noted how far the rows of a file have come."""
    return path.with_name(f"{path.name}.journal")


def write_whole(path: Path, data: bytes) -> None:
    """A file that appears whole or not at all, on the disk itself when this returns."""
    part = partial(path)
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    settle(part, path)


def settle(part: Path, path: Path) -> None:
    """Give a finished file its name, for good."""
    part.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass
class RowWriter:
    """A .npy of known shape that grows batch by batch, and goes on where its journal says.

    Plain writes, no map: on a full disk a write is an error, a map would kill the process.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    facts: dict[str, Any]
    """What must be the same to go on: of another input or shape it starts anew."""
    batches: int = field(default=0, init=False)
    """Already there."""

    def __post_init__(self) -> None:
        header = io.BytesIO()
        about = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(header, about)
        self._header = header.getvalue()
        self.batches, rows = self._noted()
        self._file: BinaryIO = partial(self.path).open("r+b" if self.batches else "w+b")
        self._file.write(self._header)
        self._rows = rows
        self._file.truncate(len(self._header) + rows * self._row_bytes)
        self._file.seek(0, os.SEEK_END)
        self._last_note = time.monotonic()

    @property
    def rows(self) -> int:
        """Already there."""
        return self._rows

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def _noted(self) -> tuple[int, int]:
        """Batches and rows that the journal vouches for, 0 where it is of something else."""
        try:
            noted = json.loads(journal_of(self.path).read_text())
            size = partial(self.path).stat().st_size
        except (FileNotFoundError, ValueError):
            return 0, 0
        is_same = noted["facts"] == self.facts and noted["shape"] == list(self.shape)
        is_there = size >= len(self._header) + noted["rows"] * self._row_bytes
        return (noted["batches"], noted["rows"]) if is_same and is_there else (0, 0)

    def add(self, rows: np.ndarray) -> None:
        """The rows of the next batch."""
        assert rows.shape[1:] == self.shape[1:], f"rows of {rows.shape[1:]}, expected {self.shape[1:]}"
        self._file.write(np.ascontiguousarray(rows, dtype=self.dtype).data)
        self._rows += len(rows)
        self.batches += 1
        if time.monotonic() - self._last_note >= COMMIT_SECONDS:
            self._note()

    def _note(self) -> None:
        self._flush()
        noted = {"facts": self.facts, "shape": self.shape, "batches": self.batches, "rows": self._rows}
        write_whole(journal_of(self.path), json.dumps(noted).encode())
        self._last_note = time.monotonic()

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """All rows are there: note it, so that only what follows is left to do. The file keeps its passing name."""
        assert self._rows == self.shape[0], f"{self._rows} rows were written of {self.shape[0]}"
        self._note()
        self._file.close()

    def close(self) -> None:
        self._file.close()


def write_times(path: Path, times: np.ndarray) -> None:
    data = io.BytesIO()
    np.save(data, times)
    write_whole(path, data.getvalue())


# ------------------------------------------------------------------------------------------------------------- parquet


def need_pyarrow() -> None:
    """ValueError with the command where it is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("format=parquet needs pyarrow: pip install 'vjepa-pipeline[parquet]', or take npy") from error


def write_parquet(features: Path, times: np.ndarray, path: Path) -> None:
    """A .npy as a .parquet: columns `time` and `features` (a row's numbers in a line; the shape in the metadata)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = np.load(features, mmap_mode="r")
    width = math.prod(rows.shape[1:])
    kind = pa.list_(pa.from_numpy_dtype(rows.dtype), width)
    schema = pa.schema({"time": pa.float64(), "features": kind}, {"shape": json.dumps(rows.shape[1:])})
    part, step = partial(path), max(1, PARQUET_BYTES // (width * rows.itemsize))
    with pq.ParquetWriter(part, schema, compression="none", use_dictionary=False, write_statistics=False) as writer:
        for first in range(0, len(rows), step):
            flat = np.array(rows[first : first + step]).reshape(-1)
            column = pa.FixedSizeListArray.from_arrays(pa.array(flat), width)
            writer.write_table(pa.table([pa.array(times[first : first + step]), column], schema=schema))
    with part.open("rb") as file:
        os.fsync(file.fileno())
    settle(part, path)


def read_parquet(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features and times of a .parquet, all in memory."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    shape = json.loads(table.schema.metadata[b"shape"])
    flat = table["features"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(-1, *shape), table["time"].to_numpy()


def said_of_full(error: OSError, path: Path) -> Iterator[DiskError]:
    """The error of a full disk, in words; nothing for others."""
    if error.errno in FULL:
        yield DiskError(
            f"no room on the disk for {path} ({error.strerror}). What is done is kept: make room and run the same "
            "command again, or store less (--dtype fp16, --pool frame)"
        )
