"""A shard folder with some of another's records: as a view, new indices over the same tars, or as a copy.

A view costs some kilobytes and needs no reader of its own: the manifest names the tars where they lie, the indices list
only the records that are kept. It is good as long as the tars stay in the same place relative to it, and only for
readers that go by the index; plain WebDataset reads whole tars, for it (and for another disk or store) write a copy.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_pipeline.prepare.options import IngestOptions
from data_pipeline.prepare.records import Stored
from data_pipeline.prepare.writer import SeriesWriter, write_index

_OF_THE_INDEX = ("key", "ext", "offset", "size", "sha256", "modality")  # not part of a sample's own metadata


def write_subset(folder: Path, target: Path, records: Iterable[Stored], *, copy: bool) -> list[dict[str, Any]]:
    """Write the records into `folder`, which will be renamed to `target`; the manifest's entries."""
    return _copied(folder, records) if copy else _viewed(folder, target, records)


def _viewed(folder: Path, target: Path, records: Iterable[Stored]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    tar, rows, modality = None, [], ""

    def close() -> None:
        if tar is not None:
            index = folder / f"{modality}-{sum(entry['modality'] == modality for entry in entries):06d}.index.jsonl"
            entry = write_index(index, rows, tar, modality)
            entries.append(entry | {"name": _seen_from(target, tar)})

    for stored in records:
        if stored.tar != tar:
            close()
            tar, rows, modality = stored.tar, [], stored.modality
        rows.append(stored.row)
    close()
    return entries


def _seen_from(target: Path, tar: Path) -> str:
    return os.path.relpath(tar.resolve(), target.resolve())


def _copied(folder: Path, records: Iterable[Stored]) -> list[dict[str, Any]]:
    default = IngestOptions()
    series = {
        modality: SeriesWriter(folder, modality, shard_bytes=default.shard_bytes, shard_count=default.shard_count)
        for modality in ("video", "image")
    }
    try:
        for stored in records:
            meta = {name: value for name, value in stored.row.items() if name not in _OF_THE_INDEX}
            series[stored.modality].write(stored.key, stored.row["ext"], stored.read(), meta)
        for writer in series.values():
            writer.close()
    finally:
        for writer in series.values():
            writer.abandon()
    return [entry for writer in series.values() for entry in writer.entries]
