"""The measures of collapse have their known values, and the alarms tell a collapsing network from a healthy one."""

import json
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from vjepa.train.diagnostics import (
    AlarmConfig,
    CollapseAlarms,
    cross_sample_gap,
    feature_std,
    mean_cosine,
    rankme,
    target_prediction_cosine,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_identical_rows_read_as_collapsed() -> None:
    z = random(1, 16).expand(64, 16)
    assert feature_std(z).item() == pytest.approx(0, abs=1e-6)
    assert mean_cosine(z).item() == pytest.approx(1, abs=1e-6)
    assert rankme(z).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("shape", [(12, 12), (8, 40)])
def test_orthonormal_rows_have_full_rank_and_cosine_zero(shape: tuple[int, int]) -> None:
    z = torch.linalg.qr(random(shape[1], shape[1]))[0][: shape[0]]
    assert rankme(z).item() == pytest.approx(shape[0], rel=1e-5)
    assert mean_cosine(z).item() == pytest.approx(0, abs=1e-6)


def test_rankme_of_known_singular_values() -> None:
    singular = torch.tensor([4.0, 2.0, 1.0, 1.0])
    z = torch.linalg.qr(random(30, 4))[0] @ torch.diag(singular) @ torch.linalg.qr(random(4, 4, seed=1))[0]
    p = [s / 8 for s in (4, 2, 1, 1)]
    assert rankme(z).item() == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)), rel=1e-5)


def test_white_noise_is_healthy() -> None:
    z = random(4000, 32)
    assert feature_std(z).item() == pytest.approx(1, abs=0.02)
    assert abs(mean_cosine(z).item()) < 2e-3
    assert rankme(z).item() > 31.9


def test_mean_cosine_equals_the_mean_over_all_pairs() -> None:
    z = random(20, 5) + 1
    unit = z / z.norm(dim=1, keepdim=True)
    pairs = (unit @ unit.T)[~torch.eye(20, dtype=torch.bool)]
    assert mean_cosine(z).item() == pytest.approx(pairs.mean().item(), abs=1e-6)


def test_rank_is_not_centred() -> None:
    """A constant with tiny noise is a collapsed network; centring would call its noise full rank."""
    z = random(1, 16) + 1e-4 * random(256, 16, seed=1)
    assert rankme(z).item() < 1.1
    assert rankme(z - z.mean(dim=0)).item() > 15


def test_zero_features_read_as_collapsed_and_finite() -> None:
    z = torch.zeros(8, 4)
    assert feature_std(z).item() == 0
    assert rankme(z).item() == 1
    assert mean_cosine(z).item() == 0
    still = torch.zeros(2, 3, 4)
    assert cross_sample_gap(still, still, still).item() == 0


def test_cosine_of_prediction_and_target() -> None:
    target = random(2, 3, 8)
    assert target_prediction_cosine(2 * target, target).item() == pytest.approx(1, abs=1e-6)
    assert target_prediction_cosine(-target, target).item() == pytest.approx(-1, abs=1e-6)


def test_gap_is_zero_for_constant_and_for_positional_targets() -> None:
    constant = random(8).expand(4, 6, 8)
    assert cross_sample_gap(constant, constant, constant.roll(1, 0)).item() == 0
    positional = random(6, 8, seed=1).expand(4, 6, 8)
    assert cross_sample_gap(positional + 0.1, positional, positional.roll(1, 0)).item() == 0


def test_gap_is_one_for_perfect_and_above_a_half_for_good_prediction() -> None:
    target = random(4, 6, 8)
    assert cross_sample_gap(target, target, target.roll(1, 0)).item() == 1
    close = target + 0.3 * random(4, 6, 8, seed=1)
    assert cross_sample_gap(close, target, target.roll(1, 0)).item() > 0.5


def test_measures_do_not_depend_on_autocast_and_are_zero_dimensional() -> None:
    z, target, other = random(64, 16), random(4, 6, 8, seed=1), random(4, 6, 8, seed=2)
    calls = [
        lambda: feature_std(z),
        lambda: mean_cosine(z),
        lambda: rankme(z),
        lambda: target_prediction_cosine(target, other),
        lambda: cross_sample_gap(target + 0.5 * other, target, other),
    ]
    for call in calls:
        plain = call()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = call()
        assert plain.shape == ()
        assert inside.dtype == torch.float32
        assert torch.equal(plain, inside)


def test_wrong_shapes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"\[N, D\].*\[1, 8\]"):
        rankme(torch.zeros(1, 8))
    with pytest.raises(ValueError, match=r"other.*must have one shape"):
        cross_sample_gap(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 2, 4))


def row(values: Mapping[str, float], place: str = "video/level4") -> dict[str, float]:
    return {f"diag/{place}/{name}": value for name, value in values.items()}


