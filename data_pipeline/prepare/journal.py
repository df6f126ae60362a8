"""An ingest that can be killed at any point and goes on: what is done stands in its unfinished folder, OUT.partial.

A converted input lies in `spool/NUMBER/` until all its samples are in closed shards. Each closed shard adds a line to
`journal.jsonl`: its manifest entry, the first record of each modality that is not in a closed shard, and the notes
since the line before. A shard that was open at the kill is written again from the spool, byte for byte the same.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.prepare.convert import convert
from data_pipeline.prepare.find import Input
from data_pipeline.prepare.options import IngestOptions, Outcome, Record
from data_pipeline.prepare.slices import as_text
from data_pipeline.prepare.writer import claim, write_atomically

MADE_BY = "ingest.json"
"""In the finished folder too: the inputs, options and versions it was made with."""
_JOURNAL, _SPOOL, _LOCK, _OUTCOME = "journal.jsonl", "spool", "lock", "outcome.json"
_MODALITIES = ("video", "image")

Place = tuple[int, int]
"""Of a record: the number of its input, and its own among those of that input."""


@contextlib.contextmanager
def unfinished_folder(target: Path, plan: dict[str, Any], *, restart: bool) -> Iterator[Path]:
    """The folder `target`.partial, locked: a new one, or the one that an ingest with the same plan has left.

    Raises ValueError where another process is at work in it, or where it was left by an ingest with another plan.
    """
    folder = target.with_name(f"{target.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another ingest is writing there; wait for it, or give another --out") from None
        made_by = folder / MADE_BY
        if restart or not made_by.is_file():
            _empty(folder)
            write_atomically(made_by, as_text(plan))
        elif changed := _differences(json.loads(made_by.read_text()), plan):
            raise ValueError(
                f"{folder}: left by an ingest of other inputs or options ({changed}); give that command again to "
                "finish it, or --restart to throw it away"
            )
        (folder / _SPOOL).mkdir(exist_ok=True)
        yield folder


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first few values that differ, in words."""
    pairs = [(name, old.get(part, {}).get(name), value) for part in new for name, value in new[part].items()]
    return ", ".join(f"{name} was {was!r}, is {value!r}" for name, was, value in pairs if was != value)[:300]


class Journal:
    """What an unfinished folder holds, and where to go on."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.spool = folder / _SPOOL
        lines = _whole_lines(folder / _JOURNAL)
        self.entries: list[dict[str, Any]] = [line["shard"] for line in lines]
        """The closed shards' manifest entries."""
        self.notes: list[dict[str, Any]] = [note for line in lines for note in line["notes"]]
        """Rows of rejected.jsonl of the inputs below `frontier`."""
        self.frontier: int = lines[-1]["frontier"] if lines else 0
        """The first input that had not been dealt with when the last shard was closed."""
        self.next: dict[str, Place] = dict.fromkeys(_MODALITIES, (0, 0))
        """Of each modality, the first record that is not in a closed shard."""
        for modality, place in lines[-1]["next"].items() if lines else ():
            self.next[modality] = (place[0], place[1])
        self._noted = len(self.notes)
        self._spooled: list[int] = []
        for path in self.spool.iterdir():
            if path.name.isdigit():
                self._spooled.append(int(path.name))
            else:
                shutil.rmtree(path)  # half a conversion

    def to_do(self, total: int) -> list[int]:
        """The numbers of the inputs to go on with: those with records in no closed shard, and all that follow."""
        return sorted(number for number in self._spooled if number < self.frontier) + list(range(self.frontier, total))

    def is_closed(self, modality: str, place: Place) -> bool:
        """Whether this record is in a closed shard."""
        return place < self.next[modality]

    def shard_closed(self, entry: dict[str, Any], next_places: dict[str, Place], frontier: int) -> None:
        """Write down that a shard is closed, then let go of what it holds."""
        self.next, self.frontier = next_places, frontier
        line = {"shard": entry, "next": self.next, "frontier": self.frontier, "notes": self.notes[self._noted :]}
        self._noted = len(self.notes)
        with (self.folder / _JOURNAL).open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def settle(self, outcomes: dict[int, Outcome]) -> None:
        """Remove from the spool, and from `outcomes`, whatever is in closed shards."""
        for number, outcome in list(outcomes.items()):
            places = {(number, i): record for i, record in enumerate(outcome.records)}
            closed = [record for place, record in places.items() if self.is_closed(record.modality, place)]
            if number < self.frontier and len(closed) == len(places):
                shutil.rmtree(self.spool / f"{number}", ignore_errors=True)
                del outcomes[number]
            for record in closed:
                Path(record.scratch).unlink(missing_ok=True)

    def finish(self) -> None:
        """Remove everything that only an unfinished folder needs."""
        shutil.rmtree(self.spool)
        for path in self.folder.glob("*.partial"):  # of a kill inside write_atomically
            path.unlink()
        (self.folder / _JOURNAL).unlink(missing_ok=True)
        (self.folder / _LOCK).unlink()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The journal's lines; one that was cut off by a kill is removed from the file."""
    if not path.is_file():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_atomically(path, whole)
    return [json.loads(line) for line in whole.splitlines()]


# --- the spool, seen from the processes that fill it -----------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One input to convert into the spool, unless it lies there."""

    number: int
    item: Input
    options: IngestOptions
    spool: Path
    closed: dict[str, Place]
    """Records before these are in closed shards; their media may be gone."""


def convert_into_spool(task: Task) -> Outcome:
    """`convert`, its outcome kept in the spool; what lies there whole is taken as it is."""
    final = task.spool / f"{task.number}"
    outcome = _spooled(final, task)
    if outcome is not None:
        return outcome
    working = task.spool / f"{task.number}.{os.getpid()}"  # a process that was orphaned may still be at work beside us
    shutil.rmtree(working, ignore_errors=True)
    shutil.rmtree(final, ignore_errors=True)
    working.mkdir()
    outcome = convert(task.item, task.options, working)
    kept = {Path(record.scratch).name for record in outcome.records}
    for path in working.iterdir():
        if path.name not in kept:  # pieces of a file that was rejected later
            path.unlink()
    sums = [_sha256(Path(record.scratch)) for record in outcome.records]
    for record in outcome.records:
        record.scratch = str(final / Path(record.scratch).name)
    (working / _OUTCOME).write_text(json.dumps(asdict(outcome) | {"sums": sums}))
    claim(working, final, lambda: _spooled(final, task) is not None)
    return outcome


def _spooled(folder: Path, task: Task) -> Outcome | None:
    """The outcome that lies in the spool; None where there is none, or where it is not whole (a power cut)."""
    try:
        held = json.loads((folder / _OUTCOME).read_text())
    except (OSError, ValueError):
        return None
    records = [Record(**fields | {"scratch": str(folder / Path(fields["scratch"]).name)}) for fields in held["records"]]
    for i, (record, wanted) in enumerate(zip(records, held["sums"], strict=True)):
        path = Path(record.scratch)
        closed = (task.number, i) < task.closed[record.modality]
        if not closed and (not path.is_file() or _sha256(path) != wanted):
            return None
    return Outcome(records, held["notes"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
