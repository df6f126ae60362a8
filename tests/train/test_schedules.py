"""Learning rate, weight decay and momentum are functions of the step, and end where the recipe says."""

import pytest
import torch
from torch import nn

from vjepa.schedules import LearningRateConfig, interpolate, linear_ramp
from vjepa.train.optim import OptimConfig, build_optimizer, set_schedule

TOTAL = 100


def test_warmup_is_linear_from_start_to_peak() -> None:
    schedule = LearningRateConfig(start=1.0, peak=3.0, final=3.0, warmup_steps=10)
    assert [schedule.at(step, TOTAL) for step in (0, 5, 10)] == [1.0, 2.0, 3.0]


def test_constant_stays_at_the_peak() -> None:
    schedule = LearningRateConfig(start=0.0, peak=0.3, final=0.3, warmup_steps=10)
    assert {schedule.at(step, TOTAL) for step in range(10, TOTAL)} == {0.3}


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_decay_begins_at_the_peak_and_ends_at_final_with_the_last_step(decay: str) -> None:
    schedule = LearningRateConfig(start=0.0, peak=0.7, final=0.1, warmup_steps=10, decay=decay)  # pyright: ignore[reportArgumentType]
    rates = [schedule.at(step, TOTAL) for step in range(10, TOTAL)]
    assert rates[0] == 0.7
    assert rates[-1] == pytest.approx(0.1, rel=1e-15)
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == len(rates)


def test_half_way_down_cosine_and_linear_meet() -> None:
    for decay in ("linear", "cosine"):
        schedule = LearningRateConfig(start=0.0, peak=1.0, final=0.0, warmup_steps=0, decay=decay)
        assert schedule.at(50, 101) == pytest.approx(0.5)
    cosine = LearningRateConfig(start=0.0, peak=1.0, final=0.0, warmup_steps=0, decay="cosine")
    assert cosine.at(25, 101) == pytest.approx(0.8535533906)


def test_a_constant_schedule_with_another_final_rate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decay=constant stays at peak=0\.2, but final=0\.1"):
        LearningRateConfig(peak=0.2, final=0.1)


def test_a_run_as_long_as_its_warmup_has_rates() -> None:
    schedule = LearningRateConfig(start=0.0, peak=1.0, final=0.0, warmup_steps=10, decay="cosine")
    assert [schedule.at(step, 10) for step in (0, 9)] == [0.0, 0.9]
    assert LearningRateConfig(start=0.1, peak=0.1, final=0.1, warmup_steps=0).at(0, 1) == 0.1


def test_a_ramp_is_flat_outside_its_steps() -> None:
    assert [linear_ramp(step, 5, 15) for step in (0, 5, 10, 15, 20)] == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert linear_ramp(0, 0, 0) == 1.0  # constant from the first step


def test_interpolation_reaches_its_end_with_the_last_step() -> None:
    assert interpolate(0.04, 0.4, 0, TOTAL) == 0.04
    assert interpolate(0.04, 0.4, TOTAL - 1, TOTAL) == pytest.approx(0.4, rel=1e-15)
    assert interpolate(0.04, None, TOTAL - 1, TOTAL) == 0.04


def test_rate_and_decay_of_a_step_are_set_on_the_optimizer() -> None:
    config = OptimConfig(
        lr=LearningRateConfig(start=0.0, peak=1.0, final=1.0, warmup_steps=10), weight_decay=0.1, weight_decay_end=0.3
    )
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    assert set_schedule(optimizer, config, 5, 11) == {"lr": 0.5, "weight_decay": pytest.approx(0.2)}
    by_group = {group["group"]: group for group in optimizer.param_groups}
    assert by_group["decay"]["weight_decay"] == pytest.approx(0.2)
    assert by_group["no_decay"]["weight_decay"] == 0.0
    assert {group["lr"] for group in by_group.values()} == {0.5}
    assert isinstance(optimizer, torch.optim.AdamW)
