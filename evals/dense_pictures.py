"""Pictures of dense predictions: an image, its truth and what the chosen head makes of it."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor

from evals.dense_fit import DenseResult
from evals.dense_images import Plan
from evals.dense_views import cut
from evals.overlays import picture_rows, tint
from evals.protocol import IGNORE
from evals.tasks.linear_segmentation import predicted_classes

Colours = Callable[[np.ndarray, Tensor], np.ndarray]
"""An image uint8 [H, W, 3], and a truth or a prediction [H, W] -> uint8 [H, W, 3]."""


def class_colours(image: np.ndarray, classes: Tensor) -> np.ndarray:
    """Classes int64 [H, W] in colour over the image; what is ignored stays as it is."""
    ids = (classes + 1).masked_fill(classes == IGNORE, 0)
    return tint(image, ids.numpy().astype(np.uint8))


def depth_colours(farthest: float) -> Colours:
    """Metres float32 [H, W] as colours from near to `farthest`; black where nothing is known."""
    scale = matplotlib.colormaps["viridis"]

    def colours(image: np.ndarray, metres: Tensor) -> np.ndarray:
        shares = (metres / farthest).clamp(0, 1).numpy()
        painted = (255 * scale(shares)[..., :3]).round().astype(np.uint8)
        return np.where((metres > 0).numpy()[..., None], painted, 0).astype(np.uint8)

    return colours


def segmentation_picture(result: DenseResult, index: int, model: str) -> Image.Image:
    """A test image, its true classes and the predicted ones."""
    predicted, truth = predicted_classes(result, index)
    return _picture(result, index, model, truth, predicted, class_colours)


def depth_picture(result: DenseResult, index: int, model: str) -> Image.Image:
    """A test image, its true depth and the predicted one, on one scale."""
    metres, truth = result.predict(index)
    return _picture(result, index, model, truth, metres[0], depth_colours(max(float(truth.max()), 1e-3)))


def _picture(
    result: DenseResult, index: int, model: str, truth: Tensor, predicted: Tensor, colours: Colours
) -> Image.Image:
    item = result.images.data.items[index]
    image = item.image()
    kept = Plan.of(image.shape[-2:], result.config.view, result.images.patch).kept
    shown = cut(image, kept).permute(1, 2, 0).numpy()
    cells = [shown, colours(shown, truth), colours(shown, predicted)]
    return picture_rows(item.key, {f"image, truth, {model}": cells}, width=280)
