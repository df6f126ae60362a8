"""The small losses an objective sums. A new loss is a new term: a dataclass and a function, registered by name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from vjepa.batch import Grid, Mask, Modality
from vjepa.nn.encoder import EncoderConfig
from vjepa.nn.gather import take_tokens
from vjepa.objectives.outputs import Outputs
from vjepa.schedules import linear_ramp


class Term(Protocol):
    """A loss over one modality's outputs, and its weight in the sum."""

    def weight_at(self, modality: Modality, step: int) -> float:
        """The factor of this term in the loss at a step."""
        ...

    def __call__(self, outputs: Outputs) -> Tensor:
        """The unweighted loss, a scalar in fp32."""
        ...


ConfigT = TypeVar("ConfigT")
TERMS: dict[str, type[Any]] = {}


def register_term(name: str) -> Callable[[type[ConfigT]], type[ConfigT]]:
    """Make a dataclass with the methods of `Term` available in recipes as objective.terms.NAME."""

    def add(cls: type[ConfigT]) -> type[ConfigT]:
        TERMS[name] = cls
        return cls

    return add


@runtime_checkable
class WholeBatchTerm(Protocol):
    """The configuration of a term on the statistics of a whole step's batch, which has modules of its own."""

    def build(self, encoder: EncoderConfig, name: str) -> Any:
        """The term itself, a Term and a module, for this encoder; the name it has in the recipe."""
        ...


def build_terms(terms: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Term]:
    """Terms from a recipe's `objective.terms`; unknown names and fields are errors, null switches a term off.

    NAME is the term's own, or any other where its options say `term: NAME`: two of a kind, at two levels for instance.
    """
    built = {name: _build_term(name, dict(options)) for name, options in terms.items() if options is not None}
    if not built:
        raise ValueError("objective.terms is empty: an objective needs at least one term")
    return built


def term_kinds(terms: Mapping[str, Any]) -> set[str]:
    """The registered names of a recipe's terms, whatever they are called there."""
    return {str(options.get("term", name)) for name, options in terms.items() if options is not None}


