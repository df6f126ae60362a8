"""Open a record's bytes with the right decoder; every failure of a decoder leaves here as one DecodeError."""

import contextlib
import ctypes
import importlib
import logging
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from data_pipeline.backends import ImageDecoder, PyAvDecoder, TorchCodecDecoder
from data_pipeline.config import Backend
from data_pipeline.media import DecodeError, Decoder, MediaInfo

__all__ = ["DecodeError", "Decoder", "MediaInfo", "choose_backend", "frames_at", "open_decoder"]

log = logging.getLogger(__name__)
_AV_LOG_FATAL = 8
_INSTALL = "install FFmpeg (apt-get install --no-install-recommends ffmpeg)"


def open_decoder(data: bytes, modality: str, *, backend: Backend = "auto", max_pixels: int = 4096 * 2304) -> Decoder:
    """A decoder for these bytes, with its facts checked.

    Args:
        data: the whole media file.
        modality: `video` or `image`.
        backend: which video decoder; images always go to pillow.
        max_pixels: largest height x width that is decoded.

    Raises DecodeError for bytes that are not a sane video or image.
    """
    if modality not in ("video", "image"):
        raise ValueError(f"modality={modality!r}: must be video or image")
    decoders = {"torchcodec": TorchCodecDecoder, "pyav": PyAvDecoder}
    make = ImageDecoder if modality == "image" else decoders[choose_backend(backend)]
    with _one_error():
        return make(data, max_pixels)


def frames_at(decoder: Decoder, times: np.ndarray) -> Tensor:
    """The frames shown at `times` (seconds, `[T]`): uint8 `[T, C, H, W]`; DecodeError where the stream is damaged."""
    with _one_error():
        frames = decoder.frames_at(times)
    expected = (len(times), 3, decoder.info.height, decoder.info.width)
    if tuple(frames.shape) != expected:
        raise DecodeError(f"frames of shape {list(frames.shape)}, expected {list(expected)}")
    return frames


@lru_cache
def choose_backend(backend: Backend) -> Literal["torchcodec", "pyav"]:
    """The video decoder that will be used. `auto` falls back to PyAV with one warning in the log.

    Raises ValueError where torchcodec was asked for by name and does not load.
    """
    if backend == "pyav":
        _quiet_pyav()
        return "pyav"
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
    except MemoryError:
        raise
    except Exception as error:  # decoders raise RuntimeError, ValueError, IndexError, EOFError, OSError, KeyError, ...
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise DecodeError(f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}") from error


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
