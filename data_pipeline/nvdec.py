"""Decoding on the GPU: whether it works here, asked once at the start and with a real video."""

import io
from functools import lru_cache

import av
import numpy as np
import torch

from data_pipeline.config import DecodeDevice

_SIDE = 256  # NVDEC refuses very small frames
_GREY = 128


def choose_device(device: DecodeDevice) -> str:
    """Where torchcodec decodes: `cpu`, or `cuda:N` with this process's current GPU (a rank sets it before).

    Raises ValueError where `cuda` is asked for and torch, torchcodec or the driver cannot do it.
    """
    if device == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise ValueError("decode_device=cuda: torch finds no GPU here; use decode_device=cpu")
    chosen = f"cuda:{torch.cuda.current_device()}"
    _check(chosen)
    return chosen


@lru_cache
def _check(device: str) -> None:
    from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportPrivateImportUsage]

    hint = (
        "install a torchcodec built with CUDA (see its README), give a container the driver's video library "
        "(NVIDIA_DRIVER_CAPABILITIES=compute,utility,video), or use decode_device=cpu"
    )
    try:
        decoder = VideoDecoder(_grey_video(), device=device, seek_mode="exact")
        frame = decoder.get_frames_played_at([0.0]).data
        off = (frame.float().mean() - _GREY).abs().item()
    except RuntimeError as error:  # a wheel without CUDA, an old driver
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"decode_device=cuda: torchcodec cannot decode on {device} ({reason}); {hint}") from error
    if decoder.cpu_fallback:
        raise ValueError(f"decode_device=cuda: NVDEC is not there ({decoder.cpu_fallback}); {hint}")
    if frame.device.type != "cuda" or off > 8:
        raise ValueError(f"decode_device=cuda: a grey frame came back {off:.0f} levels off, on {frame.device}; {hint}")


def _grey_video() -> bytes:
    """Two grey frames of H.264."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = _SIDE, _SIDE, "yuv420p"
        for _ in range(2):
            pixels = np.full((_SIDE, _SIDE, 3), _GREY, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()