HEALTHY = {"feature_std": 0.6, "mean_cosine": 0.5, "rankme": 40.0, "cross_sample_gap": 0.2}


@pytest.mark.parametrize(
    ("metric", "bad"), [("mean_cosine", 0.97), ("rankme", 19.0), ("feature_std", 0.05), ("cross_sample_gap", 0.01)]
)
def test_an_alarm_needs_two_evaluations_in_a_row_and_names_everything(metric: str, bad: float) -> None:
    alarms = CollapseAlarms(AlarmConfig(warmup_steps=10))
    assert alarms.observe(10, row(HEALTHY)) == []
    assert alarms.observe(20, row(HEALTHY | {metric: bad})) == []
    assert alarms.observe(30, row(HEALTHY)) == []
    assert alarms.observe(40, row(HEALTHY | {metric: bad})) == []
    (text,) = alarms.observe(50, row(HEALTHY | {metric: bad}))
    assert text.startswith(f"video level 4: {metric} {bad:.4g} is")
    assert "2 evaluations in a row" in text
    assert "EMA momentum" in text


def test_the_warm_up_is_exempt_and_leaves_no_trace() -> None:
    alarms = CollapseAlarms(AlarmConfig(warmup_steps=100))
    for step in (0, 50):
        assert alarms.observe(step, row({"mean_cosine": 0.99, "rankme": 500.0})) == []
    assert alarms.observe(100, row({"mean_cosine": 0.99, "rankme": 40.0})) == []
    assert [
        text.split(":")[1].split()[0] for text in alarms.observe(150, row({"mean_cosine": 0.99, "rankme": 40.0}))
    ] == ["mean_cosine"]


def test_levels_and_modalities_are_judged_apart() -> None:
    alarms = CollapseAlarms(AlarmConfig(warmup_steps=0))
    alarms.observe(0, row({"mean_cosine": 0.99}, "video/level2") | row({"mean_cosine": 0.1}, "image/level4"))
    texts = alarms.observe(1, row({"mean_cosine": 0.1}, "video/level2") | row({"mean_cosine": 0.99}, "image/level4"))
    assert texts == []
    (text,) = alarms.observe(2, row({"mean_cosine": 0.1}, "video/level2") | row({"mean_cosine": 0.99}, "image/level4"))
    assert text.startswith("image level 4")


def test_a_value_that_is_not_finite_is_an_alarm() -> None:
    alarms = CollapseAlarms(AlarmConfig(warmup_steps=0, consecutive=1))
    (text,) = alarms.observe(0, row({"rankme": math.nan}))
    assert "not finite" in text


def test_a_resumed_run_raises_the_same_alarms() -> None:
    rows = [row(HEALTHY), row(HEALTHY | {"rankme": 15.0}), row(HEALTHY | {"rankme": 14.0}), row(HEALTHY)]
    whole = CollapseAlarms(AlarmConfig(warmup_steps=0))
    expected = [whole.observe(step, values) for step, values in enumerate(rows)]
    assert expected[2]
    for cut in range(1, len(rows)):
        first, second = CollapseAlarms(AlarmConfig(warmup_steps=0)), CollapseAlarms(AlarmConfig(warmup_steps=0))
        seen = [first.observe(step, rows[step]) for step in range(cut)]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert seen + [second.observe(step, rows[step]) for step in range(cut, len(rows))] == expected


def train_joint_embedding(*, through_target: bool, seed: int = 0) -> list[list[str]]:
    """Train a tiny encoder to predict one noisy view from another; gradient through the target makes it collapse."""
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    predictor = nn.Linear(16, 16)
    target_encoder = encoder if through_target else nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    optimizer = torch.optim.Adam([*encoder.parameters(), *predictor.parameters()], lr=1e-2)
    alarms = CollapseAlarms(AlarmConfig(warmup_steps=25))
    history = []
    for step in range(150):
        x = torch.randn(64, 16)
        z = encoder(x + 0.1 * torch.randn_like(x))
        target = target_encoder(x) if through_target else target_encoder(x).detach()
        predicted = predictor(z)
        optimizer.zero_grad()
        (predicted - target).abs().mean().backward()
        optimizer.step()
        if step % 25 == 0:
            gap = cross_sample_gap(predicted[:, None], target[:, None], target.roll(1, 0)[:, None])
            measured = {"feature_std": feature_std(z), "mean_cosine": mean_cosine(z), "rankme": rankme(z)}
            measured["cross_sample_gap"] = gap
            history.append(alarms.observe(step, row({name: value.item() for name, value in measured.items()})))
    return history


def test_the_alarms_separate_a_collapsing_network_from_a_healthy_one() -> None:
    collapsed, healthy = train_joint_embedding(through_target=True), train_joint_embedding(through_target=False)
    assert collapsed[-1]
    assert not any(healthy)
