"""Clips of one small digit that moves through the picture and bounces off its edges, drawn on the fly.

Every batch is a function of (seed, stream, ordinal) alone. The ten digits are bitmaps of 7 x 5 pixels, drawn twice as
large; where the digit is in each frame is known exactly.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

SIZE = 32  # height and width of a frame, pixels
FRAMES = 4
NOISE = 0.05  # standard deviation; ink is 1, paper 0
ZOOM = 2
MIN_SPEED, MAX_SPEED = 1.0, 4.0  # pixels per frame, along each axis

BITMAPS = """
.###. ..#.. .###. ####. ...#. ##### ..##. ##### .###. .###.
#...# .##.. #...# ....# ..##. #.... .#... ....# #...# #...#
#..## ..#.. ....# ....# .#.#. ####. #.... ...#. #...# #...#
#.#.# ..#.. ...#. .###. #..#. ....# ####. ..#.. .###. .####
##..# ..#.. ..#.. ....# ##### ....# #...# ..#.. #...# ....#
#...# ..#.. .#... ....# ...#. #...# #...# .#... #...# ...#.
.###. ##### ##### ####. ...#. .###. .###. .#... .###. .##..
"""


class Glyphs(NamedTuple):
    """A batch of clips and what is true of them."""

    clips: Tensor  # [B, T, 1, H, W] fp32
    positions: Tensor  # [B, T, 2] fp32: top and left edge of the digit, pixels
    digits: Tensor  # [B] int64


def draw_glyphs(count: int, *, seed: int, stream: str, ordinal: int = 0) -> Glyphs:
    """`count` clips: the batch numbered `ordinal` of a stream, for instance "train"."""
    digest = hashlib.sha256(f"{seed}/{stream}/{ordinal}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    bitmaps = _bitmaps()  # [10, h, w]
    room = torch.tensor([SIZE - bitmaps.shape[1], SIZE - bitmaps.shape[2]], dtype=torch.float32)
    digits = torch.randint(len(bitmaps), (count,), generator=generator)
    positions = _paths(count, room, generator)
    pictures = _draw(bitmaps[digits], positions)  # [B, T, H, W]
    noise = torch.randn(pictures.shape, generator=generator) * NOISE
    return Glyphs((pictures + noise).unsqueeze(2), positions, digits)


def _bitmaps() -> Tensor:
    """The ten digits, [10, 14, 10], 0 and 1."""
    rows = [[[float(ink == "#") for ink in cell] for cell in line.split()] for line in BITMAPS.split("\n") if line]
    small = torch.tensor(rows).transpose(0, 1)  # [10, 7, 5]
    return small.repeat_interleave(ZOOM, dim=1).repeat_interleave(ZOOM, dim=2)


def _paths(count: int, room: Tensor, generator: torch.Generator) -> Tensor:
    """Straight paths reflected into [0, room], rounded to pixels: [B, T, 2]."""
    start = torch.rand(count, 1, 2, generator=generator) * room
    speed = MIN_SPEED + (MAX_SPEED - MIN_SPEED) * torch.rand(count, 1, 2, generator=generator)
    sign = torch.randint(2, (count, 1, 2), generator=generator) * 2 - 1
    unfolded = start + speed * sign * torch.arange(FRAMES)[:, None]  # [B, T, 2]
    wrapped = unfolded.remainder(2 * room)
    return torch.minimum(wrapped, 2 * room - wrapped).round()


def _draw(ink: Tensor, positions: Tensor) -> Tensor:
    """Bitmaps [B, h, w] placed at [B, T, 2] in empty frames: [B, T, H, W]."""
    padded = torch.nn.functional.pad(ink, (0, 1, 0, 1))  # one row and one column of paper, for all that lies outside
    rows, columns = (
        _offsets(positions[..., axis].long(), extent) for axis, extent in enumerate(ink.shape[1:])
    )  # [B, T, SIZE]
    clip = torch.arange(len(ink))[:, None, None, None]
    return padded[clip, rows[..., :, None], columns[..., None, :]]


def _offsets(edges: Tensor, extent: int) -> Tensor:
    """Which row (or column) of the bitmap each one of the frame shows; `extent`, the empty one, outside it."""
    offsets = torch.arange(SIZE) - edges[..., None]
    return torch.where((offsets >= 0) & (offsets < extent), offsets, extent)
