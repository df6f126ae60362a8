"""Which values a sweep tries: syntax, grids, draws, and bisections of known response curves."""

import itertools
import math
import random
from collections.abc import Callable

import pytest

from launch.search import Axis, SweepError, Trial, best_of, bisect, draws, grid, ranged, read_axis, verdict

KEY = "objective.terms.sigreg.weight"
Curve = Callable[[float], Trial]


def wide(low: str = "1e-3", high: str = "1e3") -> Axis:
    return ranged(Axis(KEY), low, high)


def trial(value: float, score: float, *, healthy: bool = True) -> Trial:
    return Trial({KEY: f"{value:g}"}, alarms=() if healthy else ("video/level2/rankme",), score=score)


def search(curve: Curve, axis: Axis | None = None, runs: int = 6) -> list[Trial]:
    """A whole bisection against a known curve."""
    trials: list[Trial] = []
    while len(trials) < runs:
        value, _ = bisect(axis or wide(), trials)
        if value is None:
            break
        trials.append(curve(float(value)))
    return trials


def plateau(cliff: float, end: float, *, noise: float = 0.0, seed: int = 0) -> Curve:
    """Unhealthy below `cliff`, .6 up to `end`, then .1 less for every factor of ten."""

    def curve(value: float) -> Trial:
        fall = 0.1 * max(0.0, math.log10(value / end))
        jitter = noise * random.Random(f"{seed}/{value:g}").uniform(-1, 1)
        return trial(value, 0.6 - fall + jitter, healthy=value >= cliff)

    return curve


def peak(best: float, *, cliff: float = 0.0) -> Curve:
    """.1 less for every factor of ten on both sides of `best`, unhealthy below `cliff`."""
    return lambda value: trial(value, 0.6 - 0.1 * abs(math.log10(value / best)), healthy=value >= cliff)


# ------------------------------------------------------------------------------------------------------ bisection


@pytest.mark.parametrize("cliff", [2e-3, 0.02, 0.2, 2.0, 20.0])
def test_a_plateau_of_one_decade_is_found_wherever_it_begins(cliff: float) -> None:
    """Good is what a grid of 12 would call so: healthy and within .02 of the best."""
    trials = search(plateau(cliff, 10 * cliff))
    found = best_of(trials)
    assert found is not None
    assert found.is_healthy
    assert found.score is not None
    assert found.score >= 0.58, [t.values for t in trials]
    assert len(trials) <= 6


@pytest.mark.parametrize("best", [0.003, 0.03, 0.3, 3.0, 30.0, 300.0])
def test_a_peak_without_a_cliff_is_found_to_a_third_of_a_decade(best: float) -> None:
    found = best_of(search(peak(best)))
    assert found is not None
    assert abs(math.log10(found.value / best)) < 1 / 3


def test_a_peak_right_of_the_cliff_is_found_and_every_value_left_of_it_called_too_low() -> None:
    trials = search(peak(50.0, cliff=10.0))
    found = best_of(trials)
    assert found is not None
    assert abs(math.log10(found.value / 50.0)) < 1 / 3
    for index, one in enumerate(trials):
        if one.value < 10:
            assert verdict(trials[:index], one) == "too low: collapse alarms stand"


@pytest.mark.parametrize("seed", range(10))
def test_noise_in_the_scores_costs_no_more_than_twice_its_size(seed: int) -> None:
    """Probes of the same weight differ by the seed; the choice is still healthy and good up to the noise."""
    found = best_of(search(plateau(0.05, 5.0, noise=0.01, seed=seed)))
    assert found is not None
    assert found.value >= 0.05
    assert 0.6 - 0.1 * max(0.0, math.log10(found.value / 5.0)) >= 0.58


def test_halving_and_golden_sections_need_logarithmically_many_runs() -> None:
    """Twice the decades, a few runs more; at the end the best is known within the resolution."""
    counts = []
    for high in ("1e3", "1e9"):
        trials = search(peak(0.05), wide("1e-3", high), runs=40)
        found = best_of(trials)
        assert found is not None
        assert abs(math.log(found.value / 0.05)) < math.log(1.5)
        counts.append(len(trials))
    assert counts[0] < counts[1] <= counts[0] + 5, counts
    assert counts[0] <= 10, "it ends by itself, once both neighbours are near"


