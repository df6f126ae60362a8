"""The work of a cluster's array: `--shard i/n` does one part of n, and the part that is finished last joins them.

Each part is a folder of its own inside the output, `slice-000-of-008/`, made like any output. Joining writes what
belongs to the whole beside them; it can be done any number of times, and no bytes of a shard are moved.
"""

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.prepare.writer import check_output, new_folder, write_atomically, write_manifest
from data_pipeline.shards import MANIFEST

_FOLDER = re.compile(r"slice-(\d+)-of-(\d+)")


@dataclass(frozen=True)
class Slice:
    """Part `index` of `count`, counted from 0 as ranks and SLURM's `--array=0-7` are."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"--shard {self.index}/{self.count}: i must be between 0 and n - 1, as in 0/{max(1, self.count)}"
            )

    @classmethod
    def parse(cls, text: str) -> "Slice":
        """`i/n` as given on the command line; ValueError for anything else."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found:
            raise ValueError(f"--shard {text}: must be i/n, as in 0/8 (the first of eight parts)")
        return cls(int(found[1]), int(found[2]))

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the work."""
        return self.count == 1

    def folder(self, out: Path) -> Path:
        """Where this part's output lies: `out` itself for the whole."""
        return out if self.is_whole else out / f"slice-{self.index:03d}-of-{self.count:03d}"

    def siblings(self, out: Path) -> list[Path]:
        """The folders of all parts, whether there yet or not."""
        return [Slice(index, self.count).folder(out) for index in range(self.count)]

    def range(self, total: int) -> range:
        """This part of `total` things in a row: contiguous, the parts as equal as they can be."""
        return range(total * self.index // self.count, total * (self.index + 1) // self.count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def check_parts(out: Path, part: Slice) -> None:
    """ValueError where `out` holds the parts of another division, or is not a folder of parts although it should be."""
    if not out.is_dir():
        return
    for path in sorted(out.iterdir()):
        found = _FOLDER.match(path.name)
        if found and part.is_whole:
            raise ValueError(f"--out {out}: holds {path.name}, a part of {int(found[2])}; give another folder")
        if found and int(found[2]) != part.count:
            raise ValueError(
                f"--out {out}: holds {path.name}, but --shard {part} is a part of {part.count}; all parts of one "
                "output are of the same n: give another folder, or remove that one"
            )
        if not part.is_whole and path.suffix == ".tar":
            raise ValueError(f"--out {out}: holds the shards of an output without --shard; give another folder")


def was_made(folder: Path, name: str, made_by: dict[str, Any]) -> bool:
    """Whether `folder` is a complete output that was made in this very way, which its file `name` says."""
    path = folder / name
    return (folder / MANIFEST).is_file() and path.is_file() and path.read_text() == as_text(made_by)


def as_text(made_by: dict[str, Any]) -> str:
    """How an output was made, as its file holds it."""
    return json.dumps(made_by, indent=1) + "\n"


def make_part(
    out: Path,
    part: Slice,
    fill: Callable[[Path, Path], list[dict[str, Any]]],
    *,
    name: str,
    made_by: dict[str, Any],
    overwrite: bool,
) -> None:
    """Make this part's output, unless it is there already.

    Args:
        out: the whole's folder.
        part: which part.
        fill: writes into its first argument, a folder that will be renamed to its second; returns manifest entries.
        name: of the file that says how the output was made.
        made_by: what stands in it.
        overwrite: replace an output that is there.

    Raises ValueError where something is there that may not be replaced.
    """
    target = part.folder(out)
    check_parts(out, part)
    if not overwrite and was_made(target, name, made_by):
        return
    check_output(target, overwrite)
    if not part.is_whole:
        (out / MANIFEST).unlink(missing_ok=True)  # the set is not whole while a part of it is made again
    with new_folder(target) as folder:
        entries = fill(folder, target)
        (folder / name).write_text(as_text(made_by))
        write_manifest(folder, entries)


def join_lines(out: Path, folders: Iterable[Path], name: str) -> None:
    """The lines of each part's file `name`, one part after the other, as `out`/`name`."""
    write_atomically(out / name, "".join((folder / name).read_text() for folder in folders))


def same_in_all(out: Path, folders: list[Path], name: str) -> str:
    """The content of the file `name`, which is to be the same in all parts; ValueError where it is not."""
    contents = {(folder / name).read_text() for folder in folders}
    if len(contents) > 1:
        raise ValueError(
            f"{out}: its parts were not made of the same inputs with the same options and versions (compare "
            f"slice-*/{name}); make the odd ones again with --overwrite"
        )
    return contents.pop()


def join_manifests(out: Path, folders: list[Path], made_by: str) -> dict[str, Any] | None:
    """Write the manifest of a set whose parts lie in `folders`; None where one of them is not finished yet.

    `made_by` is the file in each part that says how it was made; ValueError unless all parts say the same.
    """
    if not all((folder / MANIFEST).is_file() for folder in folders):
        return None
    how = same_in_all(out, folders, made_by)
    parts = [json.loads((folder / MANIFEST).read_text()) for folder in folders]
    shards = [
        _moved(entry, folder, out) for folder, part in zip(folders, parts, strict=True) for entry in part["shards"]
    ]
    shards.sort(key=lambda entry: entry["modality"], reverse=True)  # stable: video first, as in a set made whole
    manifest = {"schema": parts[0]["schema"], "shards": shards}
    write_atomically(out / made_by, how)
    write_atomically(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


def _moved(entry: dict[str, Any], folder: Path, out: Path) -> dict[str, Any]:
    """A manifest's entry as seen from another folder."""
    names = {name: os.path.relpath(folder / entry[name], out) for name in ("name", "index")}
    return entry | names
