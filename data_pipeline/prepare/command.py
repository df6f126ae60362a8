"""What the command lines of the preparation tools have in common: arguments, progress, errors, exit status."""

import argparse
import os
import sys
import time
from collections.abc import Callable

from data_pipeline.prepare.slices import Slice

_INTERRUPTED = 130  # as a shell says of a command that Ctrl-C ended


def add_common(parser: argparse.ArgumentParser, *, timeout: float) -> None:
    """`--jobs`, `--shard`, `--timeout` and `--quiet`."""
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, help="processes; the default is all cores")
    parser.add_argument(
        "--shard",
        dest="part",
        type=_slice,
        default=Slice(),
        metavar="I/N",
        help="do part I of N (0/8 to 7/8), as one task of a cluster's array; the last to end joins the parts",
    )
    parser.add_argument("--timeout", type=float, default=timeout, help="seconds after which one file is given up")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _slice(text: str) -> Slice:
    try:
        return Slice.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(
    parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], int], arguments: list[str] | None
) -> int:
    """Parse, run, and turn what people can put right into one line and status 1 (Ctrl-C: 130)."""
    try:
        parsed = parser.parse_args(arguments)
        if parsed.jobs < 1:
            raise ValueError(f"--jobs {parsed.jobs}: must be at least 1")
        if parsed.timeout <= 0:
            raise ValueError(f"--timeout {parsed.timeout:g}: must be positive (seconds)")
        return command(parsed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED


class Progress:
    """How far a tool is, on stderr: rewritten in place on a terminal, else a line now and then."""

    def __init__(self, things: str, quiet: bool):
        self._things, self._quiet = things, quiet
        self._terminal = sys.stderr.isatty()
        self._every = 0.5 if self._terminal else 30.0  # seconds
        self._began = self._said = time.monotonic()
        self._done = self._bad = 0

    def step(self, total: int, *, bad: bool = False) -> None:
        """One more of `total` is done."""
        self._done += 1
        self._bad += bad
        now = time.monotonic()
        if not self._quiet and now - self._said >= self._every:
            self._said = now
            rate = self._done / (now - self._began)
            left = (total - self._done) / rate
            words = (
                f"{self._done} of {total} {self._things}, {self._bad} of them bad, {rate:.1f}/s, "
                f"{left / 60:.0f} min to go"
            )
            print(f"\r{words}\x1b[K" if self._terminal else words, end="" if self._terminal else "\n", file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        """Leave the terminal's line clean."""
        if self._terminal and not self._quiet:
            print("\r\x1b[K", end="", file=sys.stderr)
