"""Sizes, windows, crops, flips and colours of images with a truth for every pixel."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch

from data_pipeline.transforms import Box
from evals.dense_config import ViewConfig
from evals.dense_images import Plan
from evals.dense_views import (
    assemble,
    brighten,
    centred_patches,
    distort_colours,
    multiple_of,
    random_crop,
    resize_truth,
    rotate,
    short_side_size,
    sliding_windows,
)
from evals.protocol import IGNORE


def test_windows_cover_the_image_and_the_last_ends_with_it() -> None:
    lefts = [box.left for box in sliding_windows(512, 683, (512, 512), 341)]
    assert lefts == [0, 171]
    assert [box.left for box in sliding_windows(10, 30, (10, 10), 7)] == [0, 7, 14, 20]
    seen = torch.zeros(50, 61)
    for top, left, height, width in sliding_windows(50, 61, (20, 20), 13):
        assert top + height <= 50
        assert left + width <= 61
        seen[top : top + height, left : left + width] += 1
    assert (seen > 0).all()
    assert sliding_windows(8, 9, (16, 16), 8) == [Box(0, 0, 16, 16)]


def test_windows_put_together_give_back_what_they_were_cut_from() -> None:
    whole = torch.randn(3, 50, 61)
    windows = sliding_windows(50, 61, (20, 24), 13)
    parts = torch.stack([whole[:, t : t + h, left : left + w] for t, left, h, w in windows])
    torch.testing.assert_close(assemble(windows, parts, (50, 61)), whole)
    small = torch.nn.functional.pad(whole, (0, 3, 0, 14))
    torch.testing.assert_close(assemble([Box(0, 0, 64, 64)], small[None], (50, 61)), whole)


def test_where_windows_overlap_their_mean_counts() -> None:
    windows = [Box(0, 0, 1, 2), Box(0, 1, 1, 2)]
    scores = torch.tensor([[[[1.0, 2.0]]], [[[4.0, 5.0]]]])
    assert assemble(windows, scores, (1, 3)).tolist() == [[[1, 3, 5]]]


def test_sizes() -> None:
    assert short_side_size(360, 480, 512) == (512, 683)
    assert short_side_size(480, 360, 512) == (683, 512)
    assert multiple_of((360, 475), 16) == (352, 480)
    assert centred_patches(360, 480, 16) == (4, 0, 352, 480)
    with pytest.raises(ValueError, match="smaller than a patch"):
        centred_patches(10, 480, 16)


def test_a_plan_follows_the_view() -> None:
    slide = Plan.of((360, 480), ViewConfig(512, [512, 512], 341), 16)
    assert (slide.kept, slide.size, len(slide.windows)) == ((0, 0, 360, 480), (512, 683), 2)
    whole = Plan.of((360, 480), ViewConfig(None), 16)
    assert (whole.kept, whole.size) == ((0, 0, 360, 480), (352, 480))  # 22.5 patches, to the even one
    cropped = Plan.of((360, 480), ViewConfig(None, edges="crop"), 16)
    assert (cropped.kept, cropped.size, cropped.windows) == ((4, 0, 352, 480), (352, 480), ((0, 0, 352, 480),))
    with pytest.raises(ValueError, match="multiples of the patch size 16"):
        Plan.of((360, 480), ViewConfig(512, [500, 512]), 16)
    with pytest.raises(ValueError, match="short_side=null"):
        Plan.of((360, 480), ViewConfig(512, edges="crop"), 16)


def test_truths_are_never_mixed() -> None:
    truth = torch.tensor([[0, 5], [IGNORE, 7]])
    assert resize_truth(truth, (4, 4)).unique().tolist() == [IGNORE, 0, 5, 7]
    assert resize_truth(truth.float(), (4, 4))[3, 3] == 7


def test_a_crop_keeps_image_and_truth_together_and_fills_up() -> None:
    image = torch.arange(30 * 40).view(1, 30, 40).remainder(251).to(torch.uint8).expand(3, -1, -1)
    truth = image[0].long()
    for seed in range(5):
        cut_image, cut_truth = random_crop((image, truth), (16, 16), np.random.default_rng(seed), fill=IGNORE)
        assert torch.equal(cut_image[0].long(), cut_truth)
        assert cut_truth.shape == (16, 16)
    wide, filled = random_crop((image, truth), (32, 48), np.random.default_rng(0), fill=IGNORE)
    assert wide.shape == (3, 32, 48)
    assert (filled == IGNORE).sum() == 32 * 48 - 30 * 40


def test_a_crop_of_one_class_is_drawn_again() -> None:
    """Three quarters of the image are one class; of crops drawn once many hold that class alone."""
    truth = torch.zeros(40, 40, dtype=torch.int64)
    truth[:, :10] = 1
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)

    def mixed(max_ratio: float) -> int:
        crops = [
            random_crop((image, truth), (8, 8), np.random.default_rng(seed), fill=IGNORE, max_ratio=max_ratio)[1]
            for seed in range(40)
        ]
        return sum(len(crop.unique()) > 1 for crop in crops)

    assert mixed(1.0) < 20
    assert mixed(0.75) > mixed(1.0)


def test_a_rotation_turns_image_and_truth_alike() -> None:
    truth = torch.zeros(40, 40)
    truth[:20] = 3.0
    image = (truth * 50).to(torch.uint8).expand(3, -1, -1)
    turned, turned_truth = rotate((image, truth), 30.0, fill=0.0)
    assert not torch.equal(turned_truth, truth)
    assert set(turned_truth.unique().tolist()) == {0.0, 3.0}
    inside = (turned[0] == 150) | (turned[0] == 0)
    agree = ((turned[0] == 150) == (turned_truth == 3)) | ~inside
    assert agree.float().mean() > 0.99


def test_colours_change_and_places_do_not() -> None:
    image = torch.randint(60, 200, (3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    changed = [distort_colours(image, np.random.default_rng(seed)) for seed in range(8)]
    assert all(each.shape == image.shape and each.dtype == torch.uint8 for each in changed)
    assert sum(not torch.equal(each, image) for each in changed) >= 6
    assert torch.equal(distort_colours(image, np.random.default_rng(1)), changed[1])
    flat = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    assert all(
        distort_colours(flat, np.random.default_rng(seed)).flatten(1).unique(dim=1).shape[1] == 1 for seed in range(9)
    )
    assert brighten(flat, 1.5).unique().tolist() == [150]


def test_hue_turns_by_up_to_a_tenth_of_the_circle() -> None:
    """36 degrees: mmsegmentation's 18 are of OpenCV's 180."""
    image = torch.tensor([120, 80, 80], dtype=torch.uint8).view(3, 1, 1).expand(3, 2, 2)
    found = [distort_colours(image, np.random.default_rng(seed))[:, 0, 0].tolist() for seed in range(300)]
    hues = [360 * ((colorsys.rgb_to_hsv(*(value / 255 for value in pixel))[0] + 0.5) % 1 - 0.5) for pixel in found]
    assert 33 < max(hues) < 40
    assert -40 < min(hues) < -33
