"""What is in these shards, and how far do they carry? `python -m data_pipeline.prepare.inspect SHARDS`.

Counts, hours and histograms from the index, the loader's speed measured on a few clips with all cores busy, and for a
recipe's batch and steps: how many epochs that is, and how many cores keep up with it.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.pool import Lost, in_order
from data_pipeline.prepare.command import Progress, add_common, run
from data_pipeline.prepare.measure import add_clip, clip_of, measure
from data_pipeline.prepare.records import count_records, stored_records
from data_pipeline.prepare.stats import Stats
from data_pipeline.shards import modalities


def statistics(shards: Path, parsed: argparse.Namespace) -> dict[str, Stats]:
    """Of each modality, counted over the index rows of this part."""
    total, progress = count_records(shards, parsed.part), Progress("records", parsed.quiet)
    found = {modality: Stats() for modality in modalities(shards)}
    for stored in stored_records(shards, parsed.part):
        found[stored.modality].add(stored.row)
        progress.step(total)
    progress.close()
    return found


def speed(shards: Path, modality: str, parsed: argparse.Namespace) -> dict[str, Any]:
    """Clips per second of one core, by its CPU time, and of all `jobs` processes at once, by the clock."""
    work = partial(_measure_from, shards=shards, modality=modality, parsed=parsed)
    firsts = [worker * parsed.clips for worker in range(parsed.jobs)]
    runs = [found for _, found in in_order(work, firsts, jobs=parsed.jobs, timeout=parsed.timeout)]
    lost = [found.reason for found in runs if isinstance(found, Lost)]
    if lost:
        raise ValueError(f"{shards}: the speed could not be measured: {lost[0]}")
    sound = [found for found in runs if not isinstance(found, Lost)]
    return {
        "ms": sum(found["ms"] for found in sound) / len(sound),
        "clips_per_second_and_core": 1000 * len(sound) / sum(found["ms"] for found in sound),
        "clips_per_second": sum(1000 / found["wall_ms"] for found in sound),
        "processes": len(sound),
    }


def _measure_from(first: int, shards: Path, modality: str, parsed: argparse.Namespace) -> dict[str, float]:
    clip = clip_of(parsed, modality)
    return measure(str(shards), modality=modality, clip=clip, decoder=parsed.decoder, clips=parsed.clips, first=first)


def forecast(stats: Stats, clips_per_second_and_core: float, parsed: argparse.Namespace) -> dict[str, float]:
    """What `--batch` x `--steps` means for these records."""
    samples = parsed.batch * parsed.steps
    found = {
        "samples": samples,
        "epochs": samples / max(1, stats.records),
        "core_hours": samples / clips_per_second_and_core / 3600,
    }
    if stats.seconds:
        found["hours_of_video"] = samples * parsed.frames / parsed.fps / 3600
    if parsed.step_seconds:
        found["hours"] = parsed.steps * parsed.step_seconds / 3600
        found["cores"] = parsed.batch / parsed.step_seconds / clips_per_second_and_core
    return found


def in_words(found: dict[str, float]) -> str:
    """A forecast as a line."""
    words = f"{found['samples']:.0f} samples, {found['epochs']:.2f} epochs"
    if "hours_of_video" in found:
        words += f", {found['hours_of_video']:.0f} hours of video seen"
    words += f"; loading takes {found['core_hours']:.1f} core hours"
    if "cores" in found:
        words += f", {found['cores']:.1f} cores to keep up with {found['hours']:.1f} hours of training"
    return words


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run(_parser(), _inspect, arguments)


def _inspect(parsed: argparse.Namespace) -> int:
    if parsed.clips < 1 or parsed.batch < 0 or parsed.steps < 0 or parsed.step_seconds < 0:
        raise ValueError("--clips must be at least 1; --batch, --steps and --step-seconds must not be negative")
    shards, result = Path(parsed.shards), {}
    for modality, stats in statistics(shards, parsed).items():
        result[modality] = {"statistics": stats.as_dict()}
        print(f"{modality}: " + "\n  ".join(stats.lines()))
        if parsed.no_speed or not stats.records:
            continue
        found = result[modality]["speed"] = speed(shards, modality, parsed)
        print(
            f"  {found['ms']:.1f} ms of CPU a clip: {found['clips_per_second_and_core']:.1f} clips/s and core; "
            f"{found['clips_per_second']:.1f} clips/s from {found['processes']} processes on this machine as it is now"
        )
        if parsed.batch and parsed.steps:
            ahead = forecast(stats, found["clips_per_second_and_core"], parsed)
            result[modality]["forecast"] = ahead
            print(f"  batch {parsed.batch} x {parsed.steps} steps: {in_words(ahead)}")
    if parsed.json:
        Path(parsed.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.prepare.inspect",
        description="Counts, histograms, predicted clips per second, and epochs of a recipe.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("shards", help="shard folder")
    parser.add_argument("--clips", type=int, default=20, help="clips that each process loads to measure the speed")
    parser.add_argument("--no-speed", action="store_true", help="read the index only, decode nothing")
    add_clip(parser)
    parser.add_argument("--batch", type=int, default=0, help="the recipe's global batch of each modality")
    parser.add_argument("--steps", type=int, default=0, help="the recipe's steps")
    parser.add_argument("--step-seconds", type=float, default=0.0, help="seconds of a training step, if known")
    parser.add_argument("--json", help="file for the same numbers")
    add_common(parser, timeout=600.0)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
