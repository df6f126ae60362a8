"""What re-encoding is worth, and how fast the preparation tools are: `python -m tests.benchmarks.prepare_tools CLIPS`.

CLIPS is a folder of videos. Each row of the first table is an ingest of them with other options: size, and milliseconds
of CPU for a clip of 16 frames at 4 fps and 256 px out of it. The second table is the tools on the default shards. All
is CPU time of one process on one core, start-up not counted: other load on the machine moves it less than wall time.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from data_pipeline.config import ClipConfig
from data_pipeline.prepare.measure import measure
from data_pipeline.shards import Shards

OPTIONS = {
    "as they are (`--copy`, AVI written again)": ["--copy", "--max-seconds", "1000"],
    "default: 256 px, 30 fps, gop 30": [],
    "`--fps 15 --gop 15`": ["--fps", "15", "--gop", "15"],
    "`--fps 8 --gop 8`": ["--fps", "8", "--gop", "8"],
    "`--fps 4 --gop 4`": ["--fps", "4", "--gop", "4"],
}
TOOLS = ("filter", "dedup", "verify")


def cpu_seconds(*command: str) -> float:
    """Run a tool and wait for it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = [sys.executable, "-m", f"data_pipeline.prepare.{command[0]}", *command[1:]]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def re_encoding(clips: Path, work: Path, count: int) -> None:
    """The first table; leaves the default shards in `work`/1."""
    print("| ingest | MB | ms of CPU a clip | clips/s and core | CPU s to ingest | videos/s and core |")
    print("|---|---|---|---|---|---|")
    start_up = cpu_seconds("ingest", "--help")
    for number, (name, options) in enumerate(OPTIONS.items()):
        out = work / str(number)
        spent = cpu_seconds("ingest", str(clips), "--out", str(out), "--jobs", "1", "--quiet", *options) - start_up
        files = len({row["source_path"] for row in map(Shards(out, "video").row, range(len(Shards(out, "video"))))})
        found = measure(str(out), modality="video", clip=ClipConfig(), decoder="auto", clips=count)
        print(
            f"| {name} | {Shards(out, 'video').total_bytes / 1e6:.1f} | {found['ms']:.1f} | "
            f"{found['clips_per_second']:.1f} | {spent:.1f} | {files / spent:.2f} |",
            flush=True,
        )


def tools(shards: Path, work: Path) -> None:
    """The second table."""
    opened = Shards(shards, "video")
    seconds = sum(opened.row(i)["duration"] for i in range(len(opened)))
    print(f"\n{len(opened)} records of {seconds / len(opened):.1f} s\n\n| tool | CPU s | records/s and core |")
    print("|---|---|---|")
    for name in TOOLS:
        start_up = cpu_seconds(name, "--help")
        spent = cpu_seconds(name, str(shards), "--out", str(work / name), "--jobs", "1", "--quiet") - start_up
        print(f"| {name} | {spent:.1f} | {len(opened) / spent:.1f} |", flush=True)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.prepare_tools", description=__doc__)
    parser.add_argument("clips", type=Path, help="folder of videos")
    parser.add_argument("--count", type=int, default=150, help="clips loaded of each set")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        re_encoding(parsed.clips, Path(work), parsed.count)
        tools(Path(work, "1"), Path(work))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
