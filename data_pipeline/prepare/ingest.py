"""Videos and images to shards: `python -m data_pipeline.prepare.ingest INPUTS... --out shards/`.

Every input is decoded in full once. What is broken is written down in rejected.jsonl with its reason, and the rest
goes on. The same inputs give the same shards, byte for byte, whatever the number of jobs and however often it was
killed in between: the same command goes on where it stopped (see journal.py).
"""

import argparse
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import av

from data_pipeline.pool import Lost, in_order
from data_pipeline.prepare.command import Progress, add_common, run
from data_pipeline.prepare.convert import DISK_FULL
from data_pipeline.prepare.find import Input, find_inputs
from data_pipeline.prepare.journal import MADE_BY, Journal, Task, convert_into_spool, unfinished_folder
from data_pipeline.prepare.options import IngestOptions, Outcome, Report
from data_pipeline.prepare.slices import Slice, check_parts, join_lines, join_manifests, was_made
from data_pipeline.prepare.writer import REJECTED, SeriesWriter, check_output, replace_folder, write_manifest
from data_pipeline.shards import MANIFEST


class NothingIngested(ValueError):
    """None of the inputs gave a sample; `report` says why."""

    def __init__(self, report: Report):
        super().__init__(f"none of the inputs could be ingested, nothing was written\n{report}")
        self.report = report


def ingest(
    inputs: Sequence[str | Path],
    out: str | Path,
    options: IngestOptions | None = None,
    *,
    part: Slice | None = None,
    progress: Callable[[Outcome, int], None] | None = None,
) -> Report:
    """Write the shards of `inputs` (files and folders, folders with all they contain) into the folder `out`.

    Args:
        inputs: all of them, for every part too.
        out: the shard folder; until it is complete its content is in `OUT.partial`.
        options: how inputs become samples.
        part: every n-th input only, into a folder inside `out`; the part that ends last makes the parts one set.
        progress: called after each input with its outcome and the number of inputs of this part.

    Raises ValueError for an input that does not exist, an output that may not be replaced or a full disk, and
    NothingIngested where no input gave a sample.
    """
    options, part, out = options or IngestOptions(), part or Slice(), Path(out)
    target = part.folder(out)
    items = find_inputs([Path(given) for given in inputs], exclude=[out, out.with_name(f"{out.name}.partial")])
    plan = _plan(items, options)
    check_parts(out, part)
    if not options.overwrite and was_made(target, MADE_BY, plan):
        report = dataclasses.replace(_report(target), was_there=True)
    else:
        check_output(target, options.overwrite)
        if not part.is_whole:
            (out / MANIFEST).unlink(missing_ok=True)  # the set is not whole while a part of it is made again
        report = _make(items[part.index :: part.count], target, plan, options, part, progress)
    if not part.is_whole:
        _join(out, part)
    return report


def _plan(items: list[Input], options: IngestOptions) -> dict[str, Any]:
    """All that the bytes written depend on."""
    facts = [[item.name, item.key, _size(item.path), item.labels] for item in items]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    versions = {"av": av.__version__} | {name: list(version) for name, version in av.library_versions.items()}
    return {"inputs": {"files": len(items), "sha256": digest}, "options": options.decisive(), "versions": versions}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a link to nowhere; it will be rejected with its reason
        return -1


def _make(
    items: list[Input],
    target: Path,
    plan: dict[str, Any],
    options: IngestOptions,
    part: Slice,
    progress: Callable[[Outcome, int], None] | None,
) -> Report:
    try:
        with unfinished_folder(target, plan, restart=options.restart) as folder:
            if not (folder / MANIFEST).is_file():
                _write(items, options, folder, progress)
                entries = json.loads((folder / MANIFEST).read_text())["shards"]
                if part.is_whole and not entries:
                    report = _report(folder)
                    shutil.rmtree(folder)
                    raise NothingIngested(report)
            Journal(folder).finish()
            replace_folder(folder, target)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise ValueError(
                f"--out {target}: the disk is full; free some space and give the same command again, it goes on with "
                f"what is in {target.name}.partial"
            ) from error
        raise
    return _report(target)


def _write(
    items: list[Input], options: IngestOptions, folder: Path, progress: Callable[[Outcome, int], None] | None
) -> None:
    """All that is still to do, up to the manifest."""
    journal = Journal(folder)
    writers = _Writers(folder, options, journal)
    try:
        for number, outcome in _outcomes(items, options, journal):
            writers.write(number, outcome)
            if progress:
                progress(outcome, len(items))
        writers.close(len(items))
    finally:
        writers.abandon()
    entries = [entry for series in writers.series.values() for entry in series.entries]
    write_manifest(folder, entries, journal.notes)


def _outcomes(items: list[Input], options: IngestOptions, journal: Journal) -> Iterator[tuple[int, Outcome]]:
    """The outcomes of the inputs that are still to do, in the order of the inputs."""
    closed = dict(journal.next)
    tasks = (Task(i, items[i], options, journal.spool, closed) for i in journal.to_do(len(items)))
    for task, outcome in in_order(convert_into_spool, tasks, jobs=options.jobs, timeout=options.timeout):
        if isinstance(outcome, Lost):
            note = {"path": task.item.name, "reason": f"decoding: {outcome.reason}", "status": "rejected"}
            outcome = Outcome(notes=[note])
        yield task.number, outcome


