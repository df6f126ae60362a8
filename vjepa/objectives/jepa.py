"""The joint-embedding predictive objective: a target and weighted terms over one encoder and one predictor."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vjepa.batch import MODALITIES, MicroBatch, Modality, normalise
from vjepa.nn.encoder import Encoder, View
from vjepa.nn.flops import FORWARD_BACKWARD, encoder_flops, predictor_flops
from vjepa.nn.init import WEIGHT_STD, initialise
from vjepa.nn.predictor import Predictor, Query
from vjepa.objectives.regularisers import Regulariser
from vjepa.objectives.targets import EmaTarget, normalise_levels
from vjepa.objectives.terms import Outputs, Term, WholeBatchTerm, build_terms
from vjepa.schedules import interpolate

log = logging.getLogger(__name__)
USUAL_MOMENTUM = (0.99, 0.9999)


def _default_terms() -> dict[str, Any]:
    return {"masked_prediction": {}, "context_prediction": {}}


@dataclass
class ObjectiveConfig:
    """What is learned."""

    target: Literal["ema", "frozen", "online"] = "ema"  # who supplies the targets: see vjepa/objectives/targets.py
    stop_gradient: bool = False  # online only: no gradient through the targets; ema and frozen have none
    momentum: float = 0.99925  # of the EMA target at step 0
    momentum_end: float | None = None  # at the last step, linear in between; null keeps it constant
    video_weight: float = 0.5  # share of video in the loss, as the reference's half of the ranks
    image_weight: float = 0.5  # share of images in the loss
    terms: dict[str, Any] = field(default_factory=_default_terms)  # NAME: options, see vjepa/objectives/terms.py

    def __post_init__(self) -> None:
        if self.target == "frozen":
            raise ValueError("objective.target=frozen is not built yet: choose ema or online")
        if self.stop_gradient and self.target != "online":
            raise ValueError(f"objective.stop_gradient=true is for target=online; {self.target} has no gradient anyway")
        for name in ("momentum", "momentum_end"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"objective.{name}={value} must be between 0 and 1")
        if self.target == "ema":
            self._warn_of_momentum()
        if min(self.video_weight, self.image_weight) < 0 or self.video_weight + self.image_weight == 0:
            raise ValueError("objective.video_weight and image_weight must not be negative, and not both 0")

    def _warn_of_momentum(self) -> None:
        low, high = USUAL_MOMENTUM
        is_ramp = self.momentum_end is not None and self.momentum_end > self.momentum  # I-JEPA's ends at 1
        unusual = [value for value in (self.momentum, self.momentum_end) if value is not None and value < low]
        unusual += [self.momentum] if self.momentum > high and not is_ramp else []
        for value in unusual:
            log.warning(
                "objective.momentum=%g is outside %g to %g, where EMA targets are known to learn: explore 0.99 to "
                "0.9995, above 0.999 for video; larger batches bear lower values",
                *(value, low, high),
            )

    def modality_weight(self, modality: Modality) -> float:
        return self.video_weight if modality == "video" else self.image_weight


@dataclass(frozen=True)
class Result:
    """What a forward pass hands to the trainer: the loss, detached scalars to log, and the outputs for diagnostics."""

    loss: Tensor
    metrics: dict[str, Tensor]
    outputs: dict[Modality, Outputs]


class JEPA(nn.Module):
    """Context encoder, predictor and target; `forward` takes one micro-batch of every modality."""

    def __init__(self, config: ObjectiveConfig, encoder: Encoder, predictor: Predictor) -> None:
        super().__init__()
        self.config = config
        self.heads = nn.ModuleDict()  # the terms that have modules of their own
        self.terms: Mapping[str, Term] = self._build_terms(encoder)
        self.encoder = encoder
        self.predictor = predictor
        self.target = EmaTarget(encoder) if config.target == "ema" else None

    def _build_terms(self, encoder: Encoder) -> dict[str, Term]:
        terms = build_terms(self.config.terms)
        for name, term in terms.items():
            if isinstance(term, WholeBatchTerm):
                terms[name] = self.heads[name] = term.build(encoder.config)
        if not next(encoder.parameters()).is_meta:
            self._initialise_heads(seed=0)
        return terms

    def _initialise_heads(self, *, seed: int, weight_std: float = WEIGHT_STD) -> None:
        for name, head in self.heads.items():
            assert isinstance(head, Regulariser)
            head.initialise(scope=f"heads.{name}", seed=seed, weight_std=weight_std)

    @property
    def exported(self) -> Encoder:
        """The encoder that a run is made for: the target where there is one, otherwise the one that is trained."""
        return self.target.encoder if self.target is not None else self.encoder

    def initialise(self, *, seed: int, weight_std: float = WEIGHT_STD) -> None:
        """Fill every parameter, whole or in shards, from the seed; the target begins as the encoder."""
        initialise(self.encoder, scope="encoder", seed=seed, weight_std=weight_std)
        initialise(self.predictor, scope="predictor", seed=seed, weight_std=weight_std)
        self._initialise_heads(seed=seed, weight_std=weight_std)
        if self.target is not None:
            self.target.start_from(self.encoder)

    def forward(self, micro_batch: MicroBatch, step: int) -> Result:
        """All masks of all modalities in one pass of encoder, predictor and target; online: whole clips with them."""
        batches = [micro_batch[modality] for modality in MODALITIES if modality in micro_batch]
        clips = [normalise(batch.clips) for batch in batches]
        targets = self.target(clips) if self.target is not None else []  # first: nothing else is in memory yet
        views = [
            View(x, (*(mask.context for mask in b.masks), *self._whole)) for x, b in zip(clips, batches, strict=True)
        ]
        encoded = self.encoder.forward_levels(views)
        contexts = [tokens[: len(b.masks)] for tokens, b in zip(encoded, batches, strict=True)]
        wholes = [tokens[-1] if self._whole else None for tokens in encoded]
        targets = targets or [self._own_target(whole) for whole in wholes if whole is not None]
        queries = [
            Query(tokens, mask.context, mask.masked, batch.grid, batch.modality)
            for batch, tokens_per_mask in zip(batches, contexts, strict=True)
            for tokens, mask in zip(tokens_per_mask, batch.masks, strict=True)
        ]
        predictions = iter(self.predictor.forward_queries(queries))
        outputs: dict[Modality, Outputs] = {}
        for batch, context, whole, target in zip(batches, contexts, wholes, targets, strict=True):
            predicted, visible = zip(*(next(predictions) for _ in batch.masks), strict=True)
            outputs[batch.modality] = Outputs(
                modality=batch.modality,
                grid=batch.grid,
                num_levels=len(self.encoder.levels),
                masks=batch.masks,
                context=context,
                predicted=list(predicted),
                visible=list(visible),
                target=target,
                whole=whole,
                step=step,
            )
        return self._sum(outputs, step)

    @property
    def _whole(self) -> tuple[None, ...]:
        """The view of all tokens, where the encoder itself supplies the targets."""
        return () if self.target is not None else (None,)

    def _own_target(self, whole: Tensor) -> Tensor:
        """The encoder's own tokens [B, N, L*D] as targets."""
        return normalise_levels(whole.detach() if self.config.stop_gradient else whole, len(self.encoder.levels))

    def _sum(self, outputs: dict[Modality, Outputs], step: int) -> Result:
        total_weight = sum(self.config.modality_weight(modality) for modality in outputs)
        shares = {modality: self.config.modality_weight(modality) / total_weight for modality in outputs}
        loss = torch.zeros((), device=next(iter(outputs.values())).target.device)
        metrics: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            mean = torch.zeros_like(loss)
            for modality, output in outputs.items():
                value = term(output)
                loss = loss + shares[modality] * term.weight_at(modality, step) * value
                metrics[f"loss/{name}/{modality}"] = value.detach()
                mean = mean + shares[modality] * value.detach()
            metrics[f"loss/{name}"] = mean
        return Result(loss, {"loss": loss.detach(), **metrics}, outputs)

    def flops(self, micro_batch: MicroBatch) -> int:
        """Floating-point operations of one forward and backward pass, the target's forward pass included."""
        total = 0
        for batch in micro_batch.values():
            counts = [(mask.context.shape[1], mask.masked.shape[1]) for mask in batch.masks]
            where = (batch.grid, batch.modality, len(batch))
            contexts = [*(context for context, _ in counts), *self._whole]
            if self.target is not None:
                total += encoder_flops(self.target.encoder.config, *where, [None])
            total += FORWARD_BACKWARD * encoder_flops(self.encoder.config, *where, contexts)
            total += FORWARD_BACKWARD * predictor_flops(self.predictor.config, len(batch), counts)
        return total

    def momentum_at(self, step: int, total_steps: int) -> float | None:
        """The target's momentum in the update numbered `step` from 0; None where no target follows the encoder."""
        if self.target is None:
            return None
        return interpolate(self.config.momentum, self.config.momentum_end, step, total_steps)

    def weights_at(self, step: int, modalities: list[Modality]) -> dict[str, float]:
        """The weights of all terms at a step, to log."""
        return {f"weight/{name}/{m}": term.weight_at(m, step) for name, term in self.terms.items() for m in modalities}

    def update_target(self, step: int, total_steps: int) -> None:
        """After the optimizer's step: move the target towards the encoder."""
        momentum = self.momentum_at(step, total_steps)
        if self.target is not None and momentum is not None:
            self.target.update(self.encoder, momentum)


def freeze_unused(objective: JEPA, modalities: list[Modality]) -> list[str]:
    """Switch off gradients of parameters that no step can reach (an absent modality's, an unused head's); their names.

    Every parameter that stays trainable gets a gradient in every step on every rank: nothing waits for it.
    """
    unused = {
        f"{owner}.{modality}"
        for modality in MODALITIES
        if modality not in modalities
        for owner in ("encoder.tokenizer", "predictor.mask_tokens", "predictor.modality_embeds")
    } | {f"encoder.tokenizer.{modality}_embed" for modality in MODALITIES if modality not in modalities}
    if "context_prediction" not in objective.terms:
        unused.add("predictor.context_head")
    frozen = []
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad and any(name == prefix or name.startswith(prefix + ".") for prefix in unused):
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen
