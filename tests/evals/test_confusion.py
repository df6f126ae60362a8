"""Metrics against figures worked out by hand."""

import math

import pytest
import torch

from evals.metrics import ConfusionMatrix, accuracy
from evals.protocol import IGNORE


def test_a_constant_prediction_gives_the_known_miou() -> None:
    """60 % background: predicting it everywhere has IoU 0.6 there and 0 for the two classes that occur elsewhere."""
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    counts = ConfusionMatrix(3).update(torch.zeros_like(labels), labels)
    assert counts.iou().tolist() == [0.6, 0.0, 0.0]
    assert counts.miou() == pytest.approx(0.2)
    assert counts.accuracy() == 0.6


def test_miou_is_accumulated_over_the_set_not_averaged_over_images() -> None:
    """Image 1 has 8 of 10 object pixels found, image 2 none of 2: IoU 8/12 together, but (0.8 + 0) / 2 by image."""
    first = torch.tensor([1] * 8 + [0] * 2), torch.tensor([1] * 10)
    second = torch.tensor([0] * 10), torch.tensor([1] * 2 + [0] * 8)
    counts = ConfusionMatrix(2).update(*first).update(*second)
    object_iou, background_iou = 8 / 12, 8 / 12
    assert counts.iou().tolist() == pytest.approx([background_iou, object_iou])
    per_image = [ConfusionMatrix(2).update(*image).iou()[1].item() for image in (first, second)]
    assert sum(per_image) / 2 == pytest.approx(0.4)
    assert counts.iou()[1].item() != pytest.approx(0.4)


def test_updates_in_parts_count_as_one() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, labels = torch.randint(0, 4, (2, 5, 6, 7), generator=generator)
    parts = ConfusionMatrix(4)
    for guess, truth in zip(predicted, labels, strict=True):
        parts.update(guess, truth)
    assert torch.equal(parts.counts, ConfusionMatrix(4).update(predicted, labels).counts)


def test_a_class_that_neither_occurs_nor_is_predicted_is_left_out() -> None:
    counts = ConfusionMatrix(3).update(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]))
    assert math.isnan(counts.iou()[2].item())
    assert counts.miou() == 1


def test_a_class_that_is_predicted_but_never_occurs_counts_as_zero() -> None:
    counts = ConfusionMatrix(3).update(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 1, 1]))
    assert counts.iou().tolist() == [1.0, 0.5, 0.0]
    assert counts.miou() == 0.5


def test_ignored_places_count_nowhere() -> None:
    predicted, labels = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, IGNORE, IGNORE])
    counts = ConfusionMatrix(3).update(predicted, labels)
    assert (counts.counts.sum().item(), counts.miou()) == (2, 1.0)
    assert accuracy(predicted, labels) == 1


def test_accuracy_over_some_classes_leaves_out_the_true_others() -> None:
    """Of the two true 1s and 2s one is right; the false alarm on a true 0 does not count."""
    counts = ConfusionMatrix(3).update(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 2]))
    assert counts.accuracy([1, 2]) == 0.5
    assert counts.accuracy() == 0.5


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        ConfusionMatrix(2).update(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"labels lie in 0\.\.2"):
        ConfusionMatrix(2).update(torch.zeros(2), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="nothing was counted"):
        ConfusionMatrix(2).miou()
    with pytest.raises(ValueError, match="nothing was counted"):
        accuracy(torch.zeros(2), torch.full((2,), IGNORE))
