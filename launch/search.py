"""Which values a sweep tries: grids, draws, and a bisection that decides after each run; pure functions.

The bisection finds the weight of a term that holds an encoder up. Too low, and the run's collapse alarms stand at its
end: there the weight is searched for by halving on a log scale. Among healthy runs the probe score decides: it rises
to a best weight and falls behind it, so each new value lies in the wider gap beside the best one known, a golden
section away from it. Both shrink the interval by a constant factor a run: O(log n) runs for n distinguishable weights.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

GOLDEN = (3 - math.sqrt(5)) / 2  # .382, the share of a gap that is stepped over
RESOLUTION = 1.5  # neighbours of the best value closer than this factor end a bisection
WHOLE = re.compile(r"[+-]?\d+")
RANGE = re.compile(r"(?P<low>[^,]+?)\.\.(?P<high>[^,]+)")


class SweepError(ValueError):
    """A sweep that cannot be run as asked; the message says which setting and what to do."""


@dataclass(frozen=True)
class Axis:
    """The values of one key: those listed, or a range."""

    key: str
    values: tuple[str, ...] = ()
    low: float = math.nan
    high: float = math.nan
    is_whole: bool = False  # a range of whole numbers

    @property
    def is_range(self) -> bool:
        return not self.values

    @property
    def is_log(self) -> bool:
        """Ranges of positive values are divided by their logarithm."""
        return self.low > 0

    def at(self, share: float) -> str:
        """The value at a share in [0, 1] of the range, to three digits."""
        if self.is_log:
            value = math.exp(math.log(self.low) + share * math.log(self.high / self.low))
        else:
            value = self.low + share * (self.high - self.low)
        return self.written(value)

    def written(self, value: float) -> str:
        return str(round(value)) if self.is_whole else f"{float(f'{value:.3g}'):g}"


def read_axis(text: str) -> Axis:
    """`KEY=a,b,c`, `KEY=LOW..HIGH` or `KEY` alone, whose range is said elsewhere.

    Raises SweepError for an empty list and for a range that does not rise.
    """
    key, equals, values = text.partition("=")
    if not equals:
        return Axis(key)
    if match := RANGE.fullmatch(values):
        return ranged(Axis(key), match["low"], match["high"])
    listed = tuple(re.split(r",(?![^\[]*\])", values))  # not inside a list such as [2,4]
    if not all(listed) or len(set(listed)) < len(listed):
        raise SweepError(f"--sweep {text}: write KEY=a,b,c without empty or repeated values, or KEY=LOW..HIGH")
    return Axis(key, listed)


def ranged(axis: Axis, low: str, high: str) -> Axis:
    """The axis with a range of values, whole ones where both ends are written without a point or exponent."""
    try:
        ends = float(low), float(high)
    except ValueError as error:
        raise SweepError(f"range {low} to {high} of {axis.key}: both ends must be numbers") from error
    if not (math.isfinite(ends[0]) and math.isfinite(ends[1]) and ends[0] < ends[1]):
        raise SweepError(f"range {low} to {high} of {axis.key}: the low end must lie below the high one")
    is_whole = all(WHOLE.fullmatch(end) for end in (low, high))
    return replace(axis, low=ends[0], high=ends[1], is_whole=is_whole)


# ------------------------------------------------------------------------------------------------ grids and draws

Values = dict[str, str]  # key -> value, as written on a command line


def grid(axes: Sequence[Axis], runs: int) -> list[Values]:
    """All combinations of listed values and of as many evenly spaced ones of each range as `runs` allows."""
    listed = math.prod(len(axis.values) for axis in axes if not axis.is_range)
    ranges = sum(axis.is_range for axis in axes)
    points = 1
    while ranges and listed * (points + 1) ** ranges <= runs:
        points += 1
    if listed > runs or (ranges and points < 2):
        raise SweepError(
            f"--runs {runs}: a grid of these values has at least {listed * 2**ranges} runs; raise --runs, list fewer "
            "values, or use --method random"
        )
    columns = [axis.values or [axis.at(index / (points - 1)) for index in range(points)] for axis in axes]
    rows = itertools.product(*(dict.fromkeys(column) for column in columns))  # whole numbers may fall together
    return [dict(zip((axis.key for axis in axes), row, strict=True)) for row in rows]


def draws(axes: Sequence[Axis], runs: int) -> list[Values]:
    """`runs` random points; each is a function of its index alone, so that more runs begin with the same ones."""
    return [{axis.key: _draw(axis, index) for axis in axes} for index in range(runs)]


def _draw(axis: Axis, index: int) -> str:
    source = random.Random(f"{axis.key}/{index}")
    return axis.at(source.random()) if axis.is_range else source.choice(axis.values)


# ------------------------------------------------------------------------------------------------------ bisection


@dataclass(frozen=True)
class Trial:
    """What became of one run."""

    values: Mapping[str, str]
    status: Literal["finished", "failed"] = "finished"
    alarms: tuple[str, ...] | None = ()
    """Measures whose alarms stand at the run's end; None: too few evaluations to judge."""
    score: float | None = None
    """Higher is better."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """What it is made of."""
    seconds: float = 0.0
    """Of training."""
    note: str = ""
    """Why it failed."""

    @property
    def is_healthy(self) -> bool:
        return self.status == "finished" and not self.alarms and self.score is not None

    @property
    def value(self) -> float:
        """Of a sweep over one key."""
        (text,) = self.values.values()
        return float(text)


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The healthy run with the highest score, the first of equals; None where no run is healthy."""
    return max((trial for trial in trials if trial.is_healthy), key=_score, default=None)


