"""Damaged files through the loader and through ingest: `python -m tests.benchmarks.fuzz_campaign [--files 2000] CLIPS`.

Every file of CLIPS, the folder `odd` included, and so many damaged ones made of the small ones among them. Each must be
accounted for by name: decoded, or a bad sample with its reason; nothing may crash, hang or be passed over. One table,
one row per decoder, and one for ingest. The damage is a pure function of (seed, number).
"""

import argparse
import io
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError

from data_pipeline.avfile import open_bytes
from data_pipeline.config import Backend, ClipConfig, DataConfig, ModalityConfig, SourceConfig
from data_pipeline.dataset import ClipDataset
from data_pipeline.files import SUFFIXES
from data_pipeline.loader import build_loader
from data_pipeline.prepare.ingest import ingest
from data_pipeline.prepare.options import IngestOptions
from data_pipeline.sample import Sample

SMALL = 200_000  # bytes of a file that is damaged as it is
PIECE = 1.0  # seconds that are cut out of a larger one
PIXELS = 640 * 360  # of a frame, at most; above it decoding would take most of the time
FORMATS = {"mkv": "matroska", "ts": "mpegts"}  # FFmpeg's names where they are not the suffix
PATIENCE = 30.0  # seconds for one file
CLIP = ClipConfig(frames=4, fps=4.0, size=32)
BOXES = [b"moov", b"trak", b"stco", b"stsz", b"stts", b"stsc", b"ctts", b"elst", b"tkhd", b"mdhd", b"avcC", b"stsd"]
BOXES += [b"moof", b"trun", b"tfhd", b"mvhd", b"mdat", b"ftyp", b"idx1", b"strh", b"avih", b"movi"]


@dataclass
class Row:
    """What became of the files of one pass."""

    name: str
    outcomes: dict[str, str] = field(default_factory=dict)
    """File -> `decoded`, or the reason why not."""
    seconds: float = 0.0
    growth: int = 0
    """Bytes by which our processes' memory grew: median of the last quarter of the time over that of the first."""
    peak: int = 0
    """Most bytes of all our processes together."""

    def count(self) -> Counter[str]:
        """Files by kind of outcome."""
        return Counter(_kind(outcome) for outcome in self.outcomes.values())

    def __str__(self) -> str:
        found = self.count()
        columns = [str(found[kind]) for kind in ("decoded", "in part", "rejected", "crashed", "timed out")]
        memory = [f"{self.growth / 1e6:+.0f}", f"{self.peak / 1e6:.0f}"]
        numbers = [str(len(self.outcomes)), *columns, f"{self.seconds:.0f}", *memory]
        return f"| {self.name} | {' | '.join(numbers)} |"


HEADING = """| pass | files | decoded | in part | rejected | crashed alone | timed out | s | MB grown | MB peak |
|---|---|---|---|---|---|---|---|---|---|"""


def _kind(outcome: str) -> str:
    if outcome in ("decoded", "in part"):
        return outcome
    if "crashed (" in outcome or "process died" in outcome:
        return "crashed"
    return "timed out" if "took longer than" in outcome else "rejected"


# ----------------------------------------------------------------------------------------------------- damaged files


def make_files(clips: Path, folder: Path, *, files: int, seed: int, originals: bool = True) -> list[str]:
    """Fill `folder`; the names of its files."""
    folder.mkdir(parents=True)
    seeds = _seeds(clips)
    for number in range(files):
        generator = np.random.default_rng([seed, number])
        (name, data), (_, other) = (seeds[generator.integers(len(seeds))] for _ in range(2))
        kind = list(DAMAGE)[generator.integers(len(DAMAGE))]
        damaged = DAMAGE[kind](bytearray(data), other, generator)
        (folder / f"{number:05d}-{kind}-{name}").write_bytes(damaged)
    for path in _media(clips) if originals else []:
        shutil.copyfile(path, folder / _as_video(f"original-{path.relative_to(clips).as_posix().replace('/', '-')}"))
    return sorted(path.name for path in folder.iterdir())


def _media(clips: Path) -> list[Path]:
    return sorted(path for path in clips.rglob("*") if path.is_file() and path.suffix != ".json")


def _as_video(name: str) -> str:
    """With a suffix that the loader takes for a video: the content decides."""
    return name if Path(name).suffix in SUFFIXES["video"] else f"{name}.mp4"


def _seeds(clips: Path) -> list[tuple[str, bytes]]:
    """What is damaged: small files as they are, and a piece of each larger one, in several containers."""
    found = []
    for number, path in enumerate(_media(clips)):
        data = path.read_bytes()
        pixels = _pixels(data)
        if pixels > PIXELS:
            continue
        if len(data) <= SMALL:
            found.append((_as_video(path.name), data))
        else:
            suffix = ("mp4", "mkv", "mov", "avi", "ts")[number % 5]
            found.append((f"{path.stem}.{suffix}", piece(data, FORMATS.get(suffix, suffix))))
    return [(name, data) for name, data in found if len(data) > 1000]


