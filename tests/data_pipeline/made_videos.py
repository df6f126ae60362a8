"""Videos whose frames say which they are, written on the fly."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def ramp(frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames whose grey value says which they are (10, 16, 22, ...): uint8 `[T, H, W, 3]`."""
    values = 10 + 6 * np.arange(frames, dtype=np.uint8)
    return np.broadcast_to(values[:, None, None, None], (frames, height, width, 3)).copy()


def write_video(path: Path, pixels: np.ndarray, *, fps: int = 10, times: list[float] | None = None) -> Path:
    """`[T, H, W, 3]` as H.264, evenly spaced, or at the given times (seconds): variable frame rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "1", "preset": "ultrafast"})
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, image in enumerate(pixels):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.time_base = Fraction(1, 1000)
            frame.pts = round(1000 * (times[i] if times else i / fps))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def which(frames: np.ndarray) -> list[int]:
    """The numbers of `ramp` frames, read off their grey values; frames: `[T, ...]`."""
    return [round((float(frame.mean()) - 10) / 6) for frame in frames]
