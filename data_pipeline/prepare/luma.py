"""Small grey pictures of a record's frames: what the filter and the search for duplicates look at. Free of torch."""

import io
from collections.abc import Iterator

import av.logging
import numpy as np
from av import VideoFrame
from av.error import FFmpegError
from PIL import Image

from data_pipeline.avfile import SCALER_THREADS, open_bytes, quarter_turns, video_stream
from data_pipeline.media import DecodeError
from data_pipeline.picture import upright_rgb
from data_pipeline.prepare.timeline import Frames, Timeline, on_grid, output_rate, scan

MAX_PIXELS = 8192 * 4320
"""Largest frame the tools decode, height x width."""


def timeline_of(data: bytes) -> Timeline:
    """What a video's packets say; DecodeError for bytes that are no video."""
    av.logging.set_level(None)
    try:
        with open_bytes(data) as container:
            return scan(container, video_stream(container))
    except (FFmpegError, EOFError, UnicodeDecodeError) as error:
        raise DecodeError(f"cannot be opened as a video ({type(error).__name__})") from error


def frames_of(data: bytes, timeline: Timeline, fps: float | None = None) -> Iterator[VideoFrame]:
    """All frames of a video, or on an even grid of at most `fps`; DecodeError at the first damage."""
    with open_bytes(data) as container:
        frames = Frames(container, video_stream(container), timeline, MAX_PIXELS)
        if fps is None:
            yield from (frame for _, frame in frames)
        else:
            yield from on_grid(frames, output_rate(timeline.rate, fps), timeline.duration)
    if frames.damage or frames.lost or not frames.count:
        raise DecodeError(frames.damage or frames.lost or "no frame could be decoded")


def frames_shown(data: bytes, shares: list[float]) -> Iterator[VideoFrame]:
    """The frames shown at these shares of a video's length (rising); DecodeError at damage before the last."""
    timeline = timeline_of(data)
    times = [share * timeline.duration for share in shares]
    shown: VideoFrame | None = None
    with open_bytes(data) as container:
        frames = Frames(container, video_stream(container), timeline, MAX_PIXELS)
        for seconds, frame in frames:
            while shown is not None and times and times[0] < seconds:
                yield shown
                times.pop(0)
            if not times:
                return
            shown = frame
    if frames.damage or shown is None:
        raise DecodeError(frames.damage or "no frame could be decoded")
    yield from (shown for _ in times)


def video_luma(data: bytes, *, fps: float, short_side: int) -> np.ndarray:
    """Brightness 0 to 255, uint8 `[T, H, W]`, of frames at `fps` (or the nearest slower whole part of the source's)."""
    frames = frames_of(data, timeline_of(data), fps)
    pictures = [shrunk_luma(frame, short_side) for frame in frames]
    return np.stack([picture for picture in pictures if picture.shape == pictures[0].shape])


def shrunk_luma(frame: VideoFrame, short_side: int) -> np.ndarray:
    """The frame upright as brightness of the full range, its short side `short_side` pixels: uint8 `[H, W]`."""
    factor = short_side / min(frame.width, frame.height)
    width, height = (max(1, round(side * factor)) for side in (frame.width, frame.height))
    small = frame.reformat(width=width, height=height, format="gray", interpolation="AREA", threads=SCALER_THREADS)
    return np.rot90(small.to_ndarray(), quarter_turns(frame.rotation))


def square_luma(frame: VideoFrame, side: int) -> np.ndarray:
    """The frame upright as brightness, its aspect not kept: uint8 `[side, side]`."""
    small = frame.reformat(width=side, height=side, format="gray", interpolation="AREA", threads=SCALER_THREADS)
    return np.rot90(small.to_ndarray(), quarter_turns(frame.rotation))


def open_image(data: bytes) -> Image.Image:
    """A still picture as displayed, RGB; DecodeError for bytes that pillow cannot read in full."""
    try:
        picture = Image.open(io.BytesIO(data))
        if picture.width * picture.height > MAX_PIXELS:
            raise DecodeError(f"{picture.width}x{picture.height} pixels: more than {MAX_PIXELS}")
        return upright_rgb(picture)
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # pillow raises OSError, ValueError, SyntaxError, struct.error, ... on bad bytes
        raise DecodeError(f"cannot be read as an image ({type(error).__name__}: {str(error)[:100]})") from error


def image_luma(data: bytes, *, short_side: int) -> np.ndarray:
    """Brightness 0 to 255 of a still picture, its short side at most `short_side`: uint8 `[1, H, W]`."""
    picture = open_image(data)
    factor = min(1.0, short_side / min(picture.size))
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return np.asarray(picture.convert("L").resize(size, Image.Resampling.BOX))[None]
