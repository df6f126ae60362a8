"""Everything that varies over a run, as a function of the step alone: nothing is replayed on resume."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


def linear_ramp(step: int, start_step: int, end_step: int) -> float:
    """0 up to `start_step`, linear to 1 at `end_step`, 1 after it."""
    if end_step <= start_step:
        return 1.0 if step >= end_step else 0.0
    return min(1.0, max(0.0, (step - start_step) / (end_step - start_step)))


@dataclass
class LearningRateConfig:
    """Linear warm-up from `start` to `peak`, then constant, linear or cosine down to `final` at the last step."""

    start: float = 1e-4  # at step 0
    peak: float = 5.25e-4  # after the warm-up
    final: float = 5.25e-4  # at the last step; must equal peak when decay is constant
    warmup_steps: int = 12_000  # steps from start to peak
    decay: Literal["constant", "linear", "cosine"] = "constant"  # the way from peak to final

    def __post_init__(self) -> None:
        if min(self.start, self.peak, self.final) < 0 or self.warmup_steps < 0:
            raise ValueError(f"lr: start, peak, final and warmup_steps must not be negative, got {self}")
        if self.decay == "constant" and self.final != self.peak:
            raise ValueError(f"lr: decay=constant stays at peak={self.peak}, but final={self.final}: set them equal")

    def at(self, step: int, total_steps: int) -> float:
        """The learning rate of the update numbered `step` from 0."""
        if step < self.warmup_steps:
            return self.start + (self.peak - self.start) * step / self.warmup_steps
        progress = linear_ramp(step, self.warmup_steps, max(total_steps - 1, self.warmup_steps + 1))
        if self.decay == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.peak + (self.final - self.peak) * progress


def interpolate(start: float, end: float | None, step: int, total_steps: int) -> float:
    """`start` at step 0, linear to `end` at the last step; constant where there is no end."""
    return start if end is None else start + (end - start) * linear_ramp(step, 0, max(1, total_steps - 1))
