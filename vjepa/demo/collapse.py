"""Train one objective, measure its embeddings on new clips, and say from the measures alone whether it collapsed.

The verdict never looks at the objective's name or at the loss. Rules of vjepa/train/diagnostics.py with their default
limits: mean cosine at most 0.95, uncentred RankMe at least 3, cross-sample gap at least 0.02, feature std at least a
tenth of the best seen, for which the untrained encoder stands here. The rule on a drop of RankMe is left out: random
features have a high rank and every objective lowers it. Two rules of this demo, from its reference (collapse
prevention, section 3): normalised std at least 0.3, nMSE below 1. One broken rule is a collapse.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vjepa.demo.glyphs import Glyphs, draw_glyphs
from vjepa.demo.objectives import OBJECTIVES, Learner
from vjepa.objectives.vicreg import invariance
from vjepa.train.diagnostics import AlarmConfig, Limit, cross_sample_gap, feature_std, limits, mean_cosine, rankme
from vjepa.train.representation import prediction_nmse

LEARNING_RATE = 1e-3
BATCH = 64
EVAL_CLIPS = 1024
RIDGE = 1e-3  # times the mean variance of the features
OWN_LIMITS = {
    "normalised_std": Limit(0.3, True, "the embeddings hardly differ in direction"),
    "nmse": Limit(1.0, False, "the prediction is no better than the targets' mean"),
}


@dataclass(frozen=True)
class Outcome:
    """One training and what was measured after it."""

    objective: str
    seed: int
    steps: int
    seconds: float
    measures: dict[str, float]
    untrained: dict[str, float]  # the same measures before the first step
    alarms: list[str]

    @property
    def is_collapsed(self) -> bool:
        return bool(self.alarms)

    @property
    def verdict(self) -> str:
        return f"collapsed: {'; '.join(self.alarms)}" if self.alarms else "healthy"


def run(objective: str, *, steps: int, seed: int) -> Outcome:
    """Train `steps` steps and judge; a function of its arguments, the seconds apart."""
    if objective not in OBJECTIVES or steps < 1:
        raise ValueError(f"objective={objective!r} must be one of {', '.join(OBJECTIVES)}, steps={steps} at least 1")
    start = time.perf_counter()
    held_out = draw_glyphs(EVAL_CLIPS, seed=seed, stream="eval")
    learner = Learner(OBJECTIVES[objective], seed)
    untrained = measure(learner, held_out)
    train(learner, steps=steps, seed=seed)
    measures = measure(learner, held_out)
    return Outcome(objective, seed, steps, time.perf_counter() - start, measures, untrained, judge(measures, untrained))


def train(learner: Learner, *, steps: int, seed: int) -> None:
    """AdamW on `steps` batches of new clips."""
    optimizer = torch.optim.AdamW(learner.trained(), lr=LEARNING_RATE)
    for step in range(steps):
        clips = draw_glyphs(BATCH, seed=seed, stream="train", ordinal=step).clips
        optimizer.zero_grad()
        learner(clips, step).backward()
        optimizer.step()
        learner.update_target()


@torch.no_grad()
def measure(learner: Learner, held_out: Glyphs) -> dict[str, float]:
    """The measures of the table, by name. Features are the online encoder's, one sample per frame."""
    z, predicted, target = learner.embed(held_out.clips)
    samples = z.flatten(0, 1)  # [T * B, D]
    found = {
        "feature_std": feature_std(samples),
        "normalised_std": normalised_std(samples),
        "mean_cosine": mean_cosine(samples),
        "rankme": rankme(samples),
        "cross_sample_gap": cross_sample_gap(predicted, target, target.roll(1, dims=1)),
        "nmse": prediction_nmse(predicted, target),
        "position_r2": position_r2(z, held_out.positions.transpose(0, 1)),
        "prediction_loss": invariance(predicted, target),
    }
    return {name: float(value) for name, value in found.items()}


def judge(measures: dict[str, float], untrained: dict[str, float]) -> list[str]:
    """The broken rules in words, none where the embeddings are healthy."""
    best = {"feature_std": untrained["feature_std"]}
    return [
        f"{name} {measures[name]:.3g} is {'below' if limit.is_floor else 'above'} {limit.value:.3g}"
        for name, limit in (limits(AlarmConfig(), best) | OWN_LIMITS).items()
        if limit.is_broken_by(measures[name])
    ]


def normalised_std(z: Tensor) -> Tensor:
    """sqrt(D) times the feature std of unit vectors, z: [N, D]: 1 at best, 0 where all point one way (SimSiam)."""
    return feature_std(F.normalize(z, dim=1)) * z.shape[1] ** 0.5


def position_r2(z: Tensor, positions: Tensor) -> Tensor:
    """R^2 of the digit's place [T, B, 2] by ridge regression from z [T, B, D], on clips the regression did not see."""
    half = z.shape[1] // 2
    rows, places = z.double(), positions.double()
    mean, spread = rows[:, :half].mean(dim=(0, 1)), rows[:, :half].flatten(0, 1).std(dim=0).square().mean().sqrt()
    features = (rows - mean) / spread.clamp_min(torch.finfo(torch.float64).tiny)
    middle = places[:, :half].mean(dim=(0, 1))
    fit, goal = features[:, :half].flatten(0, 1), (places[:, :half] - middle).flatten(0, 1)
    gram = fit.T @ fit / len(fit) + RIDGE * torch.eye(fit.shape[1], dtype=fit.dtype)
    weights = torch.linalg.solve(gram, fit.T @ goal / len(fit))  # [D, 2]
    wanted = places[:, half:] - middle
    return 1 - (features[:, half:] @ weights - wanted).square().mean() / wanted.square().mean()
