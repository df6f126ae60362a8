"""The labels of a digits clip: as JSON beside its media, and from there to per-pixel and per-token classes."""

import base64
import zlib
from typing import Any

import numpy as np

from data_pipeline.prepare.digits_scene import MOVING, STATIC, Scene, Thing

_SHARE = 0.2  # a digit owns a token when it has more than this share of the tubelet's pixels


def scene_labels(scene: Scene, masks: np.ndarray) -> dict[str, Any]:
    """Everything known about a clip, as JSON takes it; `masks` uint8 `[T, H, W]`.

    Boxes are the glyphs' squares as x0, y0, x1, y1 in pixels; `path` is the moving one's centre as x, y per frame.
    """
    return {
        "direction": scene.direction,
        "speed": round(scene.speed, 4),
        "moving_digit": scene.moving.digit,
        "static_digit": scene.static.digit,
        "moving_glyph": scene.moving.glyph,
        "static_glyph": scene.static.glyph,
        "path": np.round(scene.moving.centres[:, ::-1], 3).tolist(),
        "moving_boxes": _boxes(scene.moving),
        "static_box": _boxes(scene.static)[0],
        "masks": pack_masks(masks),
    }


def pack_masks(masks: np.ndarray) -> dict[str, Any]:
    """Masks as JSON takes them: the shape, and the uint8 bytes through zlib and base64."""
    packed = zlib.compress(np.ascontiguousarray(masks, np.uint8).tobytes(), 9)
    return {"shape": list(masks.shape), "zlib": base64.b64encode(packed).decode()}


def pixel_masks(labels: dict[str, Any]) -> np.ndarray:
    """A clip's masks, uint8 `[T, H, W]`: 0 background, 1 static digit, 2 moving digit. `labels`: `extra["labels"]`."""
    packed = labels["masks"]
    return np.frombuffer(zlib.decompress(base64.b64decode(packed["zlib"])), np.uint8).reshape(packed["shape"])


def token_labels(masks: np.ndarray, *, patch_size: int, tubelet_size: int) -> np.ndarray:
    """The class of each tubelet, int64 `[..., t, h, w]`, from masks `[..., T, H, W]`.

    0 background, 1 static, 2 moving: the digit with more than a fifth of the tubelet's pixels, the larger of two, the
    moving one of equals.
    """
    *batch, frames, height, width = masks.shape
    if frames % tubelet_size or height % patch_size or width % patch_size:
        raise ValueError(
            f"masks of {frames} frames, {height}x{width}: do not divide into tubelets of {tubelet_size} frames and "
            f"patches of {patch_size} pixels"
        )
    t, h, w = frames // tubelet_size, height // patch_size, width // patch_size
    tubelets = masks.reshape(*batch, t, tubelet_size, h, patch_size, w, patch_size)
    static, moving = ((tubelets == value).mean(axis=(-5, -3, -1)) for value in (STATIC, MOVING))  # [..., t, h, w]
    digit = np.where(moving >= static, MOVING, STATIC)
    return np.where(np.maximum(moving, static) > _SHARE, digit, 0).astype(np.int64)


def token_directions(tokens: np.ndarray, direction: np.ndarray | int) -> np.ndarray:
    """From token labels `[..., t, h, w]` and clip directions `[...]`: 0 background and static, else 1 + direction."""
    moving_as = 1 + np.asarray(direction)[..., None, None, None]
    return np.where(tokens == MOVING, moving_as, 0).astype(np.int64)


def _boxes(thing: Thing) -> list[list[float]]:
    x, y, half = thing.centres[:, 1], thing.centres[:, 0], thing.side / 2
    return np.round(np.stack([x - half, y - half, x + half, y + half], axis=1), 3).tolist()