def _pixels(data: bytes) -> int:
    try:
        with open_bytes(data) as container:
            context = container.streams.video[0].codec_context
            return context.width * context.height
    except (FFmpegError, IndexError):
        return 0


def piece(data: bytes, container: str) -> bytes:
    """The first second, copied; empty where that container does not take the codec."""
    out = io.BytesIO()
    try:
        with open_bytes(data) as source, av.open(out, "w", format=container) as target:
            stream = source.streams.video[0]
            copy = target.add_stream_from_template(stream)
            for packet in source.demux(stream):
                if packet.dts is None or packet.size == 0:
                    continue
                if packet.dts * packet.time_base > PIECE:
                    break
                packet.stream = copy
                target.mux(packet)
    except (FFmpegError, ValueError):
        return b""
    return out.getvalue()


Damage = Callable[[bytearray, bytes, np.random.Generator], bytes]


def _span(data: bytearray, generator: np.random.Generator, share: float = 0.2) -> slice:
    start = int(generator.integers(len(data)))
    return slice(start, start + 1 + int(generator.integers(max(1, int(share * len(data))))))


def _flip(data: bytearray, other: bytes, generator: np.random.Generator) -> bytes:
    for place in generator.integers(len(data), size=int(2 ** generator.uniform(0, 8))):
        data[place] = int(generator.integers(256))
    return bytes(data)


def _flip_head(data: bytearray, other: bytes, generator: np.random.Generator) -> bytes:
    for place in generator.integers(min(len(data), 2048), size=int(2 ** generator.uniform(0, 5))):
        data[place] ^= 1 << int(generator.integers(8))
    return bytes(data)


def _cut(data: bytearray, other: bytes, generator: np.random.Generator) -> bytes:
    return bytes(data[: int(generator.integers(len(data)))])


def _zeros(data: bytearray, other: bytes, generator: np.random.Generator) -> bytes:
    span = _span(data, generator)
    data[span] = bytes(len(data[span]))
    return bytes(data)


