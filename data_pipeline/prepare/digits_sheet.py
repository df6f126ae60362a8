"""The contact sheet of a digits set: frames, masks and labels of some clips, to be looked at."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.decode import frames_at, open_decoder
from data_pipeline.prepare.digits_scene import DIRECTIONS, MOVING, STATIC
from data_pipeline.shards import Shards, unpack_masks

_ZOOM, _GAP, _TEXT = 3, 4, 14  # pixels
_MASK_COLOURS = np.array([[0, 0, 0], [60, 120, 255], [255, 140, 0]], np.uint8)  # background, static, moving


def write_sheet(path: Path, folders: list[Path], *, clips: int = 4) -> None:
    """A PNG of the first clips of each shard folder, as they decode; where there are labels, with their masks."""
    strips = [strip for folder in folders for strip in _strips(folder, clips)]
    sheet = Image.new("RGB", (max(strip.width for strip in strips), sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    sheet.save(path)


def _strips(folder: Path, clips: int) -> list[Image.Image]:
    shards = Shards(folder, "video")
    strips = []
    for index in range(min(clips, len(shards))):
        data, row = shards.read(index)
        times = np.arange(row["frames"]) / row["fps"]
        frames = frames_at(open_decoder(data, "video"), times).permute(0, 2, 3, 1).numpy()  # [T, H, W, C]
        labels = row.get("labels")
        rows = [frames] if labels is None else [frames, _MASK_COLOURS[unpack_masks(labels["masks"])]]
        strips.append(_strip(rows, f"{row['key']}: {_words(labels)}"))
    shards.close()
    return strips


def _words(labels: dict[str, Any] | None) -> str:
    if labels is None:
        return "no labels"
    return (
        f"{labels['moving_digit']} moves {DIRECTIONS[labels['direction']]} at {labels['speed']:.2f} pixels/frame "
        f"(orange, {MOVING}), {labels['static_digit']} stands still (blue, {STATIC})"
    )


def _strip(rows: list[np.ndarray], words: str) -> Image.Image:
    """Text, then one line of pictures for each of `rows`, uint8 `[T, H, W, 3]`."""
    count, height, width, _ = rows[0].shape
    strip = Image.new("RGB", (count * (_ZOOM * width + _GAP), _TEXT + len(rows) * (_ZOOM * height + _GAP)), "white")
    ImageDraw.Draw(strip).text((_GAP, 1), words, fill="black")
    for line, pictures in enumerate(rows):
        for i, picture in enumerate(pictures):
            tile = Image.fromarray(picture).resize((_ZOOM * width, _ZOOM * height), Image.Resampling.NEAREST)
            strip.paste(tile, (i * (_ZOOM * width + _GAP), _TEXT + line * (_ZOOM * height + _GAP)))
    return strip
