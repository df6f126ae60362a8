"""Leave out records that teach little: `python -m data_pipeline.prepare.filter SHARDS --out FOLDER`.

FOLDER is a shard folder (a view of SHARDS, see subset.py) of what is kept; `report.jsonl` in it has a row for every
record: key, measures, verdict (`kept` or `dropped`) and the reason.
"""

import argparse
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from data_pipeline.pool import Lost
from data_pipeline.prepare.command import add_common, run
from data_pipeline.prepare.measures import Measures, measure_record
from data_pipeline.prepare.records import DAMAGED, Stored, count_records, manifest_sum, over_records, stored_records
from data_pipeline.prepare.slices import join_lines, join_manifests, make_part
from data_pipeline.prepare.subset import write_subset

REPORT, MADE_BY = "report.jsonl", "filter.json"


@dataclass(frozen=True)
class FilterOptions:
    """The bounds that a record must keep; README, "Filter", says what they were tried on."""

    min_seconds: float = 1.0
    """Shortest video."""
    max_seconds: float = math.inf
    """Longest video."""
    min_short_side: int = 128
    """Fewest pixels on the short side."""
    max_aspect: float = 3.0
    """Longest side over the shortest."""
    min_motion: float = 0.5
    """Least mean change of frames a quarter of a second apart, in grey levels of 255."""
    max_motion: float = math.inf
    """Most of the same: flicker and noise lie above."""
    max_still: float = 0.9
    """Largest share of a quarter seconds in which nothing moves: stills and slide shows lie above."""
    max_black: float = 0.5
    """Largest share of black frames."""
    max_bars: float = 0.15
    """Largest share of the picture that is black bars."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if math.isnan(value) or value < 0:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must not be negative")
        for name in ("seconds", "motion"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low > high:
                raise ValueError(f"--min-{name} {low:g} is above --max-{name} {high:g}: nothing would be kept")

    def fault(self, found: Measures) -> str | None:
        """The first bound that these measures break, in words; None where they keep all."""
        for field in dataclasses.fields(self):
            side, _, name = field.name.partition("_")
            value, bound = getattr(found, name), getattr(self, field.name)
            if value is not None and (value < bound if side == "min" else value > bound):
                return f"{name} {value:.4g} is {'below' if side == 'min' else 'above'} {bound:g}"
        return None


def filter_shards(shards: Path, out: Path, options: FilterOptions, parsed: argparse.Namespace) -> Counter[str]:
    """Write the records of `shards` that keep the bounds to `out`, and the report; counts by verdict and bound."""
    bounds = {name: str(value) for name, value in dataclasses.asdict(options).items()}  # inf is no JSON
    made_by = {"of": manifest_sum(shards), "bounds": bounds, "copy": parsed.copy}

    def fill(folder: Path, target: Path) -> list[dict[str, Any]]:
        records, total = stored_records(shards, parsed.part), count_records(shards, parsed.part)
        judged = over_records(partial(_judge, options=options), records, total, parsed)
        with (folder / REPORT).open("w") as report:
            return write_subset(folder, target, _kept(judged, report), copy=parsed.copy)

    make_part(out, parsed.part, fill, name=MADE_BY, made_by=made_by, overwrite=parsed.overwrite)
    folders = parsed.part.siblings(out)
    if not parsed.part.is_whole and join_manifests(out, folders, MADE_BY):
        join_lines(out, folders, REPORT)
    return _counts(parsed.part.folder(out) / REPORT)


def _judge(stored: Stored, options: FilterOptions) -> dict[str, Any]:
    """The report's row of a record, without its key."""
    try:
        found = measure_record(stored.read(), stored.modality, stored.row)
    except DAMAGED as error:
        return {"verdict": "dropped", "reason": f"damaged: {error}"}
    fault = options.fault(found)
    return found.as_row() | {"verdict": "dropped" if fault else "kept", "reason": fault}


def _kept(judged: Iterator[tuple[Stored, dict[str, Any] | Lost]], report: TextIO) -> Iterator[Stored]:
    """The records that are kept; all are written to the report on the way."""
    for stored, found in judged:
        row = {"verdict": "dropped", "reason": f"damaged: {found.reason}"} if isinstance(found, Lost) else found
        report.write(json.dumps({"key": stored.key, "modality": stored.modality} | row) + "\n")
        if row["verdict"] == "kept":
            yield stored


def _counts(report: Path) -> Counter[str]:
    """How many were kept and dropped, and how many for each bound."""
    counts: Counter[str] = Counter()
    with report.open() as lines:
        for row in map(json.loads, lines):
            counts[row["verdict"]] += 1
            if row["reason"]:
                counts[row["reason"].split()[0].rstrip(":")] += 1
    return counts


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run(_parser(), _filter, arguments)


def _filter(parsed: argparse.Namespace) -> int:
    options = FilterOptions(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(FilterOptions)})
    counts = filter_shards(Path(parsed.shards), Path(parsed.out), options, parsed)
    kept, dropped = counts.pop("kept", 0), counts.pop("dropped", 0)
    why = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    folder = parsed.part.folder(Path(parsed.out))
    print(f"{folder}: {kept} of {kept + dropped} records kept; dropped: {why or 'none'}; reasons in {REPORT}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.prepare.filter",
        description="A shard folder without the records that are too short, too small, still, black or letterboxed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("shards", help="shard folder")
    parser.add_argument("--out", required=True, help="shard folder to write, of what is kept")
    helps = {
        "min_seconds": "shortest video",
        "max_seconds": "longest video",
        "min_short_side": "fewest pixels on the short side",
        "max_aspect": "longest side over shortest",
        "min_motion": "least mean change in a quarter of a second, grey levels of 255",
        "max_motion": "most of the same",
        "max_still": "largest share of quarter seconds in which nothing moves",
        "max_black": "largest share of black frames",
        "max_bars": "largest share of the picture that is black bars",
    }
    for field in dataclasses.fields(FilterOptions):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default, help=helps[field.name])
    parser.add_argument("--copy", action="store_true", help="write new tars instead of a view of the old ones")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing shard folder")
    add_common(parser, timeout=300.0)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
