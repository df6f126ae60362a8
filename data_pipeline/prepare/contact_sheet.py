"""A picture of some records to be looked at: one strip of frames each, with its key and its facts."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

HEIGHT = 96
"""Pixels of a frame on the sheet."""
_GAP, _TEXT, _LETTER = 4, 14, 7  # pixels
_COLUMNS = 2


def strip(pictures: list[np.ndarray], row: dict[str, Any]) -> Image.Image:
    """Frames `[HEIGHT, W, 3]` side by side under a line of text."""
    facts = f"{row['width']}x{row['height']} {row['codec']}"
    if row["duration"]:
        facts += f" {row['fps']:.4g} fps {row['duration']:.2f} s"
    words = f"{row['key']}  {facts}"
    width = max(sum(picture.shape[1] + _GAP for picture in pictures), _LETTER * len(words))
    made = Image.new("RGB", (width, HEIGHT + _TEXT + _GAP), "white")
    ImageDraw.Draw(made).text((0, 1), words, fill="black")
    left = 0
    for picture in pictures:
        made.paste(Image.fromarray(picture), (left, _TEXT))
        left += picture.shape[1] + _GAP
    return made


def write_contact_sheet(path: Path, strips: list[Image.Image]) -> None:
    """All strips in two columns as a PNG."""
    columns = [strips[start::_COLUMNS] for start in range(min(_COLUMNS, len(strips)))]
    widths = [max(one.width for one in column) + 4 * _GAP for column in columns]
    height = max(sum(one.height for one in column) for column in columns)
    sheet = Image.new("RGB", (sum(widths), height), "white")
    left = 0
    for column, width in zip(columns, widths, strict=True):
        top = 0
        for one in column:
            sheet.paste(one, (left, top))
            top += one.height
        left += width
    sheet.save(path)
