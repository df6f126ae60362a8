"""Tiny videos whose class is the motion, and files whose frames say which they are."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

MOTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}


def moving_square(motion: str, seed: int, *, frames: int = 8, size: int = 32, side: int = 10) -> np.ndarray:
    """A bright square that moves 2 pixels a frame around a torus of noise: uint8 [T, H, W, 3].

    Its first place is drawn, so that no single frame tells the motion.
    """
    generator = np.random.default_rng(seed)
    place = generator.integers(0, size, 2)
    ground = generator.integers(0, 60, (size, size, 1)).repeat(3, axis=2)
    clip = np.repeat(ground[None], frames, axis=0).astype(np.uint8)
    colour = generator.integers(170, 256, 3)
    for t in range(frames):
        rows, columns = (place[axis] + 2 * t * MOTIONS[motion][axis] + np.arange(side) for axis in (0, 1))
        clip[t][np.ix_(rows % size, columns % size)] = colour
    return clip


def ramp(frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames whose grey value says which they are (10, 13, 16, ...): uint8 [T, H, W, 3]."""
    values = (10 + 3 * np.arange(frames)).astype(np.uint8)
    return np.broadcast_to(values[:, None, None, None], (frames, height, width, 3)).copy()


def write_video(path: Path, pixels: np.ndarray, *, fps: int = 10) -> Path:
    """[T, H, W, 3] as H.264, nearly lossless."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "1", "preset": "ultrafast"})
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for image in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path
