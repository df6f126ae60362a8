"""What a source may be: shards on a disk, behind HTTP or in S3, media files as they are, or a stream of plain tars."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.cache import RecordCache
from data_pipeline.counters import Counters
from data_pipeline.files import SUFFIXES, Files, holds_files
from data_pipeline.folders import scheme
from data_pipeline.retries import RemoteConfig
from data_pipeline.shards import MANIFEST, Shards, modalities
from data_pipeline.stream import Stream, StreamConfig, is_stream


class Records(Protocol):
    """The records of one modality of one source, by number; see `Shards`."""

    counters: Counters

    def __len__(self) -> int: ...

    @property
    def is_remote(self) -> bool:
        """Whether records come over the network."""
        ...

    @property
    def total_bytes(self) -> int:
        """Size of the source on its disk."""
        ...

    @property
    def fingerprint(self) -> str:
        """A sum that changes when the records do: another one on resume means another order."""
        ...

    def row(self, index: int) -> dict[str, Any]:
        """What is known of a record; at least its `key`."""
        ...

    def read(self, index: int, *, verify: bool = False) -> tuple[bytes, dict[str, Any]]:
        """A record's media bytes and its row; RecordError where this one is bad, ShardError where the source is."""
        ...

    def read_ahead(self, indices: Iterable[int]) -> None:
        """Begin to fetch these records, where that takes time."""
        ...


def open_source(
    path: str | Path,
    modality: str,
    *,
    remote: RemoteConfig | None = None,
    cache: RecordCache | None = None,
    counters: Counters | None = None,
    stream: StreamConfig | None = None,
    stream_key: int = 0,
) -> Records:
    """A source's records of one modality. A folder with a manifest is a shard folder, whatever else it holds.

    `stream` and `stream_key` (what its shuffles are seeded by) are for plain WebDataset tars only.
    """
    if is_stream(path):
        return Stream(str(path), modality, stream or StreamConfig(), key=stream_key, remote=remote, counters=counters)
    if _is_files(path):
        return Files(path, modality, counters=counters)
    return Shards(path, modality, remote=remote, cache=cache, counters=counters)


def source_modalities(path: str | Path) -> list[str]:
    """The modalities a source holds, video first; of a stream, which nobody has counted, those it may hold."""
    if is_stream(path):
        return list(SUFFIXES)
    if _is_files(path):
        return [modality for modality in SUFFIXES if len(Files(path, modality))]
    return modalities(path)


def _is_files(path: str | Path) -> bool:
    """Whether there are media files and no shards; where there is neither, `Shards` says what is missing."""
    if scheme(path) or Path(path).name == MANIFEST or (Path(path) / MANIFEST).is_file():
        return False
    return holds_files(Path(path))
