"""The small losses an objective sums. A new loss is a new term: a dataclass and a function, registered by name."""

from __future__ import annotations

import difflib
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
from vjepa.nn.rope import grid_positions
from vjepa.schedules import linear_ramp


@dataclass(frozen=True)
class Outputs:
    """All that one modality's forward pass gave; lists have one entry per mask."""

    modality: Modality
    grid: Grid
    num_levels: int
    masks: tuple[Mask, ...]
    context: list[Tensor]  # context encoder's tokens, [B, K, L*D]
    predicted: list[Tensor]  # predictions at masked places, [B, M, L*D]
    visible: list[Tensor | None]  # predictions at context places, [B, K, L*D]
    target: Tensor  # [B, N, L*D] fp32, layer-normed by level; no gradient but from an online target
    whole: Tensor | None = None  # the encoder's own tokens of the whole clip, [B, N, L*D], where the target is online
    step: int = 0  # of training, from 0


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

    def build(self, encoder: EncoderConfig) -> Any:
        """The term itself, a Term and a module, for this encoder."""
        ...


def build_terms(terms: Mapping[str, Mapping[str, Any]]) -> dict[str, Term]:
    """Terms from a recipe's `objective.terms`; unknown names and fields are errors, null switches a term off."""
    built: dict[str, Term] = {}
    for name, options in terms.items():
        if options is None:
            continue
        if name not in TERMS:
            close = difflib.get_close_matches(name, TERMS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"objective.terms.{name} is unknown.{hint} Terms: {', '.join(sorted(TERMS))}")
        try:
            merged = OmegaConf.merge(OmegaConf.structured(TERMS[name]), options)
            built[name] = OmegaConf.to_object(merged)  # pyright: ignore[reportArgumentType]
        except OmegaConfBaseException as error:
            raise ValueError(f"objective.terms.{name}: {str(error).splitlines()[0]}") from error
    if not built:
        raise ValueError("objective.terms is empty: an objective needs at least one term")
    return built


def token_distance(predicted: Tensor, target: Tensor, indices: Tensor, num_levels: int, exponent: float) -> Tensor:
    """mean over channels of |prediction - target|^exponent / exponent, per token: [B, M], fp32.

    predicted [B, M, L*D]; target [B, N, L*D], read at indices [B, M]. Level by level, which bounds the memory.
    """
    total: Tensor | None = None
    for level, part in zip(target.chunk(num_levels, dim=-1), predicted.chunk(num_levels, dim=-1), strict=True):
        difference = (part.float() - take_tokens(level, indices)).abs()
        if exponent != 1.0:
            difference = difference**exponent / exponent
        mean = difference.mean(dim=-1)
        total = mean if total is None else total + mean
    assert total is not None
    return total / num_levels


def sqrt_distance_to_masked(mask: Mask, grid: Grid) -> Tensor:
    """sqrt of the Euclidean distance, in tokens, of each context token to its nearest masked token: [B, K] >= 1.

    One time unit is one tubelet (reference section 2). One batched cdist; integers this small are exact in it.
    """
    positions = grid_positions(grid, interpolate=False, device=mask.context.device)  # [N, 3]
    distances = torch.cdist(
        positions[mask.context], positions[mask.masked], compute_mode="donot_use_mm_for_euclid_dist"
    )  # [B, K, M]
    return distances.amin(dim=-1).sqrt()


def mean_over_masks(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()


@register_term("masked_prediction")
@dataclass
class MaskedPrediction:
    """L1 between predictions and targets at masked places (reference section 2, L_predict)."""

    weight: float = 1.0  # factor in the loss
    exponent: float = 1.0  # 1 is L1; |.|^p / p

    def weight_at(self, modality: Modality, step: int) -> float:
        return self.weight

    def __call__(self, outputs: Outputs) -> Tensor:
        return mean_over_masks(
            [
                token_distance(predicted, outputs.target, mask.masked, outputs.num_levels, self.exponent).mean()
                for predicted, mask in zip(outputs.predicted, outputs.masks, strict=True)
            ]
        )


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

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_start <= self.warmup_end:
            raise ValueError(
                f"context_prediction: warmup_start={self.warmup_start} must be between 0 and "
                f"warmup_end={self.warmup_end}"
            )

    def weight_at(self, modality: Modality, step: int) -> float:
        full = self.lambda_video if modality == "video" else self.lambda_image
        return self.weight * full * linear_ramp(step, self.warmup_start, self.warmup_end)

    def __call__(self, outputs: Outputs) -> Tensor:
        losses = []
        for visible, mask in zip(outputs.visible, outputs.masks, strict=True):
            if visible is None:
                raise ValueError("context_prediction needs the predictor's context head: predictor.context_head=true")
            distance = token_distance(visible, outputs.target, mask.context, outputs.num_levels, self.exponent)
            if self.distance_weighted:
                distance = distance / sqrt_distance_to_masked(mask, outputs.grid)
            losses.append(distance.mean())
        return mean_over_masks(losses)
