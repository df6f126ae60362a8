"""Videos and images to shards: `python -m data_pipeline.prepare.ingest INPUTS... --out shards/`.

Every input is decoded in full once. What is broken is written down in rejected.jsonl with its reason, and the rest
goes on. The same inputs give the same shards, byte for byte, whatever the number of jobs.
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from data_pipeline.prepare.convert import DISK_FULL, convert
from data_pipeline.prepare.find import Input, find_inputs
from data_pipeline.prepare.options import IngestOptions, Outcome, Report
from data_pipeline.prepare.writer import SeriesWriter, check_output, new_folder, write_manifest


class NothingIngested(ValueError):
    """None of the inputs gave a sample; `report` says why."""

    def __init__(self, report: Report):
        super().__init__(f"none of the inputs could be ingested, nothing was written\n{report}")
        self.report = report


def ingest(inputs: Sequence[str | Path], out: str | Path, options: IngestOptions | None = None) -> Report:
    """Write the shards of `inputs` (files and folders, folders with all they contain) into the folder `out`.

    Raises ValueError for an input that does not exist, an output that may not be replaced or a full disk, and
    NothingIngested where no input gave a sample. Nothing is left at `out` in either case.
    """
    options, out = options or IngestOptions(), Path(out)
    check_output(out, options.overwrite)
    items = find_inputs([Path(given) for given in inputs], exclude=out)
    report = Report(str(out))
    try:
        with new_folder(out) as folder:
            _write(items, options, folder, report)
            if not report.videos + report.images:
                raise NothingIngested(report)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise ValueError(
                f"--out {out}: the disk is full; nothing was kept, free some space and run again"
            ) from error
        raise
    return report


def _write(items: list[Input], options: IngestOptions, folder: Path, report: Report) -> None:
    scratch = folder / "scratch"
    scratch.mkdir()
    limits = {"shard_bytes": options.shard_bytes, "shard_count": options.shard_count}
    series = {modality: SeriesWriter(folder, modality, **limits) for modality in ("video", "image")}
    try:
        for outcome in _converted(items, options, scratch):
            report.notes += outcome.notes
            for record in outcome.records:
                series[record.modality].write(record)
            _drop_leftovers(scratch, options.jobs)
        for writer in series.values():
            writer.close()
    finally:
        for writer in series.values():
            writer.abandon()
    entries = series["video"].entries + series["image"].entries
    report.videos = sum(entry["samples"] for entry in series["video"].entries)
    report.images = sum(entry["samples"] for entry in series["image"].entries)
    report.bytes = sum(entry["bytes"] for entry in entries)
    _drop_leftovers(scratch, jobs=1)
    scratch.rmdir()
    write_manifest(folder, entries, report.notes)


def _drop_leftovers(scratch: Path, jobs: int) -> None:
    """Remove the pieces of rejected files; with several jobs only at the end, when nobody is writing."""
    if jobs == 1:
        for path in scratch.iterdir():
            path.unlink()


def _converted(items: list[Input], options: IngestOptions, scratch: Path) -> Iterator[Outcome]:
    """The outcome of each input, in the order of the inputs."""
    if options.jobs == 1:
        for item in items:
            yield convert(item, options, scratch)
        return
    ahead = 4 * options.jobs  # bounds the scratch files that wait to be written
    done = 0
    while done < len(items):
        with _pool(options.jobs) as pool:
            waiting: dict[int, Future[Outcome]] = {}
            try:
                while done < len(items):
                    for i in range(done, min(len(items), done + ahead)):
                        if i not in waiting:
                            waiting[i] = pool.submit(convert, items[i], options, scratch)
                    outcome = waiting.pop(done).result()
                    done += 1
                    yield outcome
                return
            except BrokenProcessPool:  # one of the files being read killed its process
                pass
        for item in items[done : done + ahead]:
            yield _alone(item, options, scratch)
            done += 1


def _alone(item: Input, options: IngestOptions, scratch: Path) -> Outcome:
    """One input in a process of its own, so that a crash names its file."""
    with _pool(1) as pool:
        try:
            return pool.submit(convert, item, options, scratch).result()
        except BrokenProcessPool:
            note = {"path": item.name, "reason": "the decoder crashed", "status": "rejected"}
            return Outcome(notes=[note])


def _pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 when anything was written."""
    parsed: dict[str, Any] = vars(_parser().parse_args(arguments))
    inputs, out = parsed.pop("inputs"), parsed.pop("out")
    try:
        report = ingest(inputs, out, IngestOptions(**parsed))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.prepare.ingest",
        description="Videos and images to WebDataset shards.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files and folders, folders with all they contain")
    parser.add_argument("--out", required=True, help="shard folder to write")
    default = IngestOptions()
    helps = {
        "max_seconds": "cut longer videos into equal pieces",
        "short_side": "scale down to this short side, in pixels",
        "fps": "most frames per second kept",
        "gop": "frames between key frames",
        "crf": "x264 quality, 0 to 51",
        "preset": "x264 speed preset",
        "stills": "frames of every video also written as images",
        "shard_bytes": "size at which a shard is closed",
        "shard_count": "most samples in a shard",
        "min_seconds": "shortest intact beginning of a damaged video that is kept",
        "min_frames": "fewest frames of such a beginning",
        "max_pixels": "largest source frame, height x width",
    }
    for name, text in helps.items():
        value = getattr(default, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=text)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--copy", action="store_true", help="keep original bytes where they are good enough")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing shard folder")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
