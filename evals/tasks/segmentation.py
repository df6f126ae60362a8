"""One class per token by a linear probe: mIoU accumulated over the test set, at the tokens' resolution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from evals.features import FeatureSet
from evals.fit import Problem, fit_linear
from evals.metrics import ConfusionMatrix
from evals.protocol import EvalConfig, Score, Task


def evaluate(tasks: Sequence[Task], train: FeatureSet, test: FeatureSet, config: EvalConfig) -> Iterator[Score]:
    """Scores of all tasks, which are fitted together."""
    truths = {task.name: _token_labels(task, test) for task in tasks}
    for seed in config.seeds:
        predicted = _predictions(tasks, train, test, config, seed)
        for task in tasks:
            counts = ConfusionMatrix(len(task.classes)).update(predicted[task.name], truths[task.name])
            yield from segmentation_scores(task, counts, seed)


def predict(task: Task, train: FeatureSet, test: FeatureSet, config: EvalConfig, *, seed: int) -> Tensor:
    """The class of every token of `test` by the probe of one seed, as `evaluate` fits it: int64 [N, t, h, w]."""
    return _predictions([task], train, test, config, seed)[task.name].view(test.features["tokens"].shape[:4])


def _predictions(
    tasks: Sequence[Task], train: FeatureSet, test: FeatureSet, config: EvalConfig, seed: int
) -> dict[str, Tensor]:
    """Task -> the classes of the test tokens, int64 [N * t * h * w], by one probe each."""
    rows, test_rows = (features.features["tokens"].flatten(0, 3) for features in (train, test))
    problems = {task.name: Problem(_token_labels(task, train), len(task.classes)) for task in tasks}
    heads = fit_linear(rows, problems, config.fit, seed=seed)
    return {name: head.predict(test_rows) for name, head in heads.items()}


def segmentation_scores(task: Task, counts: ConfusionMatrix, seed: int) -> Iterator[Score]:
    """The mIoU, and where the task asks for them the IoU of each class and the accuracy of its focus."""
    yield Score(task.name, task.probe, "mIoU", seed, counts.miou())
    if task.per_class:
        for name, value in zip(task.classes, counts.iou().tolist(), strict=True):
            if value == value:  # a class that neither occurs nor is predicted has no IoU
                yield Score(f"{task.name}_{name}", task.probe, "IoU", seed, value)
    if task.focus is not None:
        classes = [task.classes.index(name) for name in task.focus.classes]
        yield Score(f"{task.name}_{task.focus.name}", task.probe, "accuracy", seed, counts.accuracy(classes))


def _token_labels(task: Task, data: FeatureSet) -> Tensor:
    """The truth of each token [N * t * h * w], on the grid of the features."""
    labels, grid = data.labels[task.label], data.features["tokens"].shape[:4]
    if labels.shape != grid:
        raise ValueError(
            f"task {task.name}: labels {list(labels.shape)} do not lie on the features' grid {list(grid)}; read them "
            "with the patch and tubelet size of the source"
        )
    return labels.flatten()
