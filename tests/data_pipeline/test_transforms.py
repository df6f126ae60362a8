"""Claims: one crop per clip, within its bounds, from the generator alone."""

from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.config import ClipConfig
from data_pipeline.transforms import Box, crop_resize, make_eval_view, make_full_view, make_view, random_resized_box


def frames(number: int = 4, height: int = 60, width: int = 80) -> torch.Tensor:
    """Equal frames of noise, stored as channels last: uint8 `[T, C, H, W]`."""
    one = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)
    return torch.from_numpy(one.repeat(number, 0)).permute(0, 3, 1, 2)


def test_every_frame_gets_the_same_crop():
    view = make_view(frames(), ClipConfig(size=32), np.random.default_rng(1))
    assert view.shape == (3, 4, 32, 32)
    assert view.dtype == torch.uint8
    assert view.is_contiguous()
    assert (view == view[:, :1]).all()


def test_scale_and_aspect_stay_within_their_bounds():
    generator = np.random.default_rng(0)
    for _ in range(500):
        top, left, height, width = random_resized_box(600, 800, generator, scale=(0.3, 0.9), aspect=(0.75, 1.35))
        assert 0 <= top <= 600 - height
        assert 0 <= left <= 800 - width
        assert 0.295 < height * width / (600 * 800) < 0.905
        assert 0.745 < width / height < 1.355


def test_the_bounds_are_reached():
    generator = np.random.default_rng(0)
    boxes = [random_resized_box(600, 800, generator, scale=(0.3, 0.9), aspect=(0.75, 1.35)) for _ in range(500)]
    areas = [box.height * box.width / (600 * 800) for box in boxes]
    assert min(areas) < 0.32
    assert max(areas) > 0.85


def test_a_frame_too_wide_for_any_box_gives_the_largest_centred_one():
    box = random_resized_box(10, 1000, np.random.default_rng(0), scale=(0.9, 1.0), aspect=(0.75, 1.35))
    assert box == Box(0, 493, 10, 14)


def test_flip_mirrors_the_whole_clip():
    whole = {"scale_min": 1.0, "aspect_min": 80 / 60, "aspect_max": 80 / 60, "size": 40}
    plain = make_view(frames(), ClipConfig(flip=0.0, **whole), np.random.default_rng(2))
    mirrored = make_view(frames(), ClipConfig(flip=1.0, **whole), np.random.default_rng(2))
    assert (plain.flip(-1) == mirrored).all()
    assert mirrored.is_contiguous()


def test_a_crop_of_the_right_size_is_not_resampled():
    cropped = crop_resize(frames(), Box(3, 5, 16, 24), (16, 24))
    assert (cropped == frames()[:, :, 3:19, 5:29].permute(1, 0, 2, 3)).all()


def test_resizing_agrees_with_float_resampling():
    view = make_full_view(frames(), (30, 40))
    exact = torch.nn.functional.interpolate(frames().float(), (30, 40), mode="bilinear", antialias=True)
    assert (view.permute(1, 0, 2, 3).float() - exact).abs().max() <= 1.5


def test_the_evaluation_view_is_the_centre():
    view = make_eval_view(frames(height=32, width=64), 32)
    assert (view == frames(height=32, width=64)[..., 16:48].permute(1, 0, 2, 3)).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [("frames", 0), ("fps", 0), ("size", 0), ("scale_max", 2), ("aspect_max", 0), ("flip", 2), ("views", 0)],
)
def test_impossible_clips_are_refused_by_name(field: str, value: Any):
    with pytest.raises(ValueError, match=f"^{field}={value}"):
        ClipConfig(**{field: value})
