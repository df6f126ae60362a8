"""A tar and its index against the manifest and against each other, without reading the media."""

import hashlib
import json
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any


def check_tar(folder: Path, entry: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether the records of a manifest's entry can be read by their index, and every problem in words."""
    tar, index = folder / entry["name"], folder / entry["index"]
    missing = [f"{path.name} is missing" for path in (tar, index) if not path.is_file()]
    if missing:
        return False, missing
    problems = []
    if (size := tar.stat().st_size) != entry["bytes"]:
        problems.append(f"{size} bytes, but the manifest says {entry['bytes']}")
    content = index.read_bytes()
    if hashlib.sha256(content).hexdigest() != entry["index_sha256"]:
        problems.append(f"{index.name} differs from the sha256 in the manifest")
    try:
        rows = indexed_rows(index)
        names = Counter(f"{row['key']}.{row['ext']}" for row in rows)
    except (ValueError, KeyError) as error:
        return False, [*problems, f"{index.name} cannot be read ({type(error).__name__}: {error})"]
    if len(rows) != entry["samples"]:
        return False, [*problems, f"{len(rows)} rows in {index.name}, but the manifest says {entry['samples']}"]
    problems += [f"{name} stands {count} times in {index.name}" for name, count in names.items() if count > 1]
    is_view = tar.resolve().parent != index.resolve().parent  # of some of the records
    return True, problems + _check_members(tar, rows, is_view=is_view)


def indexed_rows(index: Path) -> list[dict[str, Any]]:
    """All rows of an index file."""
    return [json.loads(line) for line in index.read_bytes().splitlines()]


def _check_members(tar: Path, rows: list[dict[str, Any]], *, is_view: bool) -> list[str]:
    """Whether the tar, read as any reader of WebDataset does, holds what the index says and where it says."""
    members: dict[str, tuple[int, int]] = {}
    problems = []
    try:
        with tarfile.open(tar) as archive:
            for member in archive:
                members[member.name] = member.offset_data, member.size
            end = archive.offset
        with tar.open("rb") as file:
            if os.pread(file.fileno(), 512, end) != bytes(512):  # tarfile takes a damaged header for the end
                problems.append(
                    f"neither a member nor the end at byte {end}: readers of WebDataset stop there in silence"
                )
    except (tarfile.TarError, EOFError, OSError) as error:
        problems.append(f"is no whole tar after {len(members)} members ({type(error).__name__}: {error})")
    for row in rows:
        name = f"{row['key']}.{row['ext']}"
        place = members.pop(name, None)
        has_json = members.pop(f"{row['key']}.json", None) is not None
        if place is None:
            problems.append(f"{name} is in the index but cannot be reached by reading the tar")
        elif place != (row["offset"], row["size"]):
            problems.append(f"{name} lies at {place[0]} with {place[1]} bytes, not where the index says")
        elif not has_json:
            problems.append(f"{row['key']}.json is missing")
    if not is_view:
        problems += [f"{name} is in the tar but not in the index" for name in members]
    return problems
