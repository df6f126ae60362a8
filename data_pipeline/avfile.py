"""Reading a video container with PyAV: which stream, which way up, and when its frames are shown. Free of torch."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from data_pipeline.media import DecodeError

SCALER_THREADS = 1
"""Of FFmpeg's scaler, which would otherwise take a thread for each core of the machine, in every worker.

PyAV 19 keeps a scaler for each of Python's threads: one with threads, alive when a process is forked, is freed in the
child, which waits for ever for threads that it does not have.
"""


def quarter_turns(rotation: float) -> int:
    """Counter-clockwise quarter turns (as `numpy.rot90` counts) that show a frame upright."""
    return round(rotation / 90) % 4


# From PyAV 19 on titles that are no UTF-8 are always read, and the argument that asks for it is an error.
_ANY_TITLE: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}


def open_video(file: str | BinaryIO) -> InputContainer:
    """A container over a path or a file; a title that is no UTF-8 does not make a video unreadable."""
    return av.open(file, mode="r", **_ANY_TITLE)


def open_bytes(data: bytes) -> InputContainer:
    """`open_video` over a file's bytes."""
    return open_video(io.BytesIO(data))


@contextlib.contextmanager
def open_container(data: bytes | Path) -> Iterator[InputContainer]:
    """`open_bytes`, or the same over a file that stays on the disk and is read bit by bit.

    FFmpeg never sees the path: to it both are a stream of bytes, so that a name cannot change how they are read.
    """
    if isinstance(data, bytes):
        with open_bytes(data) as container:
            yield container
    else:
        with NamelessFile(data) as file, open_video(file) as container:
            yield container


class NamelessFile(io.BufferedReader):
    """A file opened for reading that does not tell what it is called."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))

    @property
    def name(self) -> str:
        return "<none>"  # as PyAV calls bytes


def video_stream(container: InputContainer) -> VideoStream:
    """The stream FFmpeg calls best (as torchcodec takes), decoded on one thread; DecodeError where there is none."""
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream):
        kinds = sorted({other.type for other in container.streams})
        raise DecodeError(f"no video stream (only {', '.join(kinds)})" if kinds else "no streams: zero frames")
    if stream.disposition & Disposition.attached_pic:
        raise DecodeError("no video stream: audio with a cover picture")
    if stream.codec_context is None:  # pyright: ignore[reportUnnecessaryComparison]
        raise DecodeError("no decoder for the video's codec")
    stream.codec_context.thread_count = 1
    return stream


def frame_stamps(container: InputContainer, stream: VideoStream) -> tuple[np.ndarray, int]:
    """Sorted time stamps of all frames, int64 `[frames]`, and the last frame's length; in ticks, without decoding."""
    stamps: list[int | None] = []
    length = 0
    latest = None
    for packet in container.demux(stream):
        if packet.size == 0 or packet.is_discard:
            continue
        stamps.append(packet.pts)
        if packet.pts is not None and (latest is None or packet.pts > latest):
            latest, length = packet.pts, packet.duration or 0
    known = np.sort(np.array([stamp for stamp in stamps if stamp is not None], np.int64))
    if len(known) < len(stamps):  # AVI with B-frames: only decoding tells the times
        known, length = _decoded_stamps(container, stream)
    if length == 0 and len(known) > 1:
        length = int(known[-1] - known[-2])
    return known, length


def _decoded_stamps(container: InputContainer, stream: VideoStream) -> tuple[np.ndarray, int]:
    container.seek(0)
    frames = [(frame.pts, frame.duration) for frame in container.decode(stream)]
    known = sorted((stamp, length or 0) for stamp, length in frames if stamp is not None)
    if len(known) < len(frames) or not known:
        raise DecodeError("frames without time stamps")
    return np.array([stamp for stamp, _ in known], np.int64), known[-1][1]