def _swap(data: bytearray, other: bytes, generator: np.random.Generator) -> bytes:
    size = int(generator.integers(1, max(2, len(data) // 4)))
    first, second = sorted(generator.integers(max(1, len(data) - size), size=2))
    data[first : first + size], data[second : second + size] = data[second : second + size], data[first : first + size]
    return bytes(data)


def _lose(data: bytearray, other: bytes, generator: np.random.Generator) -> bytes:
    del data[_span(data, generator)]
    return bytes(data)


def _box(data: bytearray, other: bytes, generator: np.random.Generator) -> bytes:
    """The size before a box's name, or the numbers after it."""
    places = [match.start() for name in BOXES for match in re.finditer(re.escape(name), bytes(data))]
    if not places:
        return _flip_head(data, other, generator)
    for _ in range(int(generator.integers(1, 4))):
        place = int(generator.choice(places))
        at = place - 4 if generator.random() < 0.3 else place + 4 * int(generator.integers(1, 12))
        large = bool(generator.integers(2))
        value = int(generator.integers(2**32)) if large else int(generator.integers(64))
        data[max(0, at) : max(0, at) + 4] = value.to_bytes(4, "big")
    return bytes(data)


def _offsets(data: bytearray, other: bytes, generator: np.random.Generator) -> bytes:
    """Every entry of the tables of offsets, sizes and times is multiplied or moved."""
    for match in re.finditer(rb"stco|stsz|stts|ctts|trun", bytes(data)):
        if generator.random() < 0.5:
            continue
        begin, end = match.end() + 8, min(len(data), match.end() + 8 + 4 * int(generator.integers(1, 64)))
        for at in range(begin, end - 3, 4):
            value = int.from_bytes(data[at : at + 4], "big") + int(generator.integers(-5000, 5000))
            data[at : at + 4] = (value % 2**32).to_bytes(4, "big")
    return bytes(data)


def _join(data: bytearray, other: bytes, generator: np.random.Generator) -> bytes:
    return bytes(data[: int(generator.integers(len(data) + 1))]) + other


def _tail(data: bytearray, other: bytes, generator: np.random.Generator) -> bytes:
    return bytes(data) + generator.bytes(int(generator.integers(1, 50_000)))


DAMAGE: dict[str, Damage] = {
    "flip": _flip,
    "head": _flip_head,
    "cut": _cut,
    "zeros": _zeros,
    "swap": _swap,
    "lose": _lose,
    "box": _box,
    "offsets": _offsets,
    "join": _join,
    "tail": _tail,
}


# -------------------------------------------------------------------------------------------------------- the passes


def load(folder: Path, names: Sequence[str], decoder: Backend, *, workers: int = 2, isolated: bool = False) -> Row:
    """One epoch of a media folder: every file is wanted once."""
    config = DataConfig(
        video=ModalityConfig(sources={"fuzz": SourceConfig(path=str(folder))}, clip=CLIP),
        decoder=decoder,
        decode_isolated=isolated,
        sample_timeout=PATIENCE,
        workers=workers,
        bad_attempts=200,  # more than half of the files are bad
    )
    row = Row(f"{decoder}, isolated" if isolated else decoder)
    loader = build_loader(config, seed=0, batch={"video": 1}, stop_step=len(names))
    with measuring(row, lambda: len(row.outcomes) > len(names) // 20):
        for item in loader:
            for sample in item["video"]:
                row.outcomes.update(_own(loader.dataset, sample))
    return row


def _own(dataset: ClipDataset, sample: Sample) -> dict[str, str]:
    """What became of the file that this place of the epoch belongs to."""
    place = dataset.plans["video"].locate(sample.ordinal)
    key = dataset._opened["video"].shards[0].row(place.index)["key"]
    if not sample.rejected:
        assert sample.key == key, f"ordinal {sample.ordinal} is {key}, {sample.key} came in silence"
        return {key: "decoded"}
    assert sample.rejected[0].key == key
    return {key: sample.rejected[0].reason}


def ingest_all(folder: Path, names: Sequence[str], scratch: Path, *, jobs: int = 2) -> Row:
    """All files into shards; small and fast ones, for the decoder is what is tried."""
    row = Row("ingest")
    options = IngestOptions(jobs=jobs, timeout=PATIENCE, short_side=64, preset="ultrafast", crf=40, fps=8)
    done = 0

    def progress(*_: object) -> None:
        nonlocal done
        done += 1

    with measuring(row, lambda: done > len(names) // 20):
        report = ingest([folder], scratch / "shards", options, progress=progress)
    indices = (scratch / "shards").glob("*.index.jsonl")
    kept = [json.loads(line)["source_path"] for path in indices for line in path.read_text().splitlines()]
    row.outcomes = dict.fromkeys(kept, "decoded")
    for note in report.notes:
        row.outcomes[note["path"]] = "in part" if note["status"].endswith("lost") else note["reason"]
    return row


@contextmanager
def measuring(row: Row, is_warm: Callable[[], bool]) -> Iterator[None]:
    """Fill in the row's time and the growth of the memory of this process and all below it."""
    began, over = time.monotonic(), threading.Event()
    sizes: list[int] = []

    def watch() -> None:
        while not over.wait(0.25):
            if is_warm():
                sizes.append(sum(map(_resident, _family(os.getpid()))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
    row.seconds = time.monotonic() - began
    quarter = max(1, len(sizes) // 4)
    row.growth = int(np.median(sizes[-quarter:]) - np.median(sizes[:quarter])) if sizes else 0
    row.peak = max(sizes, default=0)


def _family(pid: int) -> list[int]:
    found = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [one for child in path.read_text().split() for one in _family(int(child))]
        except OSError:
            continue
    return found


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # it has just ended
        return 0


def check(row: Row, names: Iterable[str]) -> None:
    """Every file is accounted for, once and by name."""
    missing, strange = set(names) - set(row.outcomes), set(row.outcomes) - set(names)
    assert not missing, f"{row.name}: {len(missing)} files were passed over in silence: {sorted(missing)[:5]}"
    assert not strange, f"{row.name}: unknown files {sorted(strange)[:5]}"
    unnamed = [name for name, outcome in row.outcomes.items() if not outcome.strip()]
    assert not unnamed, f"{row.name}: rejected without a reason: {unnamed[:5]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--files", type=int, default=2000, help="damaged files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decoders", default="torchcodec,pyav,decord")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--isolated", action="store_true", help="torchcodec and PyAV in processes of their own too")
    parser.add_argument("--reasons", type=Path, help="write every file's outcome into this JSON file")
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "files"
        names = make_files(options.clips, folder, files=options.files, seed=options.seed)
        print(HEADING, flush=True)
        for decoder in filter(None, options.decoders.split(",")):
            rows.append(load(folder, names, decoder, workers=options.workers, isolated=options.isolated))
            print(rows[-1], flush=True)
            check(rows[-1], names)
        rows.append(ingest_all(folder, names, Path(scratch), jobs=options.workers))
        print(rows[-1], flush=True)
        check(rows[-1], names)
    if options.reasons:
        options.reasons.write_text(json.dumps({row.name: row.outcomes for row in rows}, indent=1))


if __name__ == "__main__":
    main()
