"""One class per clip by its nearest training clips: top-1 accuracy; nothing is fitted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from evals.features import FeatureSet
from evals.metrics import accuracy
from evals.neighbours import knn_scores
from evals.protocol import EvalConfig, KnnConfig, Score, Task


def evaluate(tasks: Sequence[Task], train: FeatureSet, test: FeatureSet, config: EvalConfig) -> Iterator[Score]:
    """One score per task, under the first seed."""
    for task in tasks:
        predicted = knn_predict(
            train.features[task.readout],
            train.labels[task.label],
            test.features[task.readout],
            num_classes=len(task.classes),
            config=config.knn,
        )
        yield Score(task.name, task.probe, "accuracy", config.seeds[0], accuracy(predicted, test.labels[task.label]))


def knn_predict(
    train: Tensor, labels: Tensor, test: Tensor, *, num_classes: int, config: KnnConfig | None = None
) -> Tensor:
    """The class of each test row [M, D] by the k most similar training rows [N, D]: int64 [M].

    Similarity is the cosine of the features as they are, neither centred nor standardised (reference evaluation.md
    1.6); a neighbour votes with exp(similarity / temperature). Fewer than k training rows all vote.
    """
    config = config or KnnConfig()
    votes = knn_scores(
        train, labels, test, num_classes=num_classes, neighbours=(config.k,), temperature=config.temperature
    )
    return votes[config.k].argmax(dim=1)
