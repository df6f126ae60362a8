"""From the end of imports to the first batch on a very large set: `python -m tests.benchmarks.start_up CLIPS`.

CLIPS is a folder of videos (or some files); they are ingested with the default options. Around their records a set of
`--samples` samples is written, 1000 to a shard. Real: the manifest, the index files (about 400 bytes a row, all rows
right), and the media wherever the first batches touch the tars, which the plan tells beforehand. Simulated: the rest of
the tars are holes in sparse files of the right size, and the records repeat. Above 10 million samples only the shards
that are touched (or looked at when the set is opened) are there; the manifest is whole in any case.

Every run is a process of its own; before it, the set is thrown out of the page cache. Micro-batches of 24 clips of 16
frames, 256 px. The decoder's library is among the imports. With nginx at hand the same over HTTP from loopback.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import ClipConfig, DataConfig, ModalityConfig, SourceConfig
from data_pipeline.decode import choose_backend
from data_pipeline.folders import LocalFolder
from data_pipeline.loader import build_loader
from data_pipeline.plan import Plan, Source
from data_pipeline.prepare.ingest import IngestOptions, ingest
from data_pipeline.remote import RemoteFolder
from data_pipeline.sample import Sample
from data_pipeline.shards import Shards
from tests.benchmarks.children import age, children, pss
from tests.data_pipeline.servers import find_nginx, nginx

ROWS = 1000  # of a shard
BATCH, PREFETCH = 24, 2
WHOLE = 10_000_000  # samples up to which every shard is written
NAME = "shards"  # of the source: part of the order's seed


def main() -> int:
    """The command line; `--measure` is the process that is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, nargs="*", help="videos, or folders of them")
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(options.measure, options.workers)))
        return 0
    with tempfile.TemporaryDirectory() as work:
        folder, scratch = Path(work, "set"), Path(work, "nginx")
        batches = options.workers * PREFETCH + options.workers  # asked for before and while the first is taken
        write_set(folder, records(options.clips, Path(work, "real")), options.samples // ROWS, batches)
        scratch.mkdir()
        report("local, cold", [in_own_process(str(folder), folder, options) for _ in range(options.rounds)])
        if find_nginx():
            with nginx(folder.parent, scratch) as url:
                report("HTTP, cold", [in_own_process(f"{url}/set", folder, options) for _ in range(options.rounds)])
    return 0


def measured(path: str, workers: int) -> dict[str, float]:
    """Open, start, take the first batch; then read an index of every 10th shard, for what each costs."""
    choose_backend("torchcodec")
    before, began = pss(os.getpid()), time.perf_counter()
    part = ModalityConfig({NAME: SourceConfig(path)}, ClipConfig(frames=16, fps=4.0, size=256))
    config = DataConfig(video=part, workers=workers, prefetch=PREFETCH)
    loader = build_loader(config, seed=0, batch={"video": BATCH}, collate=came)
    opened, after = time.perf_counter(), pss(os.getpid())
    plan = loader.dataset.plans["video"]
    for ordinal in range(BATCH):
        plan.locate(ordinal)
    planned = time.perf_counter()
    items = iter(loader)
    first = next(items)["video"]
    done = time.perf_counter()
    assert [sample.ordinal for sample in first["samples"]] == list(range(BATCH))
    assert not any(sample.rejected for sample in first["samples"])
    found = {
        "seconds to the first batch": done - began,
        "of that: open": opened - began,
        "plan (24 ordinals)": planned - opened,
        "start the worker": first["started"] - planned,
        "read, decode, hand over": done - first["started"],
        "(CPU of the worker until then)": first["cpu"],
        "MB of the opened set": (after - before) / 1e6,
        "MB of a worker (PSS)": float(np.mean([pss(each) for each in children()])) / 1e6,
    }
    items.close()  # pyright: ignore[reportAttributeAccessIssue]
    return found | indices(path)


def came(samples: list[Sample]) -> dict[str, Any]:
    """The samples, when the worker's process began, and what CPU time it has taken."""
    return {"samples": samples, "started": time.perf_counter() - age(os.getpid()), "cpu": time.process_time()}


def indices(path: str) -> dict[str, float]:
    """Milliseconds and bytes of this process that the index of a shard costs when it is first wanted."""
    opened = Shards(path, "video")
    if len(opened) > WHOLE:
        return {}
    shards = range(0, len(opened) // ROWS, 10)
    before, began = pss(os.getpid()), time.perf_counter()
    for shard in shards:
        opened.row(shard * ROWS)
    spent = time.perf_counter() - began
    again = time.perf_counter()
    for shard in shards:
        opened.row(shard * ROWS + 1)
    return {
        "ms for a shard's index, first time": 1000 * spent / len(shards),
        "ms for a row of a shard seen before": 1000 * (time.perf_counter() - again) / len(shards),
        "bytes of memory a shard's index leaves": (pss(os.getpid()) - before) / len(shards),
    }


def records(clips: list[Path], folder: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The real records: media and index row."""
    ingest(clips, folder, IngestOptions(min_seconds=4.0))
    opened = Shards(folder, "video")
    return [opened.read(i) for i in range(len(opened)) if opened.row(i)["duration"] >= 4]


def write_set(folder: Path, real: list[tuple[bytes, dict[str, Any]]], shards: int, batches: int) -> None:
    """A shard folder of `shards` x ROWS samples, real where it will be read."""
    folder.mkdir()
    rows, tar_bytes = layout(real)
    plan = Plan(0, [Source(NAME, shards * ROWS)])
    wanted = [plan.locate(ordinal).index for ordinal in range(BATCH * batches)]
    touched = {index // ROWS for index in wanted}
    for kind in (LocalFolder, RemoteFolder):  # looked at when the set is opened
        touched.update(np.linspace(0, shards - 1, kind.checked_at_opening).round().astype(int).tolist())
    written = range(shards) if shards * ROWS <= WHOLE else sorted(touched)
    sums = {shard: write_index(folder / f"video-{shard:06d}.index.jsonl", rows, shard) for shard in written}
    for shard in written:
        with (folder / f"video-{shard:06d}.tar").open("wb") as file:
            file.truncate(tar_bytes)
    for index in wanted:
        shard, number = divmod(index, ROWS)
        with (folder / f"video-{shard:06d}.tar").open("r+b") as file:
            file.seek(rows[number]["offset"])
            file.write(real[number % len(real)][0])
    with (folder / "manifest.json").open("w") as file:
        json.dump({"schema": 1, "shards": list(entries(sums, shards, tar_bytes))}, file)
    print(f"{shards * ROWS} samples in {shards} shards, tars of {tar_bytes / 1e6:.0f} MB, {len(sums)} indices written,")
    print(f"manifest {(folder / 'manifest.json').stat().st_size / 1e6:.1f} MB; {len(real)} different real records")


def layout(real: list[tuple[bytes, dict[str, Any]]]) -> tuple[list[dict[str, Any]], int]:
    """The rows of a shard, with the places that a tar would give them, and the tar's size."""
    rows, place = [], 0
    for number in range(ROWS):
        data, row = real[number % len(real)]
        rows.append({name: value for name, value in row.items() if name != "shard"} | {"offset": place + 512})
        place += 512 + -(-len(data) // 512) * 512 + 1024  # and the member with the metadata
    return rows, place + 1024


def write_index(path: Path, rows: list[dict[str, Any]], shard: int) -> str:
    """An index with keys of its own; its sum."""
    lines = (json.dumps(row | {"key": f"clip-{shard:06d}-{number:04d}"}) for number, row in enumerate(rows))
    content = ("\n".join(lines) + "\n").encode()
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def entries(sums: dict[int, str], shards: int, tar_bytes: int) -> Iterator[dict[str, Any]]:
    for shard in range(shards):
        name, made_up = f"video-{shard:06d}", hashlib.sha256(str(shard).encode()).hexdigest()
        entry = {"name": f"{name}.tar", "index": f"{name}.index.jsonl", "modality": "video", "samples": ROWS}
        yield entry | {"bytes": tar_bytes, "index_sha256": sums.get(shard, made_up)}


def in_own_process(path: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """A run in a fresh process, after the set has left the page cache."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, "-m", "tests.benchmarks.start_up", "--measure", path]
    command += ["--workers", str(options.workers)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def report(way: str, runs: list[dict[str, float]]) -> None:
    """Medians, and the slowest start."""
    print(f"\n| {way} | median of {len(runs)} | largest |\n|---|---|---|")
    for name in runs[0]:
        values = [run[name] for run in runs]
        print(f"| {name} | {statistics.median(values):.4g} | {max(values):.4g} |", flush=True)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    raise SystemExit(main())