def _score(trial: Trial) -> float:
    return -math.inf if trial.score is None else trial.score


def bisect(axis: Axis, trials: Sequence[Trial]) -> tuple[str | None, str]:
    """The next value to try and why, or None and why the search is over."""
    best = best_of(trials)
    gap = _beside(axis, trials, best.value) if best is not None else _where_health_may_begin(axis, trials)
    if gap is None:
        return None, f"no gap of more than a factor {RESOLUTION:g} is left"
    (start, end), share, why = gap
    value = axis.written(math.exp(math.log(start) + share * math.log(end / start)))
    if any(trial.value == float(value) for trial in trials):
        return None, f"{value} is the only value between its neighbours"
    return value, why


Gap = tuple[tuple[float, float], float, str]
"""From, to, the share of the way (in logarithms) at which to look, and why."""


def _beside(axis: Axis, trials: Sequence[Trial], best: float) -> Gap | None:
    """The wider of the gaps between the best value and its neighbours: all that is further off is worse."""
    below = max((trial.value for trial in trials if trial.value < best), default=axis.low)
    above = min((trial.value for trial in trials if trial.value > best), default=axis.high)
    if max(best / below, above / best) <= RESOLUTION:
        return None
    is_upwards = above / best >= best / below * (1 - 1e-9)  # the upper of equal ones
    return (best, above if is_upwards else below), GOLDEN, f"the wider gap beside {best:g}, the best so far"


def _where_health_may_begin(axis: Axis, trials: Sequence[Trial]) -> Gap | None:
    """Half way up from the highest unhealthy value to the lowest one that failed; where nothing is left, below it."""
    low = max((trial.value for trial in trials if trial.status == "finished"), default=axis.low)
    high = min((trial.value for trial in trials if trial.status == "failed" and trial.value > low), default=axis.high)
    if not trials:
        return (low, high), 0.5, "the middle of the range"
    if high / low > RESOLUTION:
        return (low, high), 0.5, "too low so far: half way up"
    known = sorted({axis.low, axis.high, *(trial.value for trial in trials)})
    start, end = max(itertools.pairwise(known), key=lambda gap: gap[1] / gap[0])
    return ((start, end), 0.5, "nothing healthy up to the top: the widest gap") if end / start > RESOLUTION else None


def verdict(trials: Sequence[Trial], trial: Trial) -> str:
    """What a bisection concludes from a run, given those before it."""
    best = best_of(trials)
    if trial.status == "failed":
        return "failed: taken for too high" if best is None else f"failed: the best lies on the side of {best.value:g}"
    if not trial.is_healthy:
        is_above = best is not None and trial.value > best.value
        return "unhealthy above a healthy value: too high" if is_above else "too low: collapse alarms stand"
    if best is None:
        return "healthy, the first: its neighbours decide"
    side = "above" if trial.value > best.value else "below"
    if _score(trial) > _score(best):
        return f"better than {best.value:g}: the best lies {side} {best.value:g}"
    return f"no better than {best.value:g}: the best is not further {'up' if side == 'above' else 'down'}"
