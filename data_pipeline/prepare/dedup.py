"""Leave out near-duplicates: `python -m data_pipeline.prepare.dedup SHARDS --out FOLDER`.

Near by a perceptual hash of the frames (phash.py), or by an encoder's features that the caller brings (`--features`).
FOLDER is a shard folder (a view of SHARDS, see subset.py) in which every group of duplicates is left with one record;
`groups.jsonl` in it names the groups, `not_compared.jsonl` the records that could not be hashed, which are kept.

With `--shard i/n` the parts hash, and the part that ends last compares all with all.
"""

import argparse
import contextlib
import fcntl
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.pool import Lost
from data_pipeline.prepare.command import add_common, run
from data_pipeline.prepare.features import feature_pairs, load_features
from data_pipeline.prepare.near import Group, Pairs, keep_one_of_each, near_pairs
from data_pipeline.prepare.phash import HASH_BITS, WORDS, distance, record_hash
from data_pipeline.prepare.records import DAMAGED, Stored, count_records, manifest_sum, over_records, stored_records
from data_pipeline.prepare.slices import Slice, join_lines, make_part, same_in_all, was_made
from data_pipeline.prepare.subset import write_subset
from data_pipeline.prepare.writer import write_atomically, write_manifest
from data_pipeline.shards import MANIFEST, Shards, modalities

GROUPS, NOT_COMPARED, MADE_BY, _HASHES = "groups.jsonl", "not_compared.jsonl", "dedup.json", "hashes.npz"
_FLAT = "most of its frames are flat: there is nothing to compare"


def dedup_by_hash(shards: Path, out: Path, limit: float, parsed: argparse.Namespace) -> dict[str, int] | None:
    """Hash this part's records; when all parts are there, group and write. Counts, or None for a part before the last.

    `limit` is the largest distance of duplicates, as a share of the hash's bits.
    """
    if not 0 <= limit < 0.5:
        raise ValueError(f"--limit {limit:g}: must be in [0, 0.5), for strangers differ in about half of their bits")
    made_by = {"of": manifest_sum(shards), "by": "perceptual hash", "limit": limit, "copy": parsed.copy}

    def fill(folder: Path, target: Path) -> list[dict[str, Any]]:
        _hash_records(shards, folder, parsed)
        if not parsed.part.is_whole:
            return []  # a part holds hashes, and no samples of its own
        return _write(shards, folder, target, _hash_pairs([folder], limit), copy=parsed.copy)

    make_part(out, parsed.part, fill, name=MADE_BY, made_by=made_by, overwrite=parsed.overwrite)
    folders = parsed.part.siblings(out)
    if not all((folder / MANIFEST).is_file() for folder in folders):
        return None
    with _alone_in(out):
        if not was_made(out, MADE_BY, made_by):
            how = same_in_all(out, folders, MADE_BY)
            join_lines(out, folders, NOT_COMPARED)
            entries = _write(shards, out, out, _hash_pairs(folders, limit), copy=parsed.copy)
            write_atomically(out / MADE_BY, how)
            write_manifest(out, entries)
    return _counts(shards, out)


def dedup_by_features(shards: Path, out: Path, file: Path, cosine: float, parsed: argparse.Namespace) -> dict[str, int]:
    """The same by vectors of the caller: `.npy` `[records, D]`, or `.npz` with `features` and their `keys`."""
    if not 0 < cosine <= 1:
        raise ValueError(f"--cosine {cosine:g}: must be in (0, 1]")
    if not parsed.part.is_whole:
        raise ValueError(f"--shard {parsed.part}: with --features nothing is decoded; leave --shard out")
    modality = _only_modality(shards)
    features = load_features(file, shards, modality)
    made_by = {"of": manifest_sum(shards), "by": f"features {file.name}", "cosine": cosine, "copy": parsed.copy}

    def fill(folder: Path, target: Path) -> list[dict[str, Any]]:
        (folder / NOT_COMPARED).touch()
        return _write(shards, folder, target, {modality: feature_pairs(features, cosine)}, copy=parsed.copy)

    make_part(out, parsed.part, fill, name=MADE_BY, made_by=made_by, overwrite=parsed.overwrite)
    return _counts(shards, out)


