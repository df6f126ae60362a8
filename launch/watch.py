"""Looking after a run: what is going on, its log, its end, going on with it.

python launch/submit.py status RUN [--watch] [--json]
python launch/submit.py logs RUN [--follow] [--rank N] [--stage NAME]
python launch/submit.py cancel RUN
python launch/submit.py resume RUN
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launch import scheduler
from launch.job_order import read_jobs
from launch.job_words import duration
from launch.log_files import follow, newest_log, print_log
from launch.resubmit import resume
from launch.run_progress import is_held
from launch.scheduler import NoAnswerError, SchedulerError
from launch.status import RunStatus, StageStatus, live_jobs, read_status

LOOK_EVERY_S = 5.0
GOOD, BAD = ("COMPLETED", "RUNNING", "finished", "running"), ("FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL")


# ------------------------------------------------------------------------------------------------------------- status


def status(options: argparse.Namespace) -> int:
    """Print once; with --watch on a terminal, again and again until nothing of the run is alive."""
    if options.json:
        found = read_status(options.run)
        print(json.dumps(asdict(found) | {"root": str(found.root), "is_live": found.is_live}, indent=2))
        return 0
    console = Console()
    if not options.watch:
        show(read_status(options.run), console)
    elif console.is_terminal:
        _live(options.run, console)
    else:
        _plain(options.run, console)
    return 0


def _live(root: Path, console: Console) -> None:
    found = None
    with Live(console=console, auto_refresh=False) as live:
        while True:
            found = _look(root, found)
            live.update(Group(table(found), *(Text(line) for line in remarks(found))), refresh=True)
            if not found.is_live:
                return
            time.sleep(LOOK_EVERY_S)


def _plain(root: Path, console: Console) -> None:
    """A block whenever anything but the time to go has changed."""
    found = before = None
    while True:
        found = _look(root, found)
        stages = [(stage.state, stage.progress.step, stage.restarts, stage.notes) for stage in found.stages]
        now = (stages, found.notes)
        if now != before:
            show(found, console)
        if not found.is_live:
            return
        before = now
        time.sleep(LOOK_EVERY_S)


def _look(root: Path, before: RunStatus | None) -> RunStatus:
    """What is going on now, or was at the last look where SLURM does not answer; at the first that is an error."""
    try:
        return read_status(root)
    except NoAnswerError as error:
        if before is None:
            raise
        return replace(before, notes=[f"as it was a moment ago: {error}"])


def show(found: RunStatus, console: Console) -> None:
    """The table, wider than a narrow terminal rather than cut short, and what there is to say."""
    shown = table(found)
    unbounded = console.options.update(max_width=1000)
    console.width = max(console.width, console.measure(shown, options=unbounded).maximum)
    console.print(shown)
    for line in remarks(found):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def table(found: RunStatus) -> Table:
    """A line for each stage."""
    on_slurm = any(stage.job for stage in found.stages)
    shown = Table(title=str(found.root), box=SIMPLE_HEAD, title_justify="left")
    for name in ("stage", *(("job",) if on_slurm else ()), "state"):
        shown.add_column(name, no_wrap=True)
    for name in ("step", "loss", "s/step", "to go", *(("restarts", "GPU-hours", "CPU-hours") if on_slurm else ())):
        shown.add_column(name, justify="right", no_wrap=True)
    for stage in found.stages:
        style = "green" if stage.state in GOOD else "red" if stage.state in BAD else "yellow"
        cells = [stage.stage, *((stage.job or "",) if on_slurm else ()), Text(stage.state, style=style)]
        used = (str(stage.restarts), f"{stage.gpu_hours:.2f}", f"{stage.cpu_hours:.2f}") if on_slurm else ()
        shown.add_row(*cells, *_progress_cells(stage), *used)
    return shown


def _progress_cells(stage: StageStatus) -> list[str]:
    progress = stage.progress
    if progress.steps is None:
        return ["", "", "", ""]
    left = progress.seconds_left
    is_over = progress.step >= progress.steps
    return [
        f"{progress.step}/{progress.steps}",
        "" if progress.loss is None else f"{progress.loss:.4f}",
        "" if progress.step_seconds is None else f"{progress.step_seconds:.3g}",
        "" if left is None or is_over else duration(left),
    ]


def remarks(found: RunStatus) -> list[str]:
    """What is said below the table, each line under its stage's name."""
    lines = [f"  {stage.stage}: {note}" for stage in found.stages for note in stage.notes]
    lines += [f"  {stage.stage}: ALARM {text}" for stage in found.stages for text in stage.progress.alarms]
    return lines + [f"  {note}" for note in found.notes]


# ---------------------------------------------------------------------------------------------------- logs and cancel


def logs(options: argparse.Namespace) -> int:
    """The newest log of a rank; with --follow also what is added to it, over restarts, until the run is over."""
    if not options.follow:
        path = newest_log(options.run, options.rank, options.stage)
        if path is None:
            print(f"error: there is no log of rank {options.rank} in {options.run} yet", file=sys.stderr)
            return 1
        print_log(path)
        return 0
    follow(options.run, options.rank, options.stage, is_live=lambda: _is_live(options.run))
    return 0


def _is_live(root: Path) -> bool:
    if read_jobs(root):
        try:
            return bool(live_jobs(root))
        except NoAnswerError:  # the log goes on without the controller
            return True
    return any(is_held(path.parent) is not None for path in (root / ".lock", *root.glob("*/.lock")))


def cancel(options: argparse.Namespace) -> int:
    """Cancel all jobs of the run that are not over, and name them."""
    jobs = {row["job"]: row["stage"] for row in read_jobs(options.run)}
    if not jobs:
        holder = is_held(options.run)
        where = f": {holder}. Ctrl-C where it was started, or kill -TERM" if holder else ", and it does not run"
        print(f"error: {options.run} has no jobs on a cluster{where}", file=sys.stderr)
        return 1
    alive = live_jobs(options.run)
    if not alive:
        print(f"nothing of {options.run} is queued or runs")
        return 0
    numbers = dict.fromkeys(state.job.partition("_")[0] for state in alive)
    scheduler.cancel([*reversed(numbers)])  # the last stage first: none may start because the one before it ended
    for job in numbers:
        states = sorted({state.state for state in alive if state.job.partition("_")[0] == job})
        print(f"cancelled job {job} ({jobs[job]}), which was {', '.join(states)}")
    print(f"checkpoints stay; go on with: python launch/submit.py resume {options.run}")
    return 0


# ------------------------------------------------------------------------------------------------------------- command


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    action: Callable[[argparse.Namespace], int] = options.action
    try:
        return action(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    except (ValueError, OSError, SchedulerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python launch/submit.py", description=(__doc__ or "").splitlines()[0])
    commands = found.add_subparsers(required=True, metavar="status | logs | cancel | resume")
    for action in (status, logs, cancel, _resume):
        name = action.__name__.lstrip("_")
        words = (action.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=words, description=words)
        command.add_argument("run", type=Path, metavar="RUN", help="directory of a run, a chain, a sweep or shards")
        command.set_defaults(action=action)
        if action is status:
            command.add_argument("--watch", action="store_true", help="look again and again until all is over")
            command.add_argument("--json", action="store_true", help="for programs")
        if action is logs:
            command.add_argument("--follow", "-f", action="store_true", help="go on until the run is over")
            command.add_argument("--rank", type=int, default=0, help="default: 0")
            command.add_argument("--stage", help="default: the one that wrote last")
    return found


def _resume(options: argparse.Namespace) -> int:
    """Submit again what is not finished: the same code, configuration and request."""
    for line in resume(options.run):
        print(line)
    return 0
