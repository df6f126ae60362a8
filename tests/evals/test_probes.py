"""Probes on synthetic truth: what is separable is found, what is not stays at chance, and nothing leaks."""

import pytest
import torch
from torch import Tensor

from evals.features import FeatureSet, read_out
from evals.fit import Problem, fit_linear
from evals.heads import Standardiser
from evals.protocol import IGNORE, EvalConfig, FitConfig, Focus, KnnConfig, Readout, Score, Task
from evals.tasks import classification, knn, segmentation

COLOURS = ("red", "green", "blue")
SHORT = FitConfig(steps=100)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_labels(*shape: int, classes: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed))


def clusters(labels: Tensor, *, width: int = 12, seed: int = 0) -> Tensor:
    """Features in well separated clusters, on scales that differ by a factor of a thousand: [*labels, width]."""
    centres = random(3, width, seed=99)
    scale = torch.logspace(-2, 1, width)
    return (centres[labels] + 0.1 * random(*labels.shape, width, seed=seed)) * scale + 5


def clip_sets(train_labels: Tensor, test_labels: Tensor) -> list[FeatureSet]:
    """Sets whose tokens [N, 2, 2, 2, D] all belong to their clip's cluster, by the true label."""
    truths = random_labels(len(train_labels), seed=1), random_labels(len(test_labels), seed=2)
    sets = []
    for truth, labels, seed in zip(truths, (train_labels, test_labels), (3, 4), strict=True):
        tokens = clusters(truth.view(-1, 1, 1, 1).expand(-1, 2, 2, 2), seed=seed)
        features: dict[Readout, Tensor] = {
            "mean": read_out(tokens, "mean"),
            "msm": read_out(tokens, "msm"),
            "tokens": tokens,
        }
        token_labels = labels.view(-1, 1, 1, 1).expand(-1, 2, 2, 2)
        sets.append(FeatureSet(features, {"colour": labels, "token_colour": token_labels}))
    return sets


CLIP_TASKS = [
    Task("colour", "classification", "colour", COLOURS, "mean"),
    Task("colour_msm", "classification", "colour", COLOURS, "msm"),
]
KNN_TASK = Task("colour_knn", "knn", "colour", COLOURS, "mean")
TOKEN_TASK = Task("layout", "segmentation", "token_colour", COLOURS, "tokens")


def all_scores(train: FeatureSet, test: FeatureSet) -> list[Score]:
    config = EvalConfig(seeds=(0, 1), fit=SHORT)
    return [
        *classification.evaluate(CLIP_TASKS, train, test, config),
        *knn.evaluate([KNN_TASK], train, test, config),
        *segmentation.evaluate([TOKEN_TASK], train, test, config),
    ]


def test_separable_clusters_give_one_hundred_percent_on_every_task() -> None:
    scores = all_scores(*clip_sets(random_labels(90, seed=1), random_labels(60, seed=2)))
    assert {(score.task, score.seed) for score in scores} == {
        ("colour", 0),
        ("colour", 1),
        ("colour_msm", 0),
        ("colour_msm", 1),
        ("colour_knn", 0),
        ("layout", 0),
        ("layout", 1),
    }
    assert [score.value for score in scores] == [1.0] * 7


def test_shuffled_labels_give_chance() -> None:
    """Labels that have nothing to do with the clusters: a third is right, whatever the probe."""
    scores = all_scores(*clip_sets(random_labels(300, seed=7), random_labels(900, seed=8)))
    for score in scores:
        if score.metric == "accuracy":
            assert score.value == pytest.approx(1 / 3, abs=0.07), score


