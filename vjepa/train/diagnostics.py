"""Is the representation alive? Measures of collapse, and the alarms drawn from them.

The loss cannot tell: a collapsing encoder lowers it, a recovering one raises it. The measures are pure functions of
feature matrices, in fp32 or fp64 whatever autocast says, and stay on the device. Ranks are taken without centring: a
centred rank is scale-free and reads healthy on a fully collapsed network. Further measures are in `representation`; the
alarms know them by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vjepa.train.remedies import Illness, remedy

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
    """When a diagnostic counts as collapse. No absolute figure holds for all models: most rules are relative drops.

    The bounds hold for the targets and, on the measures named context_..., for the trained encoder's own features.
    """

    warmup_steps: int = 1000
    """Steps whose evaluations are ignored: an EMA model passes through a collapse-like phase first."""
    consecutive: int = 2
    """Evaluations in a row that must break a rule before it is an alarm."""
    on_collapse: Literal["warn", "stop", "roll_back"] = "warn"
    """What an alarm does. stop: the run ends with an error. roll_back: the run goes on from the newest checkpoint from
    before the first evaluation that broke the rule, with other data, health.max_roll_backs times at most."""
    max_mean_cosine: float = 0.95
    """Mean cosine above this: features of different samples and places point the same way."""
    min_rankme: float = 3.0
    """Uncentred RankMe below this, whatever it was before."""
    rankme_drop: float = 0.5
    """RankMe below this share of the best value seen since the warm-up."""
    covariance_rank_drop: float = 0.5
    """Effective rank of the covariance below this share of the best value seen since the warm-up."""
    feature_std_drop: float = 0.1
    """Feature standard deviation below this share of the best value seen since the warm-up."""
    max_dead_share: float = 0.5
    """Share of dimensions that hardly vary above this."""
    lidar_drop: float = 0.5
    """LiDAR below this share of the best value seen since the warm-up."""
    min_cross_sample_gap: float = 0.02
    """Cross-sample gap below this: the target no longer depends on the sample."""
    min_context_reliance: float = 0.05
    """Share of the loss that another clip's context alone costs below this: the latent alone tells the target."""
    max_nmse: float = 1.0
    """Error of the prediction over the variance of the target above this: the targets' mean would be nearer."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or self.consecutive < 1:
            raise ValueError(
                f"alarms: warmup_steps={self.warmup_steps} must be >= 0, consecutive={self.consecutive} >= 1"
            )
        for name in ("rankme_drop", "covariance_rank_drop", "feature_std_drop", "lidar_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"alarms.{name}={getattr(self, name)} must be a share in [0, 1) of the best value")
        if not 0 < self.max_dead_share <= 1:
            raise ValueError(
                f"alarms.max_dead_share={self.max_dead_share} must be a share in (0, 1]; 1 is never exceeded"
            )


class CollapseError(RuntimeError):
    """Features that look collapsed end the run; the message names measure, modality, level and what to change."""


@dataclass(frozen=True)
class Limit:
    """A bound on one metric; `is_floor` says on which side of it the metric must stay."""

    value: float
    is_floor: bool
    advice: str

    def is_broken_by(self, value: float) -> bool:
        return not math.isfinite(value) or (value < self.value if self.is_floor else value > self.value)


@dataclass(frozen=True)
class Rule:
    """How a measure's bound follows from the configuration and the best value so far, and what breaking it means."""

    illness: Illness
    is_floor: bool
    bound: Callable[[AlarmConfig, float], float]
    meaning: str


RULES = {
    "mean_cosine": Rule("constant", False, lambda c, _: c.max_mean_cosine, "the features lie in one direction"),
    "rankme": Rule(
        "narrow", True, lambda c, best: max(c.min_rankme, c.rankme_drop * best), "the features fill few dimensions"
    ),
    "feature_std": Rule(
        "constant", True, lambda c, best: c.feature_std_drop * best, "the features hardly vary over samples"
    ),
    "cross_sample_gap": Rule(
        "blind", True, lambda c, _: c.min_cross_sample_gap, "the targets tell little about the clip"
    ),
    "covariance_rank": Rule(
        "narrow", True, lambda c, best: c.covariance_rank_drop * best, "few directions hold most of the variance"
    ),
    "dead_share": Rule("constant", False, lambda c, _: c.max_dead_share, "many dimensions do not vary at all"),
    "lidar": Rule("narrow", True, lambda c, best: c.lidar_drop * best, "few directions tell clips from one another"),
    "nmse": Rule(
        "unpredictable", False, lambda c, _: c.max_nmse, "the prediction is worse than the targets' mean would be"
    ),
}
LATENT_IS_USED = 0.5  # reliance on it from which little reliance on the context is a bypass
PLACE_IS_TOLD = 0.9  # R^2 of a token's place from which a small gap is called positional
METRIC_KEY = re.compile(r"diag/(?P<name>(?P<modality>\w+)/(?:level(?P<level>\d+)|latent)/(?P<metric>\w+))")
CONTEXT = "context_"  # before measures of the trained encoder's own features


