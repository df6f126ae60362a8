"""The records of a shard folder, one after the other or through all cores: what the tools after ingest work on."""

import argparse
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from av.error import FFmpegError

from data_pipeline.pool import Lost, in_order
from data_pipeline.prepare.command import Progress
from data_pipeline.prepare.slices import Slice
from data_pipeline.shards import MANIFEST, RecordError, Shards, modalities

Result = TypeVar("Result")

DAMAGED = (ValueError, ArithmeticError, OSError, FFmpegError)
"""What the bytes of a bad record bring up: DecodeError and RecordError are ValueErrors."""


@dataclass(frozen=True)
class Stored:
    """One record: its place among those of its modality, its index row, and the tar that holds its bytes."""

    number: int
    modality: str
    tar: Path
    row: dict[str, Any]

    @property
    def key(self) -> str:
        """The record's key in its shard."""
        return self.row["key"]

    def read(self) -> bytes:
        """The media bytes; RecordError where the tar is shorter or the bytes are not those that were ingested."""
        with self.tar.open("rb") as file:
            data = os.pread(file.fileno(), self.row["size"], self.row["offset"])
        if hashlib.sha256(data).hexdigest() != self.row["sha256"]:
            raise RecordError(f"bytes differ from the index's sha256 ({self.tar.name} at {self.row['offset']})")
        return data


def stored_records(shards: str | Path, part: Slice) -> Iterator[Stored]:
    """The records of this part, of all modalities, in the order of the shards."""
    for modality in modalities(shards):
        opened = Shards(shards, modality)
        for number in part.range(len(opened)):
            row = opened.row(number)
            yield Stored(number, modality, Path(opened.folder, row.pop("shard")), row)
        opened.close()


def count_records(shards: str | Path, part: Slice) -> int:
    """How many records `stored_records` gives."""
    return sum(len(part.range(len(Shards(shards, modality)))) for modality in modalities(shards))


def over_records(
    work: Callable[[Stored], Result], records: Iterable[Stored], total: int, parsed: argparse.Namespace
) -> Iterator[tuple[Stored, Result | Lost]]:
    """`work` on every record by `parsed.jobs` processes; results in the order of the records, progress on stderr."""
    progress = Progress("records", parsed.quiet)
    for stored, result in in_order(work, records, jobs=parsed.jobs, timeout=parsed.timeout):
        progress.step(total, bad=isinstance(result, Lost))
        yield stored, result
    progress.close()


def manifest_sum(shards: str | Path) -> str:
    """What identifies a shard folder's content: the sum of its manifest, which holds the sums of its indices."""
    path = Path(shards)
    return hashlib.sha256((path if path.name == MANIFEST else path / MANIFEST).read_bytes()).hexdigest()