def test_a_segmentation_reports_its_parts_under_their_own_names() -> None:
    train, test = clip_sets(random_labels(30, seed=1), random_labels(30, seed=2))
    warm = Focus("warm", ("red", "green"))
    task = Task("layout", "segmentation", "token_colour", COLOURS, "tokens", per_class=True, focus=warm)
    scores = segmentation.evaluate([task], train, test, EvalConfig(seeds=(5,), fit=SHORT))
    assert [(score.task, score.metric, score.seed, score.value) for score in scores] == [
        ("layout", "mIoU", 5, 1.0),
        ("layout_red", "IoU", 5, 1.0),
        ("layout_green", "IoU", 5, 1.0),
        ("layout_blue", "IoU", 5, 1.0),
        ("layout_warm", "accuracy", 5, 1.0),
    ]


def test_token_labels_on_another_grid_are_refused() -> None:
    train, test = clip_sets(random_labels(9, seed=1), random_labels(9, seed=2))
    coarse = FeatureSet(train.features, {"token_colour": torch.zeros(9, 1, 2, 2, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"layout: labels \[9, 1, 2, 2\] do not lie on the features' grid"):
        list(segmentation.evaluate([TOKEN_TASK], coarse, test, EvalConfig()))


# --------------------------------------------------------------------------------------------------- the linear fit


def test_the_scale_of_a_feature_does_not_matter() -> None:
    labels = random_labels(60)
    features = clusters(labels)
    scaled = features * torch.logspace(-1, 1, features.shape[1]) - 2
    heads = [fit_linear(given, {"x": Problem(labels, 3)}, SHORT, seed=0)["x"] for given in (features, scaled)]
    torch.testing.assert_close(heads[0](features), heads[1](scaled), rtol=1e-2, atol=1e-2)


def test_standardisation_uses_training_statistics_only() -> None:
    train, test = 3 + 2 * random(500, 4), 100 + 7 * random(300, 4, seed=1)
    scale = Standardiser.fit(train)
    torch.testing.assert_close(scale(train).mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(scale(train).std(0, correction=0), torch.ones(4))
    torch.testing.assert_close(scale(test), (test - train.mean(0)) / train.std(0, correction=0))


def test_a_prediction_does_not_depend_on_the_other_test_rows() -> None:
    """Were the test set's own statistics used, a row would be judged by its company."""
    labels = random_labels(60)
    head = fit_linear(clusters(labels), {"x": Problem(labels, 3)}, SHORT, seed=0)["x"]
    test = clusters(random_labels(20, seed=5), seed=6)
    torch.testing.assert_close(head(test)[:3], head(test[:3]))
    torch.testing.assert_close(head(torch.cat([test[:3], 1000 + test]))[:3], head(test[:3]))


def test_a_feature_that_is_constant_in_training_tells_nothing_in_the_test() -> None:
    labels = random_labels(60)
    constant = torch.full((60, 1), 0.1)
    features = torch.cat([clusters(labels), constant + 1e-8 * random(60, 1)], dim=1)
    head = fit_linear(features, {"x": Problem(labels, 3)}, SHORT, seed=0)["x"]
    moved = features.clone()
    moved[:, -1] = 1000
    assert torch.equal(head(features), head(moved))


def test_problems_fitted_together_are_fitted_as_alone() -> None:
    """Also in mini-batches: each problem sees the same rows and starts from the same weights."""
    features = random(200, 6)
    problems = {"a": Problem(random_labels(200, seed=1), 3), "b": Problem(random_labels(200, classes=5, seed=2), 5)}
    config = FitConfig(steps=30, batch_size=64)
    together = fit_linear(features, problems, config, seed=0)
    for name, problem in problems.items():
        alone = fit_linear(features, {name: problem}, config, seed=0)[name]
        torch.testing.assert_close(together[name].weight, alone.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch_size", [64, 1000], ids=["mini-batches", "all rows"])
def test_a_fit_is_a_function_of_its_seed(batch_size: int) -> None:
    features, problems = random(200, 6), {"a": Problem(random_labels(200, seed=1), 3)}
    config = FitConfig(steps=20, batch_size=batch_size)
    first, again, other = (fit_linear(features, problems, config, seed=seed)["a"].weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_fit_is_adamw_on_cross_entropy_with_a_cosine_to_zero() -> None:
    """Against torch's own parts put together, from weights of zero."""
    features, labels = random(50, 6), random_labels(50, seed=1)
    config = FitConfig(lr=0.1, weight_decay=0.3, steps=40, init_std=0)
    model = torch.nn.Linear(6, 3)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    rows = Standardiser.fit(features)(features)
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(rows), labels).backward()
        optimizer.step()
        schedule.step()
    head = fit_linear(features, {"a": Problem(labels, 3)}, config, seed=0)["a"]
    torch.testing.assert_close(head(features), model(rows), rtol=1e-3, atol=1e-4)


def test_the_order_of_rows_is_the_seeds_too() -> None:
    """From weights of zero, mini-batches tell two seeds apart; on all rows at once nothing is left to chance."""
    features, problems = random(200, 6), {"a": Problem(random_labels(200, seed=1), 3)}

    def weights(batch_size: int) -> list[Tensor]:
        config = FitConfig(steps=20, batch_size=batch_size, init_std=0)
        return [fit_linear(features, problems, config, seed=seed)["a"].weight for seed in (0, 1)]

    assert not torch.equal(*weights(64))
    assert torch.equal(*weights(200))


def test_ignored_rows_have_no_part_in_the_fit() -> None:
    labels = random_labels(60)
    wrong = torch.cat([labels, torch.full((60,), IGNORE)])
    features = clusters(labels)
    both = torch.cat([features, features.flip(0)])  # standardised alike
    with_ignored = fit_linear(both, {"x": Problem(wrong, 3)}, SHORT, seed=0)["x"]
    without = fit_linear(features, {"x": Problem(labels, 3)}, SHORT, seed=0)["x"]
    torch.testing.assert_close(with_ignored.weight, without.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.full((4, 2), torch.nan), torch.zeros(4, dtype=torch.int64), "finite"),
        (torch.zeros(4, 2), torch.zeros(3, dtype=torch.int64), "do not fit features"),
        (torch.zeros(4, 2), torch.full((4,), 3), r"classes in 0\.\.2"),
        (torch.zeros(4, 2), torch.full((4,), IGNORE), "every label is ignored"),
    ],
)
def test_what_cannot_be_fitted_is_refused(features: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_linear(features, {"x": Problem(labels, 3)}, seed=0)


# ------------------------------------------------------------------------------------------------------------- k-NN


def test_the_only_neighbour_decides() -> None:
    """By the angle, not by the distance: the nearest point in space has the wrong class."""
    train = torch.tensor([[10.0, 1.0], [0.0, 1.0]])
    test = torch.tensor([[0.5, 0.1], [0.1, 0.5]])
    predicted = knn.knn_predict(train, torch.tensor([2, 0]), test, num_classes=3, config=KnnConfig(k=1))
    assert predicted.tolist() == [2, 0]


def test_the_temperature_weighs_near_against_many() -> None:
    """One neighbour at cosine 1 against two at cosine 0.8: exp(0.2 / T) votes against 2."""
    angle = torch.tensor(0.8).arccos()
    off = torch.stack([angle.cos(), angle.sin()])
    train, labels = (
        torch.stack([torch.tensor([1.0, 0.0]), off, off * torch.tensor([1.0, -1.0])]),
        torch.tensor([0, 1, 1]),
    )
    test = torch.tensor([[3.0, 0.0]])
    for temperature, winner in ((0.2, 0), (0.4, 1)):  # exp(1) > 2 > exp(0.5)
        config = KnnConfig(k=3, temperature=temperature)
        assert knn.knn_predict(train, labels, test, num_classes=2, config=config).item() == winner
    assert knn.knn_predict(train, labels, test, num_classes=2, config=KnnConfig(k=1, temperature=0.4)).item() == 0


def test_more_neighbours_than_clips_is_all_of_them() -> None:
    labels = torch.tensor([1, 1, 0])
    assert knn.knn_predict(random(3, 4), labels, random(2, 4, seed=1), num_classes=2).shape == (2,)
