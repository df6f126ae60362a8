"""Is everything there and as it was written? `python -m data_pipeline.prepare.verify SHARDS [--out FOLDER]`.

Every tar and index against the manifest, every record's checksum, every frame decoded, the facts against the index.
Each problem is a line; the exit status is 1 where there are any. FOLDER receives `problems.jsonl`, `verify.json`
(counts and statistics) and `contact_sheet.png`, a picture of some records to be looked at.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image

from data_pipeline.avfile import SCALER_THREADS, quarter_turns
from data_pipeline.pool import Lost, in_order
from data_pipeline.prepare.command import add_common, run
from data_pipeline.prepare.contact_sheet import HEIGHT, strip, write_contact_sheet
from data_pipeline.prepare.luma import frames_of, open_image, timeline_of
from data_pipeline.prepare.records import DAMAGED, Stored, over_records
from data_pipeline.prepare.slices import Slice, check_parts, join_lines
from data_pipeline.prepare.stats import Stats
from data_pipeline.prepare.tar_check import check_tar, indexed_rows
from data_pipeline.prepare.writer import write_atomically
from data_pipeline.shards import read_manifest

PROBLEMS, REPORT, SHEET = "problems.jsonl", "verify.json", "contact_sheet.png"
_PICTURES = 6  # frames of a video on the sheet


@dataclass(frozen=True)
class Checked:
    """What became of one record."""

    problem: str | None
    pictures: list[np.ndarray]
    """For the contact sheet: uint8 `[HEIGHT, W, 3]` each, none unless asked for."""


class Verification:
    """The problems and statistics found so far, the problems written to a file as they come."""

    def __init__(self, file: TextIO | None):
        self.problems = 0
        self.stats: dict[str, Stats] = {}
        self._file = file

    def problem(self, where: str, what: str) -> None:
        """Name a problem, on stdout and in the file."""
        self.problems += 1
        print(f"problem: {where}: {what}", flush=True)
        if self._file:
            self._file.write(json.dumps({"where": where, "problem": what}) + "\n")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"problems": self.problems} | {name: stats.as_dict() for name, stats in self.stats.items()}


def verify(
    shards: str | Path, parsed: argparse.Namespace, file: TextIO | None
) -> tuple[Verification, list[Image.Image]]:
    """Check this part of a shard folder; what was found, and the strips of the contact sheet.

    Raises ShardError where there is no manifest to go by.
    """
    folder, manifest = read_manifest(shards)
    found = Verification(file)
    sound = _check_tars(folder, _shares(manifest["shards"], parsed.part), parsed, found)
    total = sum(len(lines) for _, lines in sound)
    on_sheet = set(np.linspace(0, total - 1, min(parsed.sheet, total)).round().astype(int).tolist())
    strips = []
    work = partial(_check_record, on_sheet=on_sheet)
    for stored, checked in over_records(work, _records(folder, sound), total, parsed):
        found.stats.setdefault(stored.modality, Stats()).add(stored.row)
        if isinstance(checked, Lost):
            checked = Checked(checked.reason, [])
        if checked.problem:
            found.problem(f"{stored.tar.name}/{stored.key}", checked.problem)
        if checked.pictures:
            strips.append(strip(checked.pictures, stored.row))
    return found, strips


Share = tuple[dict[str, Any], range]
"""A manifest's entry, and which rows of its index belong to this part."""


def _shares(entries: list[dict[str, Any]], part: Slice) -> list[Share]:
    mine = part.range(sum(entry["samples"] for entry in entries))
    shares, before = [], 0
    for entry in entries:
        lines = range(max(0, mine.start - before), min(entry["samples"], mine.stop - before))
        before += entry["samples"]
        if len(lines) or part.is_whole:
            shares.append((entry, lines))
    return shares


def _check_tars(folder: Path, shares: list[Share], parsed: argparse.Namespace, found: Verification) -> list[Share]:
    """The shares whose records can be read; a tar's problems are named by the part that has its first record."""
    work = partial(_check_share, folder=folder)
    sound = []
    for (entry, lines), result in in_order(work, shares, jobs=parsed.jobs, timeout=parsed.timeout):
        readable, problems = (False, [result.reason]) if isinstance(result, Lost) else result
        for what in problems if lines.start == 0 else ():
            found.problem(entry["name"], what)
        if readable:
            sound.append((entry, lines))
    return sound


