"""A data preparation tool over its slices as an array: python launch/submit.py prepare TOOL --slices N -- ARGUMENTS"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

from launch.cluster_profile import add_profile_arguments
from launch.destination import Site, choose_site
from launch.job_array import ArrayJobs, PlannedArray
from launch.scheduler import SchedulerError
from launch.slurm_chain import Submission, processors
from vjepa.config import ConfigError

TOOLS: Mapping[str, str] = {
    "ingest": "videos and images to shards",
    "dedup": "near-duplicates left out",
    "filter": "records left out by what they measure",
}


def prepare(words: Sequence[str]) -> int:
    """A data preparation tool over its slices, as an array."""
    cut = list(words).index("--") if "--" in words else len(words)
    asked, rest = parser().parse_args(words[:cut]), words[cut + 1 :]
    try:
        return _run(asked, rest)
    except (ValueError, OSError, SchedulerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python launch/submit.py prepare", description=prepare.__doc__)
    found.add_argument("tool", metavar="TOOL", help="; ".join(f"{name}: {text}" for name, text in TOOLS.items()))
    found.add_argument("--slices", type=int, required=True, metavar="N", help="parts, each an element of the array")
    found.add_argument("--jobs", type=int, metavar="N", help="elements at a time (default: all)")
    found.add_argument("--cluster", choices=("slurm",), default="slurm", help="where to run")
    found.add_argument("--dry-run", action="store_true", help="print the job scripts that would be submitted, and stop")
    add_profile_arguments(found)
    return found


def _run(asked: argparse.Namespace, rest: Sequence[str]) -> int:
    out = check_tool(asked.tool, rest, asked.slices)
    site, at_once = choose_site(asked), asked.jobs or asked.slices
    begin = Submission.plan if asked.dry_run else Submission.begin
    submission = begin(out, site.profile, site.profile_name)
    planned = plan_slices(asked.tool, rest, asked.slices, submission, site, at_once=at_once)
    if asked.dry_run:
        return planned.dry_run()
    array, last = planned.submit()
    print(f"job {array}: {asked.tool} in {asked.slices} parts, {at_once} at a time")
    print(f"job {last}: joins them in {out}")
    print(f"what is going on: python launch/submit.py status {out}")
    return 0


def plan_slices(
    tool: str, arguments: Sequence[str], count: int, submission: Submission, site: Site, *, at_once: int
) -> ArrayJobs:
    """A preparation tool over `count` parts as an array, and a job that joins them."""
    share = site.profile.tools
    base = [sys.executable, "-m", f"data_pipeline.prepare.{tool}", *arguments]
    if not any(word.startswith("--jobs") for word in arguments):
        base.append(f"--jobs={processors(site.profile.of_one_process(share))}")
    commands = [[*base, "--quiet", f"--shard={index}/{count}"] for index in range(count)]
    names = [f"{tool}-{index:03d}-of-{count:03d}" for index in range(count)]
    parts = [
        submission.plain_command(tool, name, share, [command]) for name, command in zip(names, commands, strict=True)
    ]
    # The part that ends last joins them, unless two ended together or on a file system that shows things late.
    join = submission.plain_command(tool, "join", share, commands[:1])
    return ArrayJobs(PlannedArray(tool, parts, range(count), at_once), join, "afterok")


def check_tool(tool: str, arguments: Sequence[str], count: int) -> Path:
    """Refuse what the tool itself would refuse in every job; where its output goes."""
    if tool not in TOOLS:
        raise ConfigError(f"prepare {tool}: tools that work in parts are {', '.join(TOOLS)}")
    if count < 2:
        raise ConfigError(f"--slices {count} must be at least 2: run python -m data_pipeline.prepare.{tool} for one")
    tool_parser = import_module(f"data_pipeline.prepare.{tool}")._parser()  # what it is given is read by itself
    try:
        parsed = tool_parser.parse_args([*arguments, f"--shard=0/{count}"])
    except SystemExit:
        raise ConfigError(f"prepare {tool}: its arguments are not right, see above") from None
    return Path(parsed.out)
