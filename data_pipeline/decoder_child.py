"""The process in which a decoder works alone: `python -m data_pipeline.decoder_child BACKEND`, started by isolated.py.

Requests come on stdin, replies go to stdout: four bytes with the length of a JSON object, the object, and as many bytes
as its `size` says (a file's bytes in, frames out). One file is open at a time. For decord no torch is imported.
"""

import contextlib
import io
import json
import os
import resource
import select
import signal
import struct
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from data_pipeline.media import DecodeError, MediaInfo, check_info, one_line

HEAD = struct.Struct("<I")


class _Opened(Protocol):
    info: MediaInfo

    def pixels_at(self, times: np.ndarray) -> np.ndarray:
        """The frames shown at `times` (`[T]`, seconds): uint8 `[T, H, W, C]`."""
        ...


class DecordDecoder:
    """decord on one thread, by its frames' time stamps. It turns rotated videos itself and does not name the codec."""

    def __init__(self, data: bytes, max_pixels: int):
        import decord

        if not data:
            raise DecodeError("empty file")
        self._reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
        count = len(self._reader)
        spans = self._reader.get_frame_timestamp(range(count))  # float32 [frames, 2], seconds
        if not np.isfinite(spans).all() or (np.diff(spans[:, 0]) < 0).any() or spans[0, 0] < -1e9:
            raise DecodeError("no usable time stamps")
        # Half a unit of float32 may be lost in rounding: a whole one less is never after the frame's true start.
        self._starts = spans[:, 0].astype(np.float64) - np.spacing(np.abs(spans[:, 0]))
        begin, end = float(spans[0, 0]), float(spans[-1, 1])
        height, width, _ = self._reader.next().shape  # known only once a frame is decoded
        fps = count / (end - begin) if end > begin else 0.0
        self.info = check_info(MediaInfo(count, fps, begin, end, width, height, "unknown"), max_pixels=max_pixels)

    def pixels_at(self, times: np.ndarray) -> np.ndarray:
        """See `_Opened.pixels_at`."""
        shown = np.clip(np.searchsorted(self._starts, times, side="right") - 1, 0, len(self._starts) - 1)  # [T]
        return self._reader.get_batch(shown.tolist()).asnumpy()  # [T, H, W, C]


class _Other:
    """torchcodec or PyAV, for those who want them isolated too."""

    def __init__(self, backend: Any, data: bytes, max_pixels: int):
        from data_pipeline.decode import frames_at, open_decoder

        self._decoder, self._frames_at = open_decoder(data, "video", backend=backend, max_pixels=max_pixels), frames_at
        self.info = self._decoder.info

    def pixels_at(self, times: np.ndarray) -> np.ndarray:
        """See `_Opened.pixels_at`."""
        return self._frames_at(self._decoder, times).permute(0, 2, 3, 1).numpy()  # [T, H, W, C]


def main(backend: str) -> None:
    """A process's life: one request after the other, until the parent hangs up or is gone."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)  # a cluster sends them to every process; the parent decides
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is nothing to be looked into
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get among the replies
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _prepare(backend)
    _send(replies, {})
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # hundreds of lines for one damaged file
        os.dup2(nowhere.fileno(), 1)
    opened = None
    while request := _receive(sys.stdin.buffer):
        header, data = request
        if "times" in header and opened is not None:
            _answer_frames(replies, opened, np.array(header["times"]))
            continue
        opened = None  # before the memory is read off
        opened = _answer_open(replies, backend, data, header["max_pixels"])
        del data, request


def _prepare(backend: str) -> None:
    if backend == "decord":
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        return
    import torch

    from data_pipeline.decode import choose_backend

    torch.set_num_threads(1)
    choose_backend(backend)  # pyright: ignore[reportArgumentType]


def _answer_open(replies: BinaryIO, backend: str, data: bytes, max_pixels: int) -> _Opened | None:
    memory = _resident()
    try:
        opened = DecordDecoder(data, max_pixels) if backend == "decord" else _Other(backend, data, max_pixels)
    except Exception as error:
        _send(replies, {"error": _reason(error), "memory": memory})
        return None
    _send(replies, {"info": asdict(opened.info), "memory": memory})
    return opened


def _answer_frames(replies: BinaryIO, opened: _Opened, times: np.ndarray) -> None:
    try:
        pixels = np.ascontiguousarray(opened.pixels_at(times))
    except Exception as error:
        _send(replies, {"error": _reason(error)})
        return
    _send(replies, {"shape": pixels.shape}, pixels.data.cast("B"))


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, DecodeError) else one_line(error)


def _send(stream: BinaryIO, header: dict[str, Any], payload: "bytes | memoryview" = b"") -> None:
    text = json.dumps({**header, "size": len(payload)}).encode()
    stream.write(HEAD.pack(len(text)) + text)
    stream.write(payload)
    stream.flush()


def _receive(stream: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """The next request, or None where the parent has hung up."""
    head = stream.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    header = json.loads(stream.read(HEAD.unpack(head)[0]))
    return header, stream.read(header["size"])


def _resident() -> int:
    """Bytes of memory that this process holds now; 0 where the kernel does not say."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _leave_with_parent() -> None:
    """Also out of a decoder that hangs: the other end of stdin is closed when the parent is gone."""
    hung_up = select.poll()
    hung_up.register(0, select.POLLHUP)
    while not any(event & (select.POLLHUP | select.POLLERR) for _, event in hung_up.poll()):
        pass
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
