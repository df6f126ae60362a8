"""Which files an ingest reads: the inputs walked in a fixed order, each with a kind and a unique key."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_AUDIO = {".mp3", ".m4a", ".wav", ".aac", ".ogg"}
_FILM = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ogv", ".gif"}
VIDEO = _AUDIO | _FILM | {".ts", ".mts", ".m2ts"}
"""Suffixes opened as video; the audio ones among them end in rejected.jsonl with the reason, not in silence."""
IMAGE = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
"""Suffixes opened as images."""


@dataclass(frozen=True)
class Input:
    """One file to ingest."""

    path: Path
    kind: str
    """`video`, `image` or `skipped`."""
    name: str
    """Path relative to the input folder, as written in metadata and in rejected.jsonl."""
    key: str
    """Unique among the inputs; letters, digits, `_` and `-` only. Empty for skipped files."""
    labels: dict[str, Any] = field(default_factory=dict)
    """Fields of the JSON file beside it (`clip.json` for `clip.mp4`), if there is one."""


def find_inputs(inputs: list[Path], exclude: list[Path]) -> list[Input]:
    """All files of the inputs, sorted; the folders `exclude` (the output's) are left out.

    Raises ValueError for an input that does not exist.
    """
    named = [(name, path) for given in inputs for name, path in _files(given, [out.resolve() for out in exclude])]
    named.sort(key=lambda pair: (pair[0], str(pair[1])))
    beside = {path.with_suffix(".json") for _, path in named if _kind(path) != "skipped"}
    used: set[str] = set()
    return [_input(name, path, used) for name, path in named if path not in beside]


def _files(given: Path, exclude: list[Path]) -> Iterator[tuple[str, Path]]:
    if given.is_file():
        yield given.name, given
        return
    if not given.is_dir():
        raise ValueError(f"{given}: no such file or folder; give videos, images or folders of them")
    seen: set[str] = set()
    for folder, folders, files in os.walk(given, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen or Path(real) in exclude:  # a link that leads back, or our own output
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for file in files:
            path = Path(folder, file)
            yield path.relative_to(given).as_posix(), path


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    return "video" if suffix in VIDEO else "image" if suffix in IMAGE else "skipped"


def _input(name: str, path: Path, used: set[str]) -> Input:
    kind = _kind(path)
    if kind == "skipped":
        return Input(path, kind, name, "")
    labels = path.with_suffix(".json")
    return Input(path, kind, name, _key(name, used), _labels(labels) if labels.is_file() else {})


def _labels(path: Path) -> dict[str, Any]:
    try:
        labels = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: the labels beside a media file must be a JSON object ({error})") from error
    if not isinstance(labels, dict):
        raise ValueError(f"{path}: the labels beside a media file must be a JSON object, not {type(labels).__name__}")
    return labels


def _key(name: str, used: set[str]) -> str:
    """A key from a relative path; a short hash of the path is added where two paths give the same key."""
    key = re.sub(r"[^A-Za-z0-9_-]+", "_", str(Path(name).with_suffix(""))).strip("_") or "file"
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
    if len(key) > 60:  # a name in a tar has at most 100 bytes
        key = f"{key[:50]}-{digest[:8]}"
    if key in used:
        key = f"{key}-{digest[:8]}"
    number = 2
    while key in used:  # the same name from two input folders
        key, number = f"{key.rsplit('--', 1)[0]}--{number}", number + 1
    used.add(key)
    return key