class _Writers:
    """Both series of shards, and the journal that is kept of them."""

    def __init__(self, folder: Path, options: IngestOptions, journal: Journal):
        self.journal = journal
        self.series: dict[str, SeriesWriter] = {}
        for modality in ("video", "image"):
            entries = [entry for entry in journal.entries if entry["modality"] == modality]
            limits = {"shard_bytes": options.shard_bytes, "shard_count": options.shard_count}
            self.series[modality] = SeriesWriter(folder, modality, **limits, entries=entries)
        self._first_open: dict[str, tuple[int, int]] = {}  # of each open shard, by modality
        self._unsettled: dict[int, Outcome] = {}

    def write(self, number: int, outcome: Outcome) -> None:
        """Append the samples of input `number`, but those that an earlier process has brought into closed shards."""
        self._unsettled[number] = outcome
        for i, record in enumerate(outcome.records):
            series = self.series[record.modality]
            if self.journal.is_closed(record.modality, (number, i)):
                continue
            if not series.is_open:
                self._first_open[record.modality] = (number, i)
            series.write(record.key, record.ext, Path(record.scratch).read_bytes(), record.meta)
            if not series.is_open:
                self._note_closed(record.modality, (number, i + 1), frontier=number)
        if number >= self.journal.frontier:  # else they were noted before
            self.journal.notes += outcome.notes

    def close(self, total: int) -> None:
        """Close the shards that are open; all `total` inputs have been written."""
        for modality, series in self.series.items():
            if series.is_open:
                series.close()
                self._note_closed(modality, (total, 0), frontier=total)

    def abandon(self) -> None:
        """Let go of open files after an error."""
        for series in self.series.values():
            series.abandon()

    def _note_closed(self, modality: str, after: tuple[int, int], frontier: int) -> None:
        next_places = {
            name: self._first_open[name] if series.is_open else after for name, series in self.series.items()
        }
        self.journal.shard_closed(self.series[modality].entries[-1], next_places, frontier)
        self.journal.settle(self._unsettled)


def _report(folder: Path) -> Report:
    """What a complete shard folder holds."""
    report = Report(str(folder), notes=[json.loads(line) for line in (folder / REJECTED).read_text().splitlines()])
    for entry in json.loads((folder / MANIFEST).read_text())["shards"]:
        report.videos += entry["samples"] * (entry["modality"] == "video")
        report.images += entry["samples"] * (entry["modality"] == "image")
        report.bytes += entry["bytes"]
    return report


def _join(out: Path, part: Slice) -> None:
    """Make the parts one shard set, once all of them are there."""
    folders = part.siblings(out)
    manifest = join_manifests(out, folders, MADE_BY)
    if manifest is None:
        return
    join_lines(out, folders, REJECTED)
    if not manifest["shards"]:
        raise NothingIngested(_report(out))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 when anything was written."""
    return run(_parser(), _ingest, arguments)


def _ingest(parsed: argparse.Namespace) -> int:
    given: dict[str, Any] = vars(parsed)
    inputs, out, part, quiet = (given.pop(name) for name in ("inputs", "out", "part", "quiet"))
    progress = Progress("files", quiet)
    report = ingest(
        inputs,
        out,
        IngestOptions(**given),
        part=part,
        progress=lambda outcome, total: progress.step(total, bad=any(n["status"] != "skipped" for n in outcome.notes)),
    )
    progress.close()
    print(report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.prepare.ingest",
        description="Videos and images to WebDataset shards. Killed, the same command goes on where it stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files and folders, folders with all they contain")
    parser.add_argument("--out", required=True, help="shard folder to write")
    default = IngestOptions()
    helps = {
        "max_seconds": "cut longer videos into equal pieces (segments) no longer than this",
        "short_side": "scale down to this short side, in pixels",
        "fps": "most frames per second kept",
        "gop": "frames between key frames",
        "crf": "x264 quality, 0 to 51",
        "preset": "x264 speed preset",
        "jpeg_quality": "of stills and of images that are scaled down, 1 to 95",
        "stills": "frames of every video also written as images",
        "shard_bytes": "size at which a shard is closed",
        "shard_count": "most samples in a shard",
        "min_seconds": "shortest intact beginning of a damaged video that is kept",
        "min_frames": "fewest frames of such a beginning",
        "max_pixels": "largest source frame, height x width",
    }
    aliases = {"max_seconds": ["--segment"]}
    for name, text in helps.items():
        value = getattr(default, name)
        flags = [*aliases.get(name, []), f"--{name.replace('_', '-')}"]
        parser.add_argument(*flags, dest=name, type=type(value), default=value, help=text)
    add_common(parser, timeout=default.timeout)
    parser.add_argument("--copy", action="store_true", help="keep original bytes where they are good enough")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing shard folder")
    parser.add_argument("--restart", action="store_true", help="throw away what an interrupted ingest has left")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
