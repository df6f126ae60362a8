"""Neighbours vote, rankings are scored, features are described: against sklearn and by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from evals import neighbours
from evals.neighbours import knn_accuracy, knn_scores, leave_one_out_retrieval, retrieval_scores
from evals.statistics import feature_statistics


def clusters(count: int, *, seed: int, noise: float = 1.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 12, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % 5
    return centres[labels] + noise * torch.randn(count, 12, generator=generator), labels


def test_votes_are_those_of_sklearn_at_every_k() -> None:
    (train, labels), (test, truth) = clusters(150, seed=0), clusters(80, seed=1)
    found = knn_scores(train, labels, test, num_classes=5, neighbours=(10, 20, 100))
    accuracies = knn_accuracy(train, labels, test, truth, num_classes=5, neighbours=(10, 20, 100))
    for k, votes in found.items():
        votes_of: Any = lambda distance: np.exp((1 - distance) / 0.07)  # noqa: E731 (its type is told wrongly)
        model = KNeighborsClassifier(k, metric="cosine", weights=votes_of)
        model.fit(train.numpy(), labels.numpy())
        expected = model.predict(test.numpy())
        assert (votes.argmax(dim=1).numpy() == expected).all()
        assert accuracies[k] == pytest.approx((expected == truth.numpy()).mean())
    assert 0.3 < accuracies[10] < 1


def test_the_table_is_made_in_parts_and_fewer_rows_than_k_all_vote(monkeypatch: pytest.MonkeyPatch) -> None:
    (train, labels), (test, _) = clusters(30, seed=0), clusters(20, seed=1)
    whole = knn_scores(train, labels, test, num_classes=5, neighbours=(200,))[200]
    torch.testing.assert_close(whole.sum(dim=1), torch.ones(20))
    monkeypatch.setattr(neighbours, "ROWS", 7)
    torch.testing.assert_close(knn_scores(train, labels, test, num_classes=5, neighbours=(200,))[200], whole)


def test_mean_average_precision_is_that_of_sklearn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "ROWS", 13)
    (gallery, labels), (queries, truth) = clusters(60, seed=0), clusters(40, seed=1)
    scores = retrieval_scores(queries, truth, gallery, labels)
    similarity = torch.nn.functional.cosine_similarity(queries[:, None], gallery[None], dim=-1)
    expected = np.mean(
        [average_precision_score((labels == t).numpy(), s.numpy()) for s, t in zip(similarity, truth, strict=True)]
    )
    assert scores["mAP"] == pytest.approx(expected, abs=1e-6)
    nearest = similarity.topk(5, dim=1).indices
    assert scores["recall@5"] == pytest.approx((labels[nearest] == truth[:, None]).any(dim=1).double().mean().item())
    assert scores["recall@1"] < scores["recall@5"] <= scores["recall@10"]


def test_a_clip_does_not_find_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "ROWS", 3)
    features = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]])
    assert leave_one_out_retrieval(features, torch.tensor([0, 0, 1, 1])) == {"mAP": 1, "recall@1": 1, "recall@5": 1}
    crossed = leave_one_out_retrieval(features, torch.tensor([0, 1, 0, 1]))
    assert crossed["recall@1"] == 0
    assert crossed["mAP"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    with pytest.raises(ValueError, match="label 1 occurs once"):
        leave_one_out_retrieval(features, torch.tensor([0, 0, 1, 0]))
    with pytest.raises(ValueError, match="nothing of class 7"):
        retrieval_scores(features, torch.tensor([7, 0, 0, 0]), features, torch.zeros(4, dtype=torch.int64))


def test_statistics_tell_collapse_from_health() -> None:
    healthy = feature_statistics(torch.randn(4000, 16, generator=torch.Generator().manual_seed(0)))
    assert healthy["rankme"] == pytest.approx(16, abs=0.2)
    assert healthy["covariance_rank"] == pytest.approx(16, abs=0.2)
    assert healthy["std"] == pytest.approx(1, abs=0.05)
    assert healthy["cosine"] == pytest.approx(0, abs=0.01)
    line = torch.randn(400, 1, generator=torch.Generator().manual_seed(0)) * 1e-3 + torch.ones(16)
    collapsed = feature_statistics(line)
    assert collapsed["rankme"] == pytest.approx(1, abs=0.01)
    assert collapsed["cosine"] > 0.99
    assert collapsed["std"] < 0.01
    assert collapsed["dead_share"] == 1


def test_few_rows_of_many_are_drawn_by_the_seed() -> None:
    features = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    assert feature_statistics(features, most=50) == feature_statistics(features, most=50)
    assert feature_statistics(features, most=50) != feature_statistics(features, most=50, seed=1)
    with pytest.raises(ValueError, match="flatten batch and tokens"):
        feature_statistics(features[None])
