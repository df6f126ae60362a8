"""The labels of a digits clip, as JSON beside its media."""

from typing import Any

import numpy as np

from data_pipeline.prepare.digits_scene import Scene, Thing
from data_pipeline.shards import pack_masks


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


def _boxes(thing: Thing) -> list[list[float]]:
    x, y, half = thing.centres[:, 1], thing.centres[:, 0], thing.side / 2
    return np.round(np.stack([x - half, y - half, x + half, y + half], axis=1), 3).tolist()
