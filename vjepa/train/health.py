"""Is a step sound, and what happens where it is not.

Judged from numbers summed over all ranks, which are the same bits everywhere: every rank decides the same.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Policy = Literal["stop", "skip", "roll_back"]
JUDGED_FROM = 30  # sound steps before a loss can be called a spike


@dataclass
class HealthConfig:
    """What happens to a step whose loss or gradient is not finite, or whose loss jumps.

    stop: the run ends with an error. skip: no update is made from this step; it costs one wait for the device in every
    step. roll_back: the newest checkpoint is loaded, and the data from there up to and with this step are left out.
    """

    non_finite: Policy = "stop"  # for a loss or gradient norm that is not finite
    spike: Literal["ignore", "stop", "skip", "roll_back"] = "ignore"  # for a loss far above those before
    spike_std: float = 10.0  # how far: standard deviations above the mean of the window
    window: int = 300  # sound steps whose losses are the measure
    max_skipped: int = 10  # steps skipped in a row, above which the run stops
    max_roll_backs: int = 3  # roll backs of one run, above which it stops

    def __post_init__(self) -> None:
        if self.spike_std <= 0:
            raise ValueError(f"health.spike_std={self.spike_std} must be positive; spike=ignore switches it off")
        if self.window < JUDGED_FROM:
            raise ValueError(f"health.window={self.window} must be at least {JUDGED_FROM}")
        if min(self.max_skipped, self.max_roll_backs) < 1:
            raise ValueError(
                f"health.max_skipped={self.max_skipped} and max_roll_backs={self.max_roll_backs} must be at least 1"
            )

    @property
    def is_immediate(self) -> bool:
        """Whether a step must be judged before its update: to skip it."""
        return "skip" in (self.non_finite, self.spike)


@dataclass(frozen=True)
class Trouble:
    """A step that is not sound."""

    kind: Literal["non_finite", "spike"]
    policy: Policy
    step: int
    what: str


class UnsoundStepError(RuntimeError):
    """A step that ends the run; the message names the step, its samples and the file with what was captured."""


class NonFiniteError(UnsoundStepError):
    """A loss or gradient norm was not finite."""


class SpikeError(UnsoundStepError):
    """A loss jumped."""


class RollBack(Exception):
    """The run is to go back to its newest checkpoint; `error` ends it where that cannot be.

    `step` is the last one whose data are left out. With `before`, only checkpoints of fewer steps are good enough.
    """

    def __init__(self, step: int, error: RuntimeError, *, before: int | None = None) -> None:
        super().__init__(str(error))
        self.step, self.error, self.before = step, error, before


class Health:
    """Judges steps in their order. Its state is plain numbers, part of the checkpoint."""

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self._skipped = 0  # in a row

    def judge(self, step: int, row: Mapping[str, float], *, is_finite: bool) -> Trouble | None:
        """What is wrong with a step whose means over ranks are in `row`; None where it is sound."""
        loss = row["loss"]
        if not is_finite:
            what = f"loss {loss} and gradient norm {row['grad_norm']}: not finite"
            return self._trouble("non_finite", self.config.non_finite, step, what)
        if self.config.spike != "ignore" and (limit := self._limit()) is not None and loss > limit:
            what = f"loss {loss:.4g} is above {limit:.4g}, {self.config.spike_std:g} standard deviations over the mean"
            return self._trouble("spike", self.config.spike, step, f"{what} of the {len(self._losses)} before")
        self._losses.append(loss)
        self._skipped = 0
        return None

    def _limit(self) -> float | None:
        if len(self._losses) < JUDGED_FROM:
            return None
        mean = statistics.fmean(self._losses)
        return mean + self.config.spike_std * statistics.pstdev(self._losses, mean)

    def _trouble(self, kind: Literal["non_finite", "spike"], policy: Policy, step: int, what: str) -> Trouble:
        if policy == "skip":
            self._skipped += 1
            if self._skipped > self.config.max_skipped:
                what += f"; {self.config.max_skipped} steps in a row were skipped before it"
                policy = "stop"
        return Trouble(kind, policy, step, what)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": [loss for loss in self._losses if math.isfinite(loss)], "skipped": self._skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._losses = deque(state["losses"], maxlen=self.config.window)
        self._skipped = int(state["skipped"])