def limit(metric: str, config: AlarmConfig, best: float, held_by: Sequence[str] = ()) -> Limit | None:
    """The bound on a measure whose highest value since the warm-up is `best`; None where no rule is known."""
    rule = RULES.get(metric.removeprefix(CONTEXT))
    if rule is None:
        return None
    whose = ""
    if metric.startswith(CONTEXT):
        whose = f" (the trained encoder's own{'; its EMA target is next' if 'ema' in held_by else ''})"
    return Limit(rule.bound(config, best), rule.is_floor, f"{rule.meaning}{whose}; {remedy(rule.illness, held_by)}")


def limits(config: AlarmConfig, best: Mapping[str, float]) -> dict[str, Limit]:
    """The bounds on the four measures that any features and predictions have; `best`: highest since the warm-up."""
    basic = ("mean_cosine", "rankme", "feature_std", "cross_sample_gap")
    found = {name: limit(name, config, best.get(name, 0.0)) for name in basic}
    return {name: bound for name, bound in found.items() if bound is not None}


def latent_limit(metric: str, config: AlarmConfig, key: str, row: Mapping[str, Any]) -> Limit | None:
    """The bound on a measure of the predictor's latent (latents.py); None where no rule is known or z is not used."""
    if metric != "context_reliance" or float(row[key.replace(metric, "reliance")]) < LATENT_IS_USED:
        return None
    return Limit(
        config.min_context_reliance,
        True,
        "latent bypass, the latent tells the target and the context is not needed; raise "
        "objective.terms.latent_information.weight, or take fewer objective.latent.dim or codes, or per=clip",
    )


class CollapseAlarms:
    """Follows the diagnostics of a run and says in words when they look like collapse.

    `held_by` is what is to prevent it, see `remedies.prevention`. Its state is plain numbers, part of the checkpoint: a
    resumed run raises the same alarms.
    """

    def __init__(self, config: AlarmConfig, held_by: Iterable[str] = ()) -> None:
        self.config = config
        self.held_by = tuple(held_by)
        self._best: dict[str, float] = {}
        self._strikes: dict[str, int] = {}
        self._since: dict[str, int] = {}  # the step of the first strike

    def observe(self, step: int, row: Mapping[str, Any]) -> list[str]:
        """The alarms that stand after this step, from the diag/<modality>/{level<k>,latent}/<metric> of a row."""
        return list(self.observe_named(step, row).values())

    def observe_named(self, step: int, row: Mapping[str, Any]) -> dict[str, str]:
        """`observe`, with each alarm under the name of its measure: <modality>/{level<k>,latent}/<metric>."""
        if step < self.config.warmup_steps:
            return {}
        found = [match for key in row if (match := METRIC_KEY.fullmatch(key))]
        texts = {match["name"]: self._judge(match, step, row) for match in found}
        return {name: text for name, text in texts.items() if text}

    def broken_since(self, names: Iterable[str]) -> int:
        """The step of the first evaluation that broke one of these standing alarms' rules, in a row up to now."""
        return min(self._since[name] for name in names)

    def reset_strikes(self) -> None:
        """Begin to count anew, as after a roll back; the best values stay."""
        self._strikes.clear()
        self._since.clear()

    def state_dict(self) -> dict[str, dict[str, float]]:
        counts = {"strikes": self._strikes, "since": self._since}
        return {"best": dict(self._best)} | {
            name: {key: float(count) for key, count in values.items()} for name, values in counts.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        self._best = {key: float(value) for key, value in state["best"].items()}
        self._strikes = {key: int(count) for key, count in state["strikes"].items()}
        self._since = {key: int(step) for key, step in state.get("since", {}).items()}  # older checkpoints have none

    def _judge(self, match: re.Match[str], step: int, row: Mapping[str, Any]) -> str | None:
        name, metric, value = match["name"], match["metric"], float(row[match[0]])
        if match["level"] is None:
            part, bound = "latent", latent_limit(metric, self.config, match[0], row)
        else:
            part = f"level {match['level']}"
            bound = limit(metric, self.config, self._best.get(name, 0.0), self.held_by)
        if bound is None:
            return None
        if not bound.is_broken_by(value):
            self._best[name] = max(value, self._best.get(name, 0.0))
            self._strikes[name] = 0
            self._since.pop(name, None)
            return None
        self._strikes[name] = self._strikes.get(name, 0) + 1
        self._since.setdefault(name, step)
        if self._strikes[name] < self.config.consecutive:
            return None
        side = "is not finite" if not math.isfinite(value) else f"is {'below' if bound.is_floor else 'above'}"
        place = self._positional(match, row) if metric == "cross_sample_gap" else ""
        return (
            f"{match['modality']} {part}: {metric} {value:.4g} {side} {bound.value:.4g} "
            f"in {self._strikes[name]} evaluations in a row: {place}{bound.advice}"
        )

    def _positional(self, match: re.Match[str], row: Mapping[str, Any]) -> str:
        """What a small gap means where features vary and tell a token's place; of a constant they tell it too."""
        prefix = match[0].removesuffix(match["metric"])
        told = float(row.get(f"{prefix}position_decodability", 0.0))
        if told < PLACE_IS_TOLD or float(row.get(f"{prefix}mean_cosine", 0.0)) > self.config.max_mean_cosine:
            return ""
        return f"positional collapse, tokens know their place (R2 {told:.2f}) and not their clip: "
