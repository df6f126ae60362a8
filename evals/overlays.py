"""Pictures of tracked objects: frames of a video with true and predicted masks in the colours of their ids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from evals.jf import boundary
from evals.videos import PALETTE, AnnotatedVideo, read_frame, read_mask

TINT = 0.5  # share of the id's colour inside a mask; its outline has the colour alone
GAP = 4  # pixels between pictures
INK, PAPER = (28, 31, 36), (255, 255, 255)


def tint(frame: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """A frame uint8 [H, W, 3] with the objects of ids uint8 [H, W] in their colours; 0 stays as it is."""
    colours = PALETTE[ids].astype(np.float32)
    mixed = (1 - TINT) * frame + TINT * colours
    outlined = np.where(boundary_of_ids(ids)[..., None], colours, mixed)
    return np.where(ids[..., None] > 0, outlined.round(), frame).astype(np.uint8)


def boundary_of_ids(ids: np.ndarray) -> np.ndarray:
    """Where one object ends and another thing begins, bool [H, W]."""
    found = np.zeros(ids.shape, dtype=bool)
    for each in np.unique(ids):
        found |= boundary(ids == each)
    return found


def tracking_picture(
    video: AnnotatedVideo, predictions: Mapping[str, Path], *, columns: int = 6, width: int = 220
) -> Image.Image:
    """A row of evenly spaced frames with their true masks, and under it one for each folder of predicted ones.

    `predictions` has model name -> folder with VIDEO/FRAME.png; `width` is that of a picture in pixels.
    """
    masked = list(video.masks)
    frames = [masked[i] for i in np.linspace(0, len(masked) - 1, min(columns, len(masked))).round().astype(int)]
    pictures = {frame: read_frame(video.frames[frame])[0].permute(1, 2, 0).numpy() for frame in frames}
    rows = {"truth": [tint(pictures[frame], video.mask(frame)) for frame in frames]}
    for model, folder in predictions.items():
        rows[model] = [tint(pictures[frame], read_mask(folder / video.name / f"{frame}.png")) for frame in frames]
    return picture_rows(video.name, rows, width)


def picture_rows(title: str, rows: Mapping[str, list[np.ndarray]], width: int) -> Image.Image:
    """Named rows of pictures uint8 [H, W, 3] of one size, scaled to `width`."""
    full_height, full_width = next(iter(rows.values()))[0].shape[:2]
    height, columns = max(1, round(width * full_height / full_width)), len(next(iter(rows.values())))
    label = 16  # pixels of a line of text
    canvas = Image.new("RGB", (columns * (width + GAP) - GAP, len(rows) * (height + label + GAP)), PAPER)
    draw = ImageDraw.Draw(canvas)
    for row, (name, cells) in enumerate(rows.items()):
        top = row * (height + label + GAP)
        draw.text((2, top + 2), f"{title}: {name}", fill=INK)
        for column, cell in enumerate(cells):
            canvas.paste(Image.fromarray(cell).resize((width, height)), (column * (width + GAP), top + label))
    return canvas