@contextlib.contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """One part at a time: two that end together would both write the whole."""
    with (out / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --- near pairs -----------------------------------------------------------------------------------------------------


def _hash_records(shards: Path, folder: Path, parsed: argparse.Namespace) -> None:
    """The hashes of this part's records, and the reasons why some cannot be compared."""
    hashes: dict[str, list[np.ndarray]] = {modality: [] for modality in WORDS}
    telling: dict[str, list[int]] = {modality: [] for modality in WORDS}
    with (folder / NOT_COMPARED).open("w") as report:
        records, total = stored_records(shards, parsed.part), count_records(shards, parsed.part)
        for stored, found in over_records(_hash, records, total, parsed):
            words = WORDS[stored.modality]
            bits, says, reason = (np.zeros(words, np.uint64), 0, found.reason) if isinstance(found, Lost) else found
            hashes[stored.modality].append(bits)
            telling[stored.modality].append(says)
            if reason:
                report.write(json.dumps({"key": stored.key, "modality": stored.modality, "reason": reason}) + "\n")
    np.savez(
        folder / _HASHES,
        video_hashes=np.array(hashes["video"], np.uint64).reshape(-1, WORDS["video"]),
        video_telling=np.array(telling["video"], np.uint8),
        image_hashes=np.array(hashes["image"], np.uint64).reshape(-1, WORDS["image"]),
        image_telling=np.array(telling["image"], np.uint8),
    )


def _hash(stored: Stored) -> tuple[np.ndarray, int, str | None]:
    """A record's hash, its telling words, and why it cannot be compared."""
    words = WORDS[stored.modality]
    try:
        bits, telling = record_hash(stored.read(), stored.modality)
    except DAMAGED as error:
        return np.zeros(words, np.uint64), 0, f"damaged: {error}"
    return bits, telling, None if 2 * telling.bit_count() >= words else _FLAT


def _hash_pairs(folders: list[Path], limit: float) -> dict[str, Pairs]:
    """Of each modality the near pairs, from the hashes of all parts."""
    parts = [np.load(folder / _HASHES) for folder in folders]
    found = {}
    for modality, words in WORDS.items():
        hashes = np.concatenate([part[f"{modality}_hashes"] for part in parts])
        telling = np.concatenate([part[f"{modality}_telling"] for part in parts])
        rows = np.flatnonzero(2 * np.bitwise_count(telling) >= words)  # the others are not compared
        hashes, telling = hashes[rows], telling[rows]
        judge = partial(distance, hashes, telling)
        pairs, apart = near_pairs(hashes, HASH_BITS[modality], bit_error=limit, judge=judge, limit=limit)
        found[modality] = rows[pairs], apart
    return found


def _only_modality(shards: Path) -> str:
    held = modalities(shards)
    if len(held) != 1:
        raise ValueError(f"{shards}: features are of one modality, but this folder holds {', '.join(held) or 'none'}")
    return held[0]


# --- what is kept ---------------------------------------------------------------------------------------------------


def _write(shards: Path, folder: Path, target: Path, pairs: dict[str, Pairs], *, copy: bool) -> list[dict[str, Any]]:
    """The groups, and the records that are kept; the manifest's entries."""
    groups = {modality: _groups(shards, modality, found) for modality, found in pairs.items() if len(found[0])}
    lines = [line for modality, found in groups.items() for line in _described(shards, modality, found)]
    write_atomically(folder / GROUPS, "".join(json.dumps(line) + "\n" for line in lines))
    gone = {(modality, number) for modality, found in groups.items() for _, dropped in found for number in dropped}
    kept = (record for record in stored_records(shards, Slice()) if (record.modality, record.number) not in gone)
    return write_subset(folder, target, kept, copy=copy)


def _counts(shards: Path, out: Path) -> dict[str, int]:
    """For the last line."""
    groups = [json.loads(line) for line in (out / GROUPS).read_text().splitlines()]
    return {
        "total": count_records(shards, Slice()),
        "groups": len(groups),
        "dropped": sum(len(group["dropped"]) for group in groups),
        "not_compared": len((out / NOT_COMPARED).read_text().splitlines()),
    }


def _groups(shards: Path, modality: str, found: Pairs) -> list[Group]:
    """Groups whose first record is the largest, then the longest, then the first."""
    opened = Shards(shards, modality)

    def rank(number: int) -> tuple[float, float, int]:
        row = opened.row(number)
        return -row["width"] * row["height"], -row["duration"], number

    return keep_one_of_each(*found, rank=rank)


def _described(shards: Path, modality: str, groups: list[Group]) -> Iterator[dict[str, Any]]:
    opened = Shards(shards, modality)
    for kept, dropped in groups:
        rows = [{"key": opened.row(number)["key"], "distance": round(apart, 4)} for number, apart in dropped.items()]
        yield {"modality": modality, "kept": opened.row(kept)["key"], "dropped": rows}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run(_parser(), _dedup, arguments)


def _dedup(parsed: argparse.Namespace) -> int:
    shards, out = Path(parsed.shards), Path(parsed.out)
    if parsed.features:
        counts = dedup_by_features(shards, out, Path(parsed.features), parsed.cosine, parsed)
    else:
        counts = dedup_by_hash(shards, out, parsed.limit, parsed)
    if counts is None:
        print(f"{parsed.part.folder(out)}: hashed; the part that ends last compares")
        return 0
    print(
        f"{out}: {counts['total'] - counts['dropped']} of {counts['total']} records kept; {counts['dropped']} dropped "
        f"in {counts['groups']} groups ({GROUPS}); {counts['not_compared']} could not be compared ({NOT_COMPARED})"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.prepare.dedup",
        description="A shard folder in which near-duplicates are left with one record.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("shards", help="shard folder")
    parser.add_argument("--out", required=True, help="shard folder to write, of what is kept")
    parser.add_argument("--limit", type=float, default=0.15, help="largest share of differing bits of duplicates")
    parser.add_argument("--features", help="vectors to go by instead of the frames: .npy, or .npz with keys")
    parser.add_argument("--cosine", type=float, default=0.95, help="least cosine of duplicates, with --features")
    parser.add_argument("--copy", action="store_true", help="write new tars instead of a view of the old ones")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing shard folder")
    add_common(parser, timeout=300.0)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
