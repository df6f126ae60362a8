"""What the heads of a grid are trained with: learning rates, weight decays, schedules, optimisers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn

from vjepa.schedules import linear_ramp


@dataclass(frozen=True)
class Setting:
    """What one head of the grid is trained with."""

    lr: float
    weight_decay: float

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.weight_decay < 0:
            raise ValueError(f"{self}: lr must be positive and weight_decay not negative")

    def __str__(self) -> str:
        return f"lr {self.lr:g}, weight decay {self.weight_decay:g}"


def grid(lrs: Sequence[float], weight_decays: Sequence[float]) -> tuple[Setting, ...]:
    """Every learning rate with every weight decay."""
    if not lrs or not weight_decays:
        raise ValueError(f"lrs={list(lrs)}, weight_decays={list(weight_decays)}: give at least one of each")
    return tuple(Setting(lr, weight_decay) for lr in lrs for weight_decay in weight_decays)


@dataclass(frozen=True)
class Schedule:
    """The share of its learning rate that a head trains with: warm-up from `start` to 1, then a cosine to `final`."""

    warmup_steps: int = 0
    start: float = 0.0
    """Share at step 0."""
    final: float = 0.0
    """Share after the last step."""
    warmup: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or min(self.start, self.final) < 0:
            raise ValueError(f"{self}: warmup_steps, start and final must not be negative")

    def at(self, step: int, steps: int) -> float:
        """The share at the update numbered `step` from 0, of `steps` in all."""
        if step < self.warmup_steps:
            progress = step / self.warmup_steps
            return self.start + (1 - self.start) * (progress if self.warmup == "linear" else _cosine(progress))
        progress = linear_ramp(step, self.warmup_steps, max(steps, self.warmup_steps + 1))
        return 1 + (self.final - 1) * _cosine(progress)

    def lr(self, peak: float, step: int, steps: int) -> float:
        """The learning rate at an update, of a head whose own is `peak`."""
        return peak * self.at(step, steps)


class LearningRates(Protocol):
    """A learning rate for every head and step: a Schedule, or what a recipe has in its place."""

    def lr(self, peak: float, step: int, steps: int) -> float: ...


def _cosine(progress: float) -> float:
    return (1 - math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class AdamW:
    """AdamW; all parameters decay, as in the published probes (evaluation.md 1.1)."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float | None = None
    """Largest gradient norm of one head; None: not clipped."""

    def __post_init__(self) -> None:
        _check_clipping(self.clip_grad)

    def build(self, head: nn.Module, setting: Setting) -> torch.optim.Optimizer:
        betas = (self.beta1, self.beta2)
        return torch.optim.AdamW(
            head.parameters(), lr=setting.lr, weight_decay=setting.weight_decay, betas=betas, eps=self.eps
        )


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum, as in DINOv3's linear probe (evaluation.md 1.6)."""

    momentum: float = 0.9
    clip_grad: float | None = None
    """Largest gradient norm of one head; None: not clipped."""

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} must lie in 0 <= momentum < 1")
        _check_clipping(self.clip_grad)

    def build(self, head: nn.Module, setting: Setting) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            head.parameters(), lr=setting.lr, weight_decay=setting.weight_decay, momentum=self.momentum
        )


Optim = AdamW | SGD
"""What the optimisers of a grid share; learning rate and weight decay are each head's own."""


def _check_clipping(clip_grad: float | None) -> None:
    if clip_grad is not None and clip_grad <= 0:
        raise ValueError(f"clip_grad={clip_grad} must be positive; None switches clipping off")
