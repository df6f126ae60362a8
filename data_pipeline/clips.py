"""Which frames: a clip is T times, evenly spaced in seconds, inside a record."""

import numpy as np

from data_pipeline.media import MediaInfo


def clip_times(info: MediaInfo, frames: int, fps: float, position: float) -> np.ndarray:
    """The times of a clip's frames: float64 `[T]`, seconds in the record's own time.

    `position` in [0, 1] slides the clip from the record's start to its end. A record shorter than the clip is padded
    by repeating its last frame (as the V-JEPA reference does); a record with fewer frames per second repeats frames.
    """
    if not 0 <= position <= 1:
        raise ValueError(f"position={position}: must be between 0 (start of the record) and 1 (end)")
    slack = max(0.0, info.duration - frames / fps)
    times = info.begin + position * slack + np.arange(frames) / fps
    last = max(info.begin, float(np.nextafter(info.end, info.begin)))
    return np.minimum(times, last)


def random_clip_times(info: MediaInfo, frames: int, fps: float, generator: np.random.Generator) -> np.ndarray:
    """`clip_times` at a random position: float64 `[T]`, a pure function of the record and of the generator."""
    return clip_times(info, frames, fps, generator.random())
