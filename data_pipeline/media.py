"""What every decoder gives: the facts of a file, frames at given times, and one kind of error."""

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor  # ingest imports this module and does without torch

MAX_FPS = 240.0
_SOURCE_LINE = re.compile(r"(\[[\d:]+\]|\w+,) /\S+\.(cc|cpp):\d+[:,] ")  # "[17:52:50] /build/reader.cc:270: "
EARLIEST, LATEST = -10.0, 100_000.0  # an edit list starts a little below 0; MPEG-TS clocks wrap at 95 444 s


class DecodeError(ValueError):
    """A record cannot be decoded; the message is the reason, in one line."""


def one_line(error: Exception) -> str:
    """The exception's name and the first line of what it says, without C++ source lines; at most 200 characters."""
    lines = [line for line in _SOURCE_LINE.sub("", str(error)).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


@dataclass(frozen=True)
class MediaInfo:
    """Facts taken from the content, not from the header: frame count, frames per second, seconds, pixels, codec.

    Frame times lie in `[begin, end)`; width and height are as displayed (rotation applied).
    """

    frames: int
    fps: float
    begin: float
    end: float
    width: int
    height: int
    codec: str

    @property
    def duration(self) -> float:
        """Seconds from the first frame's start to the last frame's end."""
        return self.end - self.begin


class Decoder(Protocol):
    """A file that has been opened. Made afresh for each sample, never pickled, never shared."""

    info: MediaInfo

    def frames_at(self, times: np.ndarray) -> "Tensor":
        """The frames shown at `times` (seconds, `[T]`): uint8 `[T, C, H, W]`, RGB, stored as channels last.

        Times before the first frame give the first, times after the last give the last.
        """
        ...


def check_info(info: MediaInfo, max_pixels: int) -> MediaInfo:
    """The same facts, or DecodeError where they cannot be true or are too much."""
    if info.frames < 1:
        raise DecodeError("no frames")
    if not (math.isfinite(info.begin) and math.isfinite(info.end)):
        raise DecodeError(f"times are not finite: {info.begin} to {info.end} s")
    if not EARLIEST <= info.begin <= LATEST:
        raise DecodeError(f"starts at {info.begin:.6g} s: damaged time stamps")
    if info.end < info.begin:
        raise DecodeError(f"ends at {info.end:.3f} s, before its start at {info.begin:.3f} s")
    if info.frames > 2 and info.fps > MAX_FPS:  # the duration of one or two frames says little
        raise DecodeError(f"{info.fps:.6g} frames per second: damaged time stamps")
    if info.width < 1 or info.height < 1:
        raise DecodeError(f"frames of {info.width}x{info.height} pixels")
    if info.width * info.height > max_pixels:
        raise DecodeError(f"frames of {info.width}x{info.height} pixels: more than max_pixels={max_pixels}")
    return info
