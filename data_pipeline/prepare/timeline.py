"""When a video's frames are shown, and on which even grid of times it is written again."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.stream import VideoStream

from data_pipeline.media import DecodeError

_COMMON = [Fraction(24000, 1001), Fraction(30000, 1001), Fraction(60000, 1001)]
_MAX_GAP = 60.0  # seconds without a new frame; a longer one is taken for damaged time stamps
_TOLERANCE = 0.25  # of a grid step: rounded time stamps must not repeat one frame and drop the next
_LOST_SHARE = 0.1  # of the packets that gave no frame, above which the file counts as damaged


@dataclass(frozen=True)
class Timeline:
    """What the packets say, before anything is decoded."""

    packets: int
    duration: float
    """Seconds from the first to the end of the last frame."""
    rate: Fraction
    """Frames per second of the source (of its faster parts, where it varies)."""


def scan(container: InputContainer, stream: VideoStream) -> Timeline:
    """Read all packets' times without decoding; DecodeError where there is nothing to go by."""
    base = stream.time_base
    stamps: list[int] = []
    latest, length, packets = None, 0, 0  # length: of the frame shown last
    for packet in _packets(container, stream):
        packets += 1
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is not None:
            stamps.append(stamp)
            if latest is None or stamp > latest:
                latest, length = stamp, packet.duration or 0
    if base is None or not stamps:
        raise DecodeError("no frames" if not packets else "no time stamps")
    times = np.unique(np.array(stamps, np.int64)).astype(np.float64) * base.numerator / base.denominator
    rate = _rate(np.diff(times), stream.average_rate)
    last = length * float(base) if length else float(1 / rate)
    return Timeline(packets, float(times[-1] - times[0]) + min(last, _MAX_GAP), rate)


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """The stream's packets up to its end or to the first damage (which the decoding pass will report)."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except (FFmpegError, EOFError):
            return
        if packet is None:
            return
        if packet.size and not packet.is_discard:
            yield packet


def _rate(gaps: np.ndarray, header: Fraction | None) -> Fraction:
    """Frames per second from the gaps between frames: their mean where they are even, else of the shorter ones."""
    if len(gaps) == 0:
        return header if header and 1 <= header <= 240 else Fraction(25)
    middle = float(np.median(gaps))
    even = np.mean(np.abs(gaps - middle) <= max(0.1 * middle, 0.0021)) > 0.95  # Matroska rounds to milliseconds
    gap = float(np.mean(gaps[np.abs(gaps - middle) <= 0.0021])) if even else float(np.percentile(gaps, 10))
    rate = Fraction(1 / gap).limit_denominator(1001) if gap > 1 / 1000 else Fraction(1000)
    near = min([*_COMMON, Fraction(round(rate) or 1)], key=lambda common: abs(common - rate))
    return near if abs(near - rate) < near / 500 else max(rate, Fraction(1, 100))


def output_rate(source: Fraction, cap: float) -> Fraction:
    """The source's rate, or the fastest whole fraction of it that is not above `cap` (so that motion stays even)."""
    limit = Fraction(cap).limit_denominator(1001)
    return source / max(1, math.ceil(source / limit - Fraction(1, 500)))


class Frames:
    """The decoded frames of a stream up to its end or its first damage; `damage` says which it was.

    Iterating yields (seconds since the first frame, frame), times strictly rising. `end` is the last frame's end.
    """

    def __init__(self, container: InputContainer, stream: VideoStream, timeline: Timeline, max_pixels: int):
        self._container, self._stream, self._max_pixels = container, stream, max_pixels
        self._timeline = timeline
        self.damage: str | None = None
        self.count = 0
        self.end = 0.0

    def __iter__(self) -> Iterator[tuple[float, av.VideoFrame]]:
        begin, latest = None, -math.inf
        first: av.VideoFrame | None = None
        frames = self._container.decode(self._stream)
        while True:
            try:
                frame = next(frames, None)
            except Exception as error:  # whatever FFmpeg meets in damaged bytes
                self.damage = f"{_reason(error)} after {self.end:.2f} s"
                return
            if frame is None:
                return
            first = first or frame
            seconds = frame.time
            self.damage = self._fault(frame, first, seconds, latest if begin is not None else None)
            if self.damage or seconds is None:
                return
            self.count += 1
            begin = seconds if begin is None else begin
            if seconds <= latest:
                continue
            latest = seconds
            held = float(frame.duration * (frame.time_base or 0) or 1 / self._timeline.rate)
            self.end = latest - begin + min(held, _MAX_GAP)
            yield latest - begin, frame

    def _fault(
        self, frame: av.VideoFrame, first: av.VideoFrame, seconds: float | None, latest: float | None
    ) -> str | None:
        """What is wrong with this frame, if anything."""
        if seconds is None:
            return f"a frame without a time stamp after {self.end:.2f} s"
        if frame.is_corrupt:
            return f"a frame marked corrupt after {self.end:.2f} s"
        if frame.width * frame.height > self._max_pixels:
            return f"frames of {frame.width}x{frame.height} pixels: more than max_pixels={self._max_pixels}"
        if abs(frame.width / frame.height - first.width / first.height) > 0.02 * first.width / first.height:
            return f"the aspect changes from {first.width}x{first.height} to {frame.width}x{frame.height}"
        if latest is not None and seconds - latest > _MAX_GAP:
            return f"time jumps by {seconds - latest:.6g} s after {self.end:.2f} s"
        return None

    @property
    def lost(self) -> str | None:
        """After iterating: whether many packets gave no frame although no error was raised, in words."""
        if self.damage is None and self.count < (1 - _LOST_SHARE) * self._timeline.packets:
            return f"only {self.count} of {self._timeline.packets} frames could be decoded"
        return None


def grid_length(duration: float, rate: Fraction) -> int:
    """How many frames `on_grid` gives for a sound file."""
    return max(1, math.ceil(duration * rate - _TOLERANCE))


def on_grid(frames: Frames, rate: Fraction, duration: float) -> Iterator[av.VideoFrame]:
    """The frame shown at 0, 1/rate, 2/rate, ... seconds up to `duration`: even sources pass unchanged."""
    shown: av.VideoFrame | None = None
    written = 0
    for seconds, frame in frames:
        while shown is not None and written + _TOLERANCE < seconds * rate:
            yield shown
            written += 1
        shown = frame
    end = min(duration, frames.end)
    while shown is not None and (written == 0 or written + _TOLERANCE < end * rate):
        yield shown
        written += 1


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, FFmpegError) else str(error)
    return " ".join(f"{type(error).__name__}: {text}".split())[:200]
