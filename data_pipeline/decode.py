"""Open a record's bytes with the right decoder; every failure of a decoder leaves here as one DecodeError."""

import contextlib
import ctypes
import importlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from av.error import FFmpegError
from torch import Tensor

from data_pipeline.backends import ImageDecoder, PyAvDecoder, TorchCodecDecoder
from data_pipeline.config import Backend
from data_pipeline.isolated import IsolatedDecoder
from data_pipeline.media import DecodeError, Decoder, MediaInfo, one_line

__all__ = ["DecodeError", "Decoder", "MediaInfo", "choose_backend", "frames_at", "open_decoder"]

log = logging.getLogger(__name__)
_AV_LOG_FATAL = 8
_INSTALL_DECORD = "pip install 'vjepa-pipeline[decord]' (x86-64 Linux only)"
_INSTALL = "install FFmpeg (apt-get install --no-install-recommends ffmpeg)"


def open_decoder(
    data: bytes | Path,
    modality: str,
    *,
    backend: Backend = "auto",
    max_pixels: int = 4096 * 2304,
    device: str = "cpu",
    isolated: bool = False,
    timeout: float = 60.0,
) -> Decoder:
    """A decoder for these bytes, with its facts checked.

    Args:
        data: the whole media file, or its path: a video is then read bit by bit and never lies in memory whole (but
            where it is isolated).
        modality: `video` or `image`.
        backend: which video decoder; images always go to pillow.
        max_pixels: largest height x width that is decoded.
        device: where torchcodec decodes videos, from `choose_device`; the frames stay there.
        isolated: decode videos in a process of its own, as decord always does.
        timeout: seconds such a process may take to open the file, and again for each call of `frames_at`.

    Raises DecodeError for bytes that are not a sane video or image.
    """
    if modality not in ("video", "image"):
        raise ValueError(f"modality={modality!r}: must be video or image")
    with _one_error():
        if modality == "image":
            return ImageDecoder(data, max_pixels)
        chosen = choose_backend(backend)
        if chosen == "decord" or isolated:
            data = data if isinstance(data, bytes) else data.read_bytes()
            return IsolatedDecoder(data, max_pixels, backend=chosen, timeout=timeout)
        return TorchCodecDecoder(data, max_pixels, device) if chosen == "torchcodec" else PyAvDecoder(data, max_pixels)


def frames_at(decoder: Decoder, times: np.ndarray) -> Tensor:
    """The frames shown at `times` (seconds, `[T]`): uint8 `[T, C, H, W]`; DecodeError where the stream is damaged."""
    with _one_error():
        frames = decoder.frames_at(times)
    expected = (len(times), 3, decoder.info.height, decoder.info.width)
    if tuple(frames.shape) != expected:
        raise DecodeError(f"frames of shape {list(frames.shape)}, expected {list(expected)}")
    return frames


@lru_cache
def choose_backend(backend: Backend) -> Literal["torchcodec", "pyav", "decord"]:
    """The video decoder that will be used. `auto` falls back to PyAV with one warning in the log.

    Raises ValueError where torchcodec or decord was asked for by name and does not load.
    """
    if backend == "pyav":
        _quiet_pyav()
        return "pyav"
    if backend == "decord":
        if importlib.util.find_spec("decord") is None:  # never imported here: it is the child's
            raise ValueError(f"decoder=decord is not installed; {_INSTALL_DECORD}, or use auto")
        return "decord"
    try:
        importlib.import_module("torchcodec")
    except (ImportError, RuntimeError, OSError) as error:  # without FFmpeg: RuntimeError with a hundred lines
        reason = str(error).strip().splitlines()[0]
        if backend == "torchcodec":
            raise ValueError(f"decoder=torchcodec does not load ({reason}); {_INSTALL}, or use pyav") from None
        log.warning("torchcodec does not load (%s); decoding with PyAV. For full speed %s", reason, _INSTALL)
        _quiet_pyav()
        return "pyav"
    _quiet_loaded_ffmpeg()
    return "torchcodec"


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """Turn whatever a decoder raises on bad bytes into one DecodeError with a one-line reason."""
    try:
        with warnings.catch_warnings():  # pillow warns about odd metadata of pictures that decode well
            warnings.simplefilter("ignore")
            yield
    except DecodeError:
        raise
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # the machine's trouble, not the file's
        raise
    except MemoryError as error:
        if not isinstance(error, FFmpegError):
            raise
        raise DecodeError(one_line(error)) from error  # FFmpeg's word for a size that cannot be
    except Exception as error:  # decoders raise RuntimeError, ValueError, IndexError, EOFError, OSError, KeyError, ...
        raise DecodeError(one_line(error)) from error


def _quiet_pyav() -> None:
    import av.logging

    av.logging.set_level(None)


def _quiet_loaded_ffmpeg() -> None:
    """Silence FFmpeg's own log: hundreds of lines on the terminal for one damaged file.

    torchcodec offers no switch for it, so the level is set in the libraries that it has loaded.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    libraries = {line.split()[-1] for line in maps.read_text().splitlines() if "/libavutil" in line}
    for library in sorted(libraries):
        ctypes.CDLL(library).av_log_set_level(_AV_LOG_FATAL)