def _build_term(name: str, options: dict[Any, Any]) -> Term:
    kind = options.pop("term", name)
    if kind not in TERMS:
        close = difflib.get_close_matches(kind, TERMS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"objective.terms.{name} is unknown.{hint} Terms: {', '.join(sorted(TERMS))}")
    if not name.isidentifier():
        raise ValueError(f"objective.terms.{name}: a name is made of letters, digits and _, and starts with no digit")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(TERMS[kind]), options)
        return OmegaConf.to_object(merged)  # pyright: ignore[reportReturnType]
    except OmegaConfBaseException as error:
        raise ValueError(f"objective.terms.{name}: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True)
class Distance:
    """How far a prediction is from its target, and at which of the target's levels (0-based; None: at all)."""

    exponent: float = 1.0
    is_smooth: bool = False
    levels: tuple[int, ...] | None = None

    @classmethod
    def of(cls, exponent: float, smooth: bool, levels: Sequence[int] | None) -> Distance:
        """From a recipe's settings, whose levels count from 1."""
        if smooth and exponent != 1.0:
            raise ValueError(f"smooth=true is smooth L1: leave exponent={exponent} at 1")
        if levels is not None and (not levels or min(levels) < 1):
            raise ValueError(f"levels={levels} must name supervised levels, counted from 1")
        return cls(exponent, smooth, None if levels is None else tuple(level - 1 for level in levels))

    def __call__(self, predicted: Tensor, target: Tensor, indices: Tensor, num_levels: int) -> Tensor:
        """Mean over channels, then levels, per token: [B, M], fp32; smooth L1, or |prediction - target|^p / p.

        predicted [B, M, L*D]; target [B, N, L*D], read at indices [B, M]. Level by level, which bounds the memory.
        """
        chosen = range(num_levels) if self.levels is None else self.levels
        if max(chosen) >= num_levels:
            raise ValueError(f"levels={[level + 1 for level in chosen]}: the target has {num_levels}, counted from 1")
        parts, levels = predicted.chunk(num_levels, dim=-1), target.chunk(num_levels, dim=-1)
        total: Tensor | None = None
        for level in chosen:
            difference = (parts[level].float() - take_tokens(levels[level], indices)).abs()
            mean = self._cost(difference).mean(dim=-1)
            total = mean if total is None else total + mean
        assert total is not None
        return total / len(chosen)

    def _cost(self, difference: Tensor) -> Tensor:
        if self.is_smooth:
            return torch.where(difference < 1, difference.square() / 2, difference - 0.5)
        return difference if self.exponent == 1.0 else difference**self.exponent / self.exponent


def sqrt_distance_to_masked(mask: Mask, grid: Grid) -> Tensor:
    """sqrt of the Euclidean distance, in tokens, of each context token to its nearest masked token: [B, K] >= 1.

    One time unit is one tubelet (reference section 2). Squares of distances are sums over the axes, so the least of
    them is found along one axis after the other; integers this small are exact in fp32. Distances of all pairs took 28
    of the 393 ms of a ViT-L's step on an H200, and B x K x M numbers.
    """
    masked = mask.masked
    squares = torch.full((len(masked), math.prod(grid)), torch.inf, device=masked.device).scatter_(1, masked, 0.0)
    squares = squares.unflatten(1, grid)  # [B, t, h, w], to the nearest masked token along the axes that were done
    for axis, length in enumerate(grid, start=1):
        place = torch.arange(length, dtype=squares.dtype, device=masked.device)
        apart = (place[:, None] - place).square()  # [length, length]
        squares = (squares.movedim(axis, -1)[..., None, :] + apart).amin(dim=-1).movedim(-1, axis)
    return squares.flatten(1).gather(1, mask.context).sqrt().sqrt()


def mean_over_masks(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()


@register_term("masked_prediction")
@dataclass
class MaskedPrediction:
    """L1 between predictions and targets at masked places (reference section 2, L_predict)."""

    weight: float = 1.0  # factor in the loss
    exponent: float = 1.0  # 1 is L1; |.|^p / p
    smooth: bool = False  # smooth L1 in place of it (I-JEPA)
    levels: list[int] | None = None  # of the target, from 1; null: all

    def __post_init__(self) -> None:
        self._distance()  # refuses what does not fit

    def _distance(self) -> Distance:
        return Distance.of(self.exponent, self.smooth, self.levels)

    def weight_at(self, modality: Modality, step: int) -> float:
        return self.weight

    def __call__(self, outputs: Outputs) -> Tensor:
        target, distance = outputs.wanted, self._distance()
        return mean_over_masks(
            [
                distance(predicted, target, mask.masked, outputs.num_target_levels).mean()
                for predicted, mask in zip(outputs.predicted, outputs.masks, strict=True)
            ]
        )


@register_term("latent_information")
@dataclass
class LatentInformation:
    """The price of the latent: the mean over clips of KL(q(z | target) || p(z)), in nats (vjepa/nn/latent.py).

    Without it a latent that is wide enough copies the target, and the predictor needs no context.
    """

    weight: float = 0.01  # factor in the loss: what a nat must save in the other terms

    def weight_at(self, modality: Modality, step: int) -> float:
        return self.weight

    def __call__(self, outputs: Outputs) -> Tensor:
        return mean_over_masks([latent.nats.mean() for latent in outputs.latents])


@register_term("context_prediction")
@dataclass
class ContextPrediction:
    """L1 at visible places, each token over sqrt of its distance to the nearest masked one (section 2, L_ctx).

    The plain mean over tokens follows the reference: weights are not renormalised.
    """

    weight: float = 1.0  # factor in the loss beside lambda
    lambda_video: float = 0.5  # lambda of video clips after the warm-up
    lambda_image: float = 0.7  # lambda of images after the warm-up
    warmup_start: int = 15_000  # step up to which lambda is 0
    warmup_end: int = 30_000  # step from which lambda has its full value; 0 and 0: constant from the first step
    distance_weighted: bool = True  # divide each token's loss by sqrt(d_min)
    exponent: float = 1.0  # 1 is L1; |.|^p / p
    smooth: bool = False  # smooth L1 in place of it
    levels: list[int] | None = None  # of the target, from 1; null: all

    def __post_init__(self) -> None:
        self._distance()  # refuses what does not fit
        if not 0 <= self.warmup_start <= self.warmup_end:
            raise ValueError(
                f"context_prediction: warmup_start={self.warmup_start} must be between 0 and "
                f"warmup_end={self.warmup_end}"
            )

    def weight_at(self, modality: Modality, step: int) -> float:
        full = self.lambda_video if modality == "video" else self.lambda_image
        return self.weight * full * linear_ramp(step, self.warmup_start, self.warmup_end)

    def _distance(self) -> Distance:
        return Distance.of(self.exponent, self.smooth, self.levels)

    def __call__(self, outputs: Outputs) -> Tensor:
        target, distance = outputs.wanted, self._distance()
        losses = []
        for visible, mask in zip(outputs.visible, outputs.masks, strict=True):
            if visible is None:
                raise ValueError("context_prediction needs the predictor's context head: predictor.context_head=true")
            found = distance(visible, target, mask.context, outputs.num_target_levels)
            if self.distance_weighted:
                found = found / sqrt_distance_to_masked(mask, outputs.grid)
            losses.append(found.mean())
        return mean_over_masks(losses)
