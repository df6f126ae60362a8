"""One class per clip by a linear probe: top-1 accuracy on the test set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from evals.features import FeatureSet
from evals.fit import Problem, fit_linear
from evals.metrics import accuracy
from evals.protocol import EvalConfig, Readout, Score, Task


def evaluate(tasks: Sequence[Task], train: FeatureSet, test: FeatureSet, config: EvalConfig) -> Iterator[Score]:
    """Scores of all tasks; those of one readout are fitted together."""
    readouts: dict[Readout, list[Task]] = {}
    for task in tasks:
        readouts.setdefault(task.readout, []).append(task)
    for readout, group in readouts.items():
        problems = {task.name: Problem(train.labels[task.label], len(task.classes)) for task in group}
        for seed in config.seeds:
            heads = fit_linear(train.features[readout], problems, config.fit, seed=seed)
            for task in group:
                predicted = heads[task.name].predict(test.features[readout])
                yield Score(task.name, task.probe, "accuracy", seed, accuracy(predicted, test.labels[task.label]))
