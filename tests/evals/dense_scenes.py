"""Tiny rendered scenes whose classes and depths can be read off their colours, laid out like the official sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

HEIGHT, WIDTH = 48, 64
COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]], dtype=np.uint8)


def scene(number: int, height: int = HEIGHT, width: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """An image [H, W, 3] of blocks of 16 pixels in three colours, and their classes [H, W]."""
    drawn = np.random.default_rng(number)
    blocks = drawn.integers(0, 3, (-(-height // 16), -(-width // 16)))
    classes = blocks.repeat(16, axis=0).repeat(16, axis=1)[:height, :width]
    noise = drawn.integers(-30, 31, (height, width, 3))
    return (COLOURS[classes].astype(int) + noise).clip(0, 255).astype(np.uint8), classes.astype(np.uint8)


def write(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def write_camvid(root: Path, counts: dict[str, int]) -> Path:
    """Scenes in the layout images/SPLIT and labels/SPLIT, their first rows void: two, in training a varying number."""
    for place, (split, count) in enumerate(counts.items()):
        for number in range(count):
            image, classes = scene(100 * place + number)
            classes[: 2 + (8 * (number % 3) if split == "train" else 0)] = 11
            write(root / "images" / split / f"{number:03}.png", image)
            write(root / "labels" / split / f"{number:03}.png", classes)
    return root


DEPTHS = np.array([1000, 2000, 4000], dtype=np.uint16)  # millimetres by class


def write_rgbd(root: Path, count: int) -> Path:
    """Scenes as frame-NNNNNN.color.png and .depth.png; first rows unknown, more of them the later the frame."""
    for number in range(count):
        image, classes = scene(number)
        depth = DEPTHS[classes]
        depth[: 1 + number] = (0, 65535)[number % 2]
        write(root / "frames" / f"frame-{number:06}.color.png", image)
        write(root / "frames" / f"frame-{number:06}.depth.png", depth)
    return root


class Colours:
    """The mean colour of each patch of 16: enough to tell these classes apart."""

    name = "colours"
    identity = "mean colours of 16 x 16"

    def tokens(self, clips: Tensor) -> Tensor:
        means = torch.nn.functional.avg_pool2d(clips[:, :, 0].float() / 255, 16)
        return means.movedim(1, -1)[:, None]