def _check_share(share: Share, folder: Path) -> tuple[bool, list[str]]:
    return check_tar(folder, share[0])


def _records(folder: Path, shares: list[Share]) -> Iterator[Stored]:
    number = 0
    for entry, lines in shares:
        rows = indexed_rows(folder / entry["index"])
        for line in lines:
            yield Stored(number, entry["modality"], folder / entry["name"], rows[line])
            number += 1


def _check_record(stored: Stored, on_sheet: set[int]) -> Checked:
    """Checksum, full decode, facts."""
    want = stored.number in on_sheet
    try:
        data = stored.read()
        check = _check_image if stored.modality == "image" else _check_video
        return check(data, stored.row, want)
    except DAMAGED as error:
        return Checked(str(error), [])


def _check_image(data: bytes, row: dict[str, Any], want: bool) -> Checked:
    picture = open_image(data)
    problem = _difference({"width": picture.width, "height": picture.height}, row)
    return Checked(problem, [_picture(picture)] if want else [])


def _check_video(data: bytes, row: dict[str, Any], want: bool) -> Checked:
    timeline = timeline_of(data)
    shown = {int((i + 0.5) * row["frames"] / _PICTURES) for i in range(_PICTURES)} if want else set()
    pictures, count, sides = [], 0, (0, 0)
    for frame in frames_of(data, timeline):
        turns = quarter_turns(frame.rotation)
        sides = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
        if count in shown:
            pixels = frame.to_ndarray(format="rgb24", threads=SCALER_THREADS)
            pictures.append(_picture(Image.fromarray(np.rot90(pixels, turns))))
        count += 1
    problem = _difference({"frames": count, "width": sides[0], "height": sides[1]}, row)
    if problem is None and abs(timeline.duration - row["duration"]) > 1.5 / row["fps"]:
        problem = f"lasts {timeline.duration:.3f} s, but the index says {row['duration']:.3f} s"
    return Checked(problem, pictures)


def _difference(decoded: dict[str, int], row: dict[str, Any]) -> str | None:
    wrong = [f"{name} {value}, but the index says {row[name]}" for name, value in decoded.items() if value != row[name]]
    return "; ".join(wrong) or None


def _picture(picture: Image.Image) -> np.ndarray:
    width = max(1, round(picture.width * HEIGHT / picture.height))
    return np.asarray(picture.resize((width, HEIGHT), Image.Resampling.BILINEAR))


def _join(out: Path, part: Slice) -> None:
    """The parts' problems and statistics as one, once all are there."""
    folders = part.siblings(out)
    if not all((folder / REPORT).is_file() for folder in folders):
        return
    whole = Verification(None)
    for folder in folders:
        held = json.loads((folder / REPORT).read_text())
        whole.problems += held.pop("problems")
        for modality, counts in held.items():
            whole.stats.setdefault(modality, Stats()).merge(Stats.of(counts))
    join_lines(out, folders, PROBLEMS)
    write_atomically(out / REPORT, json.dumps(whole.as_dict(), indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 only where all is well."""
    return run(_parser(), _verify, arguments)


def _verify(parsed: argparse.Namespace) -> int:
    if parsed.out is None:
        found, _ = verify(parsed.shards, parsed, None)
    else:
        found = _verify_into(Path(parsed.out), parsed)
    for modality, stats in found.stats.items():
        print(f"{modality}: " + "\n  ".join(stats.lines()))
    print(f"{parsed.shards}: {found.problems or 'no'} problems")
    return 1 if found.problems else 0


def _verify_into(out: Path, parsed: argparse.Namespace) -> Verification:
    check_parts(out, parsed.part)
    folder = parsed.part.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).unlink(missing_ok=True)  # of an earlier time
    with (folder / PROBLEMS).open("w") as file:
        found, strips = verify(parsed.shards, parsed, file)
    if strips:
        write_contact_sheet(folder / SHEET, strips)
    write_atomically(folder / REPORT, json.dumps(found.as_dict(), indent=1) + "\n")
    if not parsed.part.is_whole:
        _join(out, parsed.part)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.prepare.verify",
        description="Check tars, checksums and every frame of a shard folder; exit status 1 where anything is wrong.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("shards", help="shard folder")
    parser.add_argument("--out", help=f"folder for {PROBLEMS}, {REPORT} and {SHEET}")
    parser.add_argument("--sheet", type=int, default=24, help="records on the contact sheet")
    add_common(parser, timeout=300.0)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
