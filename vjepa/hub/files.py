"""Files of weights, opened: what cannot be read is refused in one line that says what the file is and what to do."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vjepa.hub.strict import WeightsError

HEAD = 512  # bytes that are looked at
ZIP = b"PK\x03\x04"  # how a torch file begins


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, as fp32; WeightsError where it is damaged, FileNotFoundError where it is missing."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing beside its config.json: copy the whole folder, or export it again")
    try:
        return {name: value.float() for name, value in load_file(path).items()}
    except SafetensorError as error:
        told = _known(path) or _cut_short(path) or f"is no whole safetensors file ({error}): copy or export it again"
        raise WeightsError(f"{path} {told}") from error


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote, tensors mapped into memory and nothing but tensors and plain values; WeightsError."""
    if _is_safetensors(path):  # which torch.load reads too
        raise WeightsError(f"{path} holds safetensors, not a released .pt: give the folder it lies in")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # RuntimeError, UnpicklingError, EOFError, ...: by what the file holds
        raise WeightsError(f"{path} {_known(path) or _not_torch(path, error)}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; WeightsError where it holds none."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # of JSON or of its encoding
        told = _known(path) or f"is no JSON ({error}): copy it again"
        raise WeightsError(f"{path} {told}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, no mapping: it is not the file of a model")
    return content


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_digests(folder: Path, known: Mapping[str, str]) -> None:
    """WeightsError for the first file of `folder` whose SHA-256 is not the one in `known` (name -> hex)."""
    for name, expected in known.items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: config.json has its SHA-256; copy the whole folder")
        if (found := file_digest(folder / name)) != expected:
            raise WeightsError(
                f"{folder / name} is not what was exported: its SHA-256 is {found[:12]}..., config.json says "
                f"{expected[:12]}...: the file was damaged or changed, copy or export it again"
            )


def _is_safetensors(path: Path) -> bool:
    """By how its header begins, after eight bytes that hold its length."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _known(path: Path) -> str | None:
    """What a file is that is no weights at all, by how it begins."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    text = head.lstrip().lower()
    if not head:
        return "is empty: copy or download it again"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            "is a web page saved under this name: the server answered with a page (an error, a login) in place of the "
            "file; open it to see why, then download again"
        )
    if text.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the file: run `git lfs pull` where it lies"
    return None


def _cut_short(path: Path) -> str | None:
    """Whether a safetensors file has fewer bytes than its header says."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(length, path.stat().st_size)))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, AttributeError, KeyError, TypeError, IndexError):  # this is no header
            return None
    whole, size = 8 + length + max(ends, default=0), path.stat().st_size
    return f"is cut short, {size:,} of {whole:,} bytes: copy or download it again" if size < whole else None


def _not_torch(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        is_zip = file.read(len(ZIP)) == ZIP
    if is_zip and not zipfile.is_zipfile(path):
        return (
            f"is cut short or damaged, {path.stat().st_size:,} bytes without the list of contents that ends a torch "
            "file: copy it again, or let `wget -c` go on with the download"
        )
    if is_zip:
        first = str(error).strip().splitlines()[0]
        return f"holds more than tensors and plain values, which is not read as it could run code: {first}"
    return "cannot be read as a torch checkpoint: give a released .pt, or a folder of weights"
