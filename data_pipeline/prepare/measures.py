"""What the filter knows of a record: its size and length, how much moves, how dark it is, whether it has black bars."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_pipeline.prepare.luma import image_luma, video_luma

PAIR_FPS = 4.0
"""Frames compared are a quarter of a second apart, as in the recipes' clips."""
SHORT_SIDE = 64
"""Pixels: noise and compression are averaged away, what is smaller than a hundredth of the picture is not seen."""
_CHANGED = 8  # grey levels by which a pixel of the small picture has changed
_STILL = 0.001  # of the pixels: with fewer that have changed, nothing has moved (7 of 64 x 114)
_BLACK = 24  # grey levels that 98 % of the pixels of a black frame, or of a bar in all frames, do not exceed


@dataclass(frozen=True)
class Measures:
    """Of one record; those that a still picture cannot have are None."""

    seconds: float | None
    """Length."""
    short_side: int
    """Pixels."""
    aspect: float
    """The long side over the short one."""
    motion: float | None
    """Mean difference of frames a quarter of a second apart, in grey levels of 255."""
    still: float | None
    """Share of such pairs in which nothing has moved."""
    black: float
    """Share of black frames."""
    bars: float
    """Share of the picture that is black bars at two opposite sides."""

    def as_row(self) -> dict[str, Any]:
        """For the report, rounded."""
        return {name: value if value is None else round(value, 4) for name, value in asdict(self).items()}


def measure_record(data: bytes, modality: str, row: dict[str, Any]) -> Measures:
    """Decode a record and measure it; DecodeError where it is damaged."""
    short, long = sorted((row["width"], row["height"]))
    if modality == "image":
        luma = image_luma(data, short_side=SHORT_SIDE)
        return Measures(None, short, long / short, None, None, black_share(luma), bar_share(luma))
    luma = video_luma(data, fps=PAIR_FPS, short_side=SHORT_SIDE)
    motion, still = movement(luma)
    return Measures(row["duration"], short, long / short, motion, still, black_share(luma), bar_share(luma))


def movement(luma: np.ndarray) -> tuple[float, float]:
    """`motion` and `still` of frames on an even grid, uint8 `[T, H, W]`; a single frame is still."""
    if len(luma) < 2:
        return 0.0, 1.0
    change = np.abs(np.diff(luma.astype(np.int16), axis=0))  # [T - 1, H, W]
    changed = np.mean(change > _CHANGED, axis=(1, 2))
    return float(np.mean(change)), float(np.mean(changed < _STILL))


def black_share(luma: np.ndarray) -> float:
    """Share of the frames, uint8 `[T, H, W]`, that are black."""
    return float(np.mean(np.percentile(luma, 98, axis=(1, 2)) < _BLACK))


def bar_share(luma: np.ndarray) -> float:
    """Share of the picture that is bars: black above and below, or left and right, or both, in all frames `[T, H, W]`.

    Bars are taken to be as wide as the narrower of the two; a record that is black all over has none.
    """
    inner = 1.0
    for across in (2, 1):
        lines = np.percentile(luma, 98, axis=(0, across)) < _BLACK  # [H] or [W]
        if lines.all():
            return 0.0
        narrower = min(np.argmin(lines), np.argmin(lines[::-1]))
        inner *= 1 - 2 * narrower / len(lines)
    return float(1 - inner)