def test_where_nothing_is_healthy_no_value_is_chosen_and_the_lower_part_is_looked_at_too() -> None:
    trials = search(lambda value: trial(value, 0.3, healthy=False), runs=8)
    assert best_of(trials) is None
    values = [one.value for one in trials]
    assert values[:3] == [1.0, 31.6, 178.0], "up, as long as there is room"
    assert min(values) < 0.1


def test_unhealthy_above_a_healthy_value_is_too_high() -> None:
    """A weight that drowns the prediction raises alarms too: health has two ends."""

    def window(value: float) -> Trial:
        return trial(value, 0.5 + 0.01 * math.log10(value), healthy=0.5 <= value <= 8)

    trials = search(window)
    assert verdict(trials[:1], trials[1]) == "unhealthy above a healthy value: too high"
    found = best_of(trials)
    assert found is not None
    assert 2 <= found.value <= 8


def test_failed_runs_are_passed_below_and_never_chosen() -> None:
    def diverges(value: float) -> Trial:
        return Trial({KEY: f"{value:g}"}, "failed", None) if value > 0.5 else peak(0.1, cliff=0.01)(value)

    trials = search(diverges)
    assert trials[0].status == "failed"
    assert verdict([], trials[0]) == "failed: taken for too high"
    found = best_of(trials)
    assert found is not None
    assert found.status == "finished"
    assert abs(math.log10(found.value / 0.1)) < 1 / 2


def test_whole_numbers_are_not_tried_twice() -> None:
    trials = search(lambda value: trial(value, -abs(value - 3)), ranged(Axis(KEY), "1", "8"), runs=20)
    values = [one.value for one in trials]
    assert len(set(values)) == len(values)
    assert all(value == int(value) for value in values)
    found = best_of(trials)
    assert found is not None
    assert found.value == 3


def test_the_search_is_a_function_of_what_is_known() -> None:
    trials = search(peak(20.0, cliff=2.0))
    for count, one in enumerate(trials):
        assert bisect(wide(), trials[:count])[0] == one.values[KEY]


# ------------------------------------------------------------------------------------------------- values of a key


def test_lists_and_ranges_are_read_as_documented() -> None:
    assert read_axis("a.b=1,2,3") == Axis("a.b", ("1", "2", "3"))
    assert read_axis("model.levels=[2,4],[4]") == Axis("model.levels", ("[2,4]", "[4]"))
    assert read_axis("a.b=1e-3..10") == Axis("a.b", low=1e-3, high=10)
    assert read_axis("a.b=-1..1.5").is_log is False
    assert read_axis("train.batch.video=4..64").is_whole
    assert math.isnan(read_axis("a.b").low)


@pytest.mark.parametrize("text", ["a=1,,2", "a=1,1", "a=", "a=3..1", "a=x..y", "a=1..inf"])
def test_values_that_are_none_are_refused_by_key(text: str) -> None:
    with pytest.raises(SweepError, match="a"):
        read_axis(text)


def test_a_grid_is_even_in_logarithms_and_holds_both_ends() -> None:
    values = [float(row[KEY]) for row in grid([wide()], 12)]
    assert (values[0], values[-1], len(values)) == (1e-3, 1e3, 12)
    ratios = [b / a for a, b in itertools.pairwise(values)]
    assert max(ratios) / min(ratios) < 1.02
    straight = [float(row["a"]) for row in grid([read_axis("a=-1..1.0")], 5)]
    assert straight == [-1, -0.5, 0, 0.5, 1]


def test_a_grid_of_several_keys_combines_them_within_its_number_of_runs() -> None:
    axes = [read_axis("a=x,y"), read_axis("b=1.0..100"), read_axis("c=1.0..4")]
    rows = grid(axes, 20)
    assert len(rows) == 2 * 3 * 3, "three points of each range: four would be 32"
    assert {row["b"] for row in rows} == {"1", "10", "100"}
    assert {row["c"] for row in rows} == {"1", "2", "4"}
    with pytest.raises(SweepError, match="at least 8 runs; raise --runs"):
        grid(axes, 7)


def test_draws_lie_in_their_ranges_and_more_of_them_begin_with_the_same() -> None:
    axes = [wide(), read_axis("other=a,b")]
    many = draws(axes, 200)
    assert many[:7] == draws(axes, 7)
    logs = [math.log10(float(row[KEY])) for row in many]
    assert -3 <= min(logs) < -2.5
    assert 2.5 < max(logs) <= 3
    assert abs(sum(logs) / len(logs)) < 0.4, "even in logarithms"
    assert {row["other"] for row in many} == {"a", "b"}
