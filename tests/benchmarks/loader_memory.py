"""Does a loader's memory stay flat? `python -m tests.benchmarks.loader_memory SHARDS [--clips 10000]`.

SHARDS is a shard folder; a copy of it is made in which every 10th record is damaged: in half of these a bit is flipped
(found by its sha256), the others end in zeros with a right sum (found by the decoder). 4 workers, 16 frames at 4 fps.
After every micro-batch the PSS of the training process and of all its children is added up; a window is 500 clips. What
is compared is the median of the window around clip 1000 and of the last one: the goal is less than 2 % more.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from data_pipeline.config import ClipConfig, DataConfig, ModalityConfig, SourceConfig
from data_pipeline.loader import build_loader
from data_pipeline.shards import Shards
from tests.benchmarks.children import children, pss

BATCH, WINDOW, EARLY = 10, 500, 1000  # clips


def main() -> int:
    """The command line; the exit status is 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--clips", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--decoder", default="auto", help="as in data.decoder")
    options = parser.parse_args()
    if options.clips < EARLY + WINDOW:
        raise SystemExit(f"--clips {options.clips}: at least {EARLY + WINDOW}")
    with tempfile.TemporaryDirectory() as work:
        folder = damaged(options.shards, Path(work, "shards"))
        samples, bad = loaded(folder, options)
    early = window(samples, EARLY - WINDOW // 2)
    print("| clips | PSS of all, MB (median of 500 clips) | against clip 1000 |\n|---|---|---|")
    for first in [*range(0, options.clips - WINDOW, max(WINDOW, options.clips // 10)), options.clips - WINDOW]:
        here = window(samples, first)
        print(f"| {first} to {first + WINDOW} | {here / 1e6:.1f} | {here / early - 1:+.2%} |")
    growth = window(samples, options.clips - WINDOW) / early - 1
    print(f"{options.decoder}: {growth:+.2%} between clip {EARLY} and clip {options.clips}; {bad} records replaced")
    return int(growth >= 0.02)


def loaded(folder: Path, options: argparse.Namespace) -> tuple[list[tuple[int, int]], int]:
    """After each micro-batch: clips so far, and bytes of this process and its children; and bad records met."""
    part = ModalityConfig({"shards": SourceConfig(str(folder))}, ClipConfig(frames=16, fps=4.0, size=options.size))
    config = DataConfig(video=part, workers=4, decoder=options.decoder)
    found, bad, began = [], 0, time.monotonic()
    for item in build_loader(config, seed=0, batch={"video": BATCH}, stop_step=options.clips // BATCH):
        bad += sum(len(sample.rejected) for sample in item["video"])
        found.append((BATCH * (len(found) + 1), pss(os.getpid()) + sum(map(pss, children()))))
        if len(found) % 100 == 0:
            print(f"{found[-1][0]} clips, {found[-1][1] / 1e6:.0f} MB, {time.monotonic() - began:.0f} s", flush=True)
    return found, bad


def window(samples: list[tuple[int, int]], first: int) -> float:
    """The median of a window, in bytes."""
    return statistics.median(size for clips, size in samples if first <= clips < first + WINDOW)


def damaged(shards: Path, folder: Path) -> Path:
    """A copy of a folder of video shards, every 10th record of it bad."""
    shutil.copytree(shards, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    opened, number = Shards(shards, "video"), 0
    for entry in manifest["shards"]:
        index = folder / entry["index"]
        rows = [json.loads(line) for line in index.read_text().splitlines()]
        with (folder / entry["name"]).open("r+b") as tar:
            for row in rows if entry["modality"] == "video" else []:
                if number % 10 == 0:
                    data = opened.read(number)[0]
                    broken = (
                        flipped(data) if number % 20 else data[: len(data) // 3] + bytes(len(data) - len(data) // 3)
                    )
                    tar.seek(row["offset"])
                    tar.write(broken)
                    row["sha256"] = row["sha256"] if number % 20 else hashlib.sha256(broken).hexdigest()
                number += 1
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        index.write_bytes(content)
        entry["index_sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def flipped(data: bytes) -> bytes:
    """With one bit changed."""
    return data[:-1] + bytes([data[-1] ^ 1])


if __name__ == "__main__":
    raise SystemExit(main())
