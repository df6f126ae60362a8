"""Is the representation alive? Measures of collapse, and the alarms drawn from them.

The loss cannot tell: a collapsing encoder lowers it, a recovering one raises it. The measures are pure functions of
feature matrices, in fp32 or fp64 whatever autocast says, and stay on the device. Ranks are taken without centring: a
centred rank is scale-free and reads healthy on a fully collapsed network.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TINY = torch.finfo(torch.float32).tiny


def feature_std(z: Tensor) -> Tensor:
    """Standard deviation over samples, averaged over dimensions; z: [N, D]. 0 when all samples are the same."""
    return _samples(z).float().std(dim=0, correction=0).mean()


def mean_cosine(z: Tensor) -> Tensor:
    """Mean cosine of all pairs of different samples, z: [N, D]. 1 when all point the same way; zero rows count as 0."""
    unit = F.normalize(_samples(z).double(), dim=1)
    count = unit.shape[0]
    # |sum of unit vectors|^2 holds every ordered pair once and each vector with itself once.
    pairs = unit.sum(dim=0).square().sum() - unit.square().sum()
    return (pairs / (count * (count - 1))).float()


def rankme(z: Tensor) -> Tensor:
    """Effective rank of uncentred features z: [N, D], between 1 and min(N, D) (RankMe, arXiv 2210.02885).

    Not a number where a feature is not finite: the run is stopped for that elsewhere, with the samples named.
    """
    z = _samples(z).double()
    gram = z.T @ z if z.shape[1] <= z.shape[0] else z @ z.T
    is_finite = torch.isfinite(gram).all()
    squared = torch.linalg.eigvalsh(torch.where(is_finite, gram, 0))  # raises on what is not finite
    # Eigenvalues below the rounding error of the largest are noise, and their square roots would count.
    noise = squared[-1] * torch.finfo(torch.float64).eps * len(squared)
    singular = torch.where(squared > noise, squared, 0).sqrt()
    p = singular / singular.sum().clamp_min(TINY)
    return torch.where(is_finite, torch.special.entr(p).sum().exp(), torch.nan).float()


def target_prediction_cosine(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean cosine of prediction and target, both [..., D]. Rises with learning, and to 1 in collapse."""
    _same_shape(predicted=predicted, target=target)
    return F.cosine_similarity(predicted.detach().float(), target.detach().float(), dim=-1).mean()


def cross_sample_gap(predicted: Tensor, target: Tensor, other: Tensor) -> Tensor:
    """1 - L1(predicted, own target) / L1(predicted, another sample's target at the same positions), all [B, M, D].

    0 when the target does not depend on the sample, be it constant or a function of position alone; 1 for a perfect
    prediction. Above about 0.1 is healthy.
    """
    _same_shape(predicted=predicted, target=target, other=other)
    predicted = predicted.detach().float()
    own_distance = (predicted - target.detach().float()).abs().mean()
    other_distance = (predicted - other.detach().float()).abs().mean()
    return (other_distance - own_distance) / other_distance.clamp_min(TINY)


def _samples(z: Tensor) -> Tensor:
    if z.dim() != 2 or z.shape[0] < 2:
        raise ValueError(f"features must be [N, D] with N >= 2 samples, got {list(z.shape)}: flatten batch and tokens")
    return z.detach()


def _same_shape(**tensors: Tensor) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        raise ValueError(f"{' and '.join(shapes)} must have one shape, got {shapes}")


