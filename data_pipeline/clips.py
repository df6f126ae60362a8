"""Which frames: a clip is T times, evenly spaced in seconds, inside a record; a sample's views are clips."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from data_pipeline.config import ClipConfig, ViewTimes
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


def random_view_times(
    info: MediaInfo, crops: Sequence[ClipConfig], view_times: ViewTimes, generator: np.random.Generator
) -> tuple[np.ndarray, list[slice]]:
    """The times to decode, float64 `[sum of T]`, and where among them each view's own lie.

    `shared`: the times of one clip as long as the first view; a shorter view takes consecutive ones of it, drawn by the
    generator. `own`: a clip for each view, so that one decoder gives the frames of all of them at once.
    """
    if view_times == "own":
        clips = [random_clip_times(info, crop.frames, crop.fps, generator) for crop in crops]
        ends = list(accumulate(len(clip) for clip in clips))
        return np.concatenate(clips), [slice(end - len(clip), end) for clip, end in zip(clips, ends, strict=True)]
    whole = crops[0].frames
    times = random_clip_times(info, whole, crops[0].fps, generator)
    return times, [_part(whole, crop.frames, generator) for crop in crops]


def _part(whole: int, frames: int, generator: np.random.Generator) -> slice:
    """So many consecutive frames; all of them without a draw."""
    start = 0 if frames == whole else int(generator.integers(0, whole - frames + 1))
    return slice(start, start + frames)