@dataclass(frozen=True)
class AlarmConfig:
    """When a diagnostic counts as collapse. No absolute figure holds for all models: most rules are relative drops."""

    warmup_steps: int = 1000
    """Steps whose evaluations are ignored: an EMA model passes through a collapse-like phase first."""
    consecutive: int = 2
    """Evaluations in a row that must break a rule before it is an alarm."""
    max_mean_cosine: float = 0.95
    """Mean cosine above this: features of different samples and places point the same way."""
    min_rankme: float = 3.0
    """Uncentred RankMe below this, whatever it was before."""
    rankme_drop: float = 0.5
    """RankMe below this share of the best value seen since the warm-up."""
    feature_std_drop: float = 0.1
    """Feature standard deviation below this share of the best value seen since the warm-up."""
    min_cross_sample_gap: float = 0.02
    """Cross-sample gap below this: the target no longer depends on the sample."""
    min_context_reliance: float = 0.05
    """Share of the loss that another clip's context alone costs below this: the latent alone tells the target."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or self.consecutive < 1:
            raise ValueError(
                f"alarms: warmup_steps={self.warmup_steps} must be >= 0, consecutive={self.consecutive} >= 1"
            )
        for name in ("rankme_drop", "feature_std_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"alarms.{name}={getattr(self, name)} must be a share in [0, 1) of the best value")


@dataclass(frozen=True)
class Limit:
    """A bound on one metric; `is_floor` says on which side of it the metric must stay."""

    value: float
    is_floor: bool
    advice: str

    def is_broken_by(self, value: float) -> bool:
        return not math.isfinite(value) or (value < self.value if self.is_floor else value > self.value)


METRIC_KEY = re.compile(r"diag/(?P<name>(?P<modality>\w+)/(?:level(?P<level>\d+)|latent)/(?P<metric>\w+))")
LOWER_RATE = "lower lr or raise the EMA momentum, and start again from a checkpoint before the fall"


def limits(config: AlarmConfig, best: Mapping[str, float]) -> dict[str, Limit]:
    """The bound on each metric of one modality and level; `best` holds the highest values since the warm-up."""
    rank_floor = max(config.min_rankme, config.rankme_drop * best.get("rankme", 0.0))
    std_floor = config.feature_std_drop * best.get("feature_std", 0.0)
    return {
        "mean_cosine": Limit(config.max_mean_cosine, False, f"the features lie in one direction; {LOWER_RATE}"),
        "rankme": Limit(rank_floor, True, f"the features fill few dimensions; {LOWER_RATE}"),
        "feature_std": Limit(std_floor, True, f"the features hardly vary over samples; {LOWER_RATE}"),
        "cross_sample_gap": Limit(
            config.min_cross_sample_gap, True, f"the targets tell little about the clip; {LOWER_RATE}"
        ),
    }


def latent_limit(metric: str, config: AlarmConfig) -> Limit | None:
    """The bound on a measure of the predictor's latent (latents.py); None where no rule is known."""
    if metric != "context_reliance":
        return None
    return Limit(
        config.min_context_reliance,
        True,
        "latent bypass, the latent tells the target and the context is not needed; raise "
        "objective.terms.latent_information.weight, or take fewer objective.latent.dim or codes, or per=clip (where "
        "cross_sample_gap is small too, nothing depends on the clip: look there first)",
    )


class CollapseAlarms:
    """Follows the diagnostics of a run and says in words when they look like collapse.

    Its state is plain numbers, part of the checkpoint, so that a resumed run raises the same alarms.
    """

    def __init__(self, config: AlarmConfig) -> None:
        self.config = config
        self._best: dict[str, float] = {}
        self._strikes: dict[str, int] = {}

    def observe(self, step: int, row: Mapping[str, Any]) -> list[str]:
        """The alarms that stand after this step, from the diag/<modality>/{level<k>,latent}/<metric> of a row."""
        return list(self.observe_named(step, row).values())

    def observe_named(self, step: int, row: Mapping[str, Any]) -> dict[str, str]:
        """`observe`, with each alarm under the name of its measure: <modality>/{level<k>,latent}/<metric>."""
        if step < self.config.warmup_steps:
            return {}
        found = [(match, float(row[key])) for key in row if (match := METRIC_KEY.fullmatch(key))]
        texts = {match["name"]: self._judge(match, value) for match, value in found}
        return {name: text for name, text in texts.items() if text}

    def state_dict(self) -> dict[str, dict[str, float]]:
        return {"best": dict(self._best), "strikes": {key: float(count) for key, count in self._strikes.items()}}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        self._best = {key: float(value) for key, value in state["best"].items()}
        self._strikes = {key: int(count) for key, count in state["strikes"].items()}

    def _judge(self, match: re.Match[str], value: float) -> str | None:
        name, metric = match["name"], match["metric"]
        if match["level"] is None:
            place, limit = "latent", latent_limit(metric, self.config)
        else:
            place = f"level {match['level']}"
            limit = limits(self.config, {metric: self._best.get(name, 0.0)}).get(metric)
        if limit is None:
            return None
        is_broken = limit.is_broken_by(value)
        if not is_broken:
            self._best[name] = max(value, self._best.get(name, 0.0))
        self._strikes[name] = self._strikes.get(name, 0) + 1 if is_broken else 0
        if self._strikes[name] < self.config.consecutive:
            return None
        side = "is not finite" if not math.isfinite(value) else f"is {'below' if limit.is_floor else 'above'}"
        return (
            f"{match['modality']} {place}: {metric} {value:.4g} {side} {limit.value:.4g} "
            f"in {self._strikes[name]} evaluations in a row: {limit.advice}"
        )
