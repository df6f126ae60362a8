"""The joint-embedding predictive objective: a target and weighted terms over one encoder and one predictor."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vjepa.batch import MODALITIES, Batch, MicroBatch, Modality, normalise
from vjepa.nn.encoder import Encoder
from vjepa.nn.flops import FORWARD_BACKWARD, encoder_flops, latent_flops, predictor_flops
from vjepa.nn.init import WEIGHT_STD, initialise
from vjepa.nn.latent import Latent, LatentInference, latent_noise
from vjepa.nn.predictor import Predictor, Query
from vjepa.objectives.average import follow, follower_of, start
from vjepa.objectives.checks import check_together
from vjepa.objectives.config import ObjectiveConfig
from vjepa.objectives.embeddings import Embeddings, Nested, StepEmbeddings
from vjepa.objectives.outputs import Outputs
from vjepa.objectives.regularisers import Regulariser
from vjepa.objectives.targets import EmaTarget, FrozenTarget, PixelTarget, Target, normalise_levels
from vjepa.objectives.teacher_cache import CACHE_DTYPES, TeacherCache, kept_as
from vjepa.objectives.terms import (
    Term,
    WholeBatchTerm,
    build_terms,
)
from vjepa.objectives.wanted import Encoded, Wanted
from vjepa.schedules import interpolate

log = logging.getLogger(__name__)
LATENT = "latent"  # the head that infers it


@dataclass(frozen=True)
class Result:
    """What a forward pass hands to the trainer: the loss, detached scalars to log, and the outputs for diagnostics."""

    loss: Tensor
    metrics: dict[str, Tensor]
    outputs: dict[Modality, Outputs]


@runtime_checkable
class Head(Protocol):
    """A module of a term."""

    def initialise(self, *, scope: str, seed: int, weight_std: float) -> None:
        """Fill it, whole or in shards."""
        ...


class JEPA(nn.Module):
    """Context encoder, predictor and target; `forward` takes one micro-batch of every modality.

    Without a predictor nothing is predicted: objective.target=none.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        encoder: Encoder,
        predictor: Predictor | None,
        *,
        teacher: FrozenTarget | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.heads = nn.ModuleDict()  # terms, shared embeddings and the latent's inference, which may have parameters
        self.terms: Mapping[str, Term] = self._build_terms(encoder)
        self.encoder = encoder
        self.predictor = predictor
        self.target = self._build_target(encoder, teacher)
        self.average = None if config.average is None else follower_of(encoder)  # never in the loss
        self.cache: TeacherCache | None = None  # of a frozen teacher's targets, see build.load_teacher
        if predictor is not None and config.latent.kind != "none":
            self._build_latent(predictor)
        self.wanted = Wanted(masks=predictor is not None, whole=config.target == "online", crops=self._uses_views())
        check_together(self)
        if not next(encoder.parameters()).is_meta:
            self._initialise_heads(seed=0)

    def _build_terms(self, encoder: Encoder) -> dict[str, Term]:
        terms = build_terms(self.config.terms)
        for name, term in terms.items():
            if isinstance(term, WholeBatchTerm):
                terms[name] = self.heads[name] = term.build(encoder.config, name)
        for name, embedding in self.config.embeddings.items():
            if name in terms or not name.isidentifier():
                raise ValueError(f"objective.embeddings.{name}: choose a name that is no term's, of letters and _")
            self.heads[name] = Embeddings(embedding, encoder.config, name)
        for name, term in terms.items():
            shared = term.config.shared if isinstance(term, Regulariser) else None
            if shared is not None and shared not in self.config.embeddings:
                known = ", ".join(self.config.embeddings) or "none"
                raise ValueError(f"objective.terms.{name}.shared={shared} is not in objective.embeddings ({known})")
        return terms

    def _build_target(self, encoder: Encoder, teacher: FrozenTarget | None) -> Target | None:
        if self.config.target == "ema":
            return EmaTarget(encoder)
        if self.config.target == "pixels":
            return PixelTarget(encoder.config)
        return teacher

    def _build_latent(self, predictor: Predictor) -> None:
        if LATENT in self.heads:
            raise ValueError(f"objective.latent: call the term or embedding {LATENT!r} something else")
        self.heads[LATENT] = LatentInference(self.config.latent, predictor.config.target_dim)

    def embeddings(self) -> list[Embeddings]:
        """All of them, shared or a term's own."""
        return [module for module in self.heads.modules() if isinstance(module, Embeddings)]

    def _uses_views(self) -> bool:
        return any(embeddings.config.of == "views" for embeddings in self.embeddings())

    def _initialise_heads(self, *, seed: int, weight_std: float = WEIGHT_STD) -> None:
        for name, head in self.heads.items():
            assert isinstance(head, Head)
            head.initialise(scope=f"heads.{name}", seed=seed, weight_std=weight_std)

    @property
    def target_encoder(self) -> Encoder | None:
        """The encoder that supplies targets, where it is not the one that is trained."""
        return None if self.target is None or isinstance(self.target, PixelTarget) else self.target.encoder

    @property
    def exported(self) -> Encoder:
        """The encoder that a run is made for: an average of the trained one where there is one, else that itself."""
        found = self.get_submodule(self.config.exported)
        assert isinstance(found, Encoder)
        return found

    @property
    def follower(self) -> Encoder | None:
        """The encoder that follows the trained one, as EMA target or as its average."""
        return None if self.exported is self.encoder else self.exported

    def initialise(self, *, seed: int, weight_std: float = WEIGHT_STD) -> None:
        """Fill every trained parameter, whole or in shards, from the seed; what follows the encoder begins as it."""
        initialise(self.encoder, scope="encoder", seed=seed, weight_std=weight_std)
        if self.predictor is not None:
            initialise(self.predictor, scope="predictor", seed=seed, weight_std=weight_std)
        self._initialise_heads(seed=seed, weight_std=weight_std)
        if self.follower is not None:
            start(self.follower, self.encoder)

    def forward(self, micro_batch: MicroBatch, step: int, of_step: StepEmbeddings | None = None) -> Result:
        """All masks and views of all modalities in one pass of encoder, predictor and target.

        `of_step` holds the embeddings of all micro-batches (see `embed`) where terms look at the whole step's.
        """
        batches = _in_order(micro_batch)
        clips = [[normalise(view) for view in self.wanted.clips(batch)] for batch in batches]
        first = [views[0] for views in clips]
        targets = self._targets(batches, first)  # first: nothing else is in memory yet
        encoded = self._encode(batches, clips, self.wanted)
        if targets is None:
            targets = [self._own_target(part.whole) for part in encoded]
        latents = [self._infer(batch, target, step) for batch, target in zip(batches, targets, strict=True)]
        predictions = self._predict(batches, encoded, latents)
        outputs: dict[Modality, Outputs] = {}
        for batch, part, target, told in zip(batches, encoded, targets, latents, strict=True):
            found = [next(predictions) for _ in batch.masks] if self.predictor is not None else []
            outputs[batch.modality] = replace(
                self._outputs(batch, part, step),
                masks=batch.masks if self.wanted.masks else (),
                predicted=[predicted for predicted, _ in found],
                visible=[visible for _, visible in found],
                target=target,
                latents=told,
                target_levels=() if self.target is None else self.target.shape.levels,
                of_step=of_step,
            )
        return self._sum(outputs, step)

    def _targets(self, batches: Sequence[Batch], clips: Sequence[Tensor]) -> list[Tensor] | None:
        """Targets [B, N, L*D] of every batch's first view; None where the encoder's own tokens are taken, or none."""
        target, dtype = self.target, CACHE_DTYPES[self.config.teacher.cache_dtype]
        if target is None or self.cache is None:
            return None if target is None else kept_as(target(clips), dtype)
        return self.cache.targets(batches, lambda: kept_as(target(clips), dtype))

    @torch.no_grad()
    def embed(self, micro_batch: MicroBatch, step: int) -> dict[tuple[Modality, str], Nested]:
        """The first of two passes over a step whose batch comes in parts: what its embedding terms look at."""
        batches, of = _in_order(micro_batch), {embeddings.config.of for embeddings in self.embeddings()}
        wanted = Wanted(masks="context" in of, whole="whole" in of, crops="views" in of)
        clips = [[normalise(view) for view in wanted.clips(batch)] for batch in batches]
        return {
            (batch.modality, embeddings.name): embeddings.pooled(self._outputs(batch, part, step))
            for batch, part in zip(batches, self._encode(batches, clips, wanted), strict=True)
            for embeddings in self.embeddings()
        }

    def _outputs(self, batch: Batch, part: Encoded, step: int) -> Outputs:
        """What the encoder alone gave."""
        return Outputs(
            modality=batch.modality,
            grid=batch.grid,
            num_levels=len(self.encoder.levels),
            masks=(),
            context=part.contexts,
            predicted=[],
            visible=[],
            target=None,
            whole=part.whole,
            views=part.crops,
            num_global=batch.num_global,
            step=step,
        )

    def _encode(self, batches: Sequence[Batch], clips: Sequence[Sequence[Tensor]], wanted: Wanted) -> list[Encoded]:
        """All that is wanted of all clips, in one pass."""
        asked = [wanted.views(batch, views) for batch, views in zip(batches, clips, strict=True)]
        answers = iter(self.encoder.forward_levels([view for views in asked for view in views]))
        return [wanted.sort(batch, [next(answers) for _ in views]) for batch, views in zip(batches, asked, strict=True)]

    def _own_target(self, whole: Tensor | None) -> Tensor | None:
        """The encoder's own tokens [B, N, L*D] as targets, where they are."""
        if whole is None:
            return None
        return normalise_levels(whole.detach() if self.config.stop_gradient else whole, len(self.encoder.levels))

    def _infer(self, batch: Batch, target: Tensor | None, step: int) -> list[Latent]:
        """The latent of each mask, from the target there; none where the predictor takes none."""
        if LATENT not in self.heads or target is None:
            return []
        noise = [
            latent_noise(
                *(self.config.latent, batch.ordinals, mask.masked.shape[1]),
                step=step,
                name=f"{batch.modality}/{index}",
                device=target.device,
            )
            for index, mask in enumerate(batch.masks)
        ]
        return self.heads[LATENT](target, [mask.masked for mask in batch.masks], noise)

    def _predict(
        self, batches: Sequence[Batch], encoded: Sequence[Encoded], latents: Sequence[Sequence[Latent]]
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Predictions at masked and visible places, for all masks of all batches, in one pass."""
        if self.predictor is None:
            return iter(())
        queries = [
            Query(tokens, mask.context, mask.masked, batch.grid, batch.modality, latent and latent.value)
            for batch, part, told in zip(batches, encoded, latents, strict=True)
            for tokens, mask, latent in zip(part.contexts, batch.masks, told or [None] * len(batch.masks), strict=True)
        ]
        return iter(self.predictor.forward_queries(queries))

    def _sum(self, outputs: dict[Modality, Outputs], step: int) -> Result:
        total_weight = sum(self.config.modality_weight(modality) for modality in outputs)
        shares = {modality: self.config.modality_weight(modality) / total_weight for modality in outputs}
        for output in outputs.values():
            output.embedded.update({name: self.heads[name](output) for name in self.config.embeddings})
        loss = torch.zeros((), device=next(self.encoder.parameters()).device)
        metrics: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            mean = torch.zeros_like(loss)
            for modality, output in outputs.items():
                value = term(output)
                loss = loss + shares[modality] * term.weight_at(modality, step) * value
                metrics[f"loss/{name}/{modality}"] = value.detach()
                mean = mean + shares[modality] * value.detach()
            metrics[f"loss/{name}"] = mean
        notes = {f"{name}/{m}": value for m, output in outputs.items() for name, value in output.notes.items()}
        if self.cache is not None:
            notes["teacher_cached"] = torch.full_like(loss, float(self.cache.was_read)).detach()
        return Result(loss, {"loss": loss.detach(), **metrics, **notes}, outputs)

    def flops(self, micro_batch: MicroBatch) -> int:
        """Floating-point operations of one forward and backward pass, the target's included unless it was just read."""
        return sum(self._flops(batch) for batch in micro_batch.values())

    def _flops(self, batch: Batch) -> int:
        mine, clips, trained, total = self.encoder.config, len(batch), 0, 0
        if self.target_encoder is not None and not (self.cache is not None and self.cache.was_read):
            total += encoder_flops(self.target_encoder.config, batch.grid, batch.modality, clips, [None])
        for grid, lengths in self.wanted.lengths(batch, mine.patch_size, mine.tubelet_size):
            trained += encoder_flops(mine, grid, batch.modality, clips, lengths)
        if self.predictor is not None:
            counts = [(mask.context.shape[1], mask.masked.shape[1]) for mask in batch.masks]
            trained += predictor_flops(self.predictor.config, clips, counts)
            tokens, masked = math.prod(batch.grid), [masked for _, masked in counts]
            trained += latent_flops(self.config.latent, self.predictor.config, clips, tokens, masked)
        return total + FORWARD_BACKWARD * trained

    def momentum_at(self, step: int, total_steps: int) -> float | None:
        """The target's momentum in the update numbered `step` from 0; None where no target follows the encoder."""
        if not isinstance(self.target, EmaTarget):
            return None
        return interpolate(self.config.momentum, self.config.momentum_end, step, total_steps)

    def weights_at(self, step: int, modalities: list[Modality]) -> dict[str, float]:
        """The weights of all terms at a step, to log."""
        return {f"weight/{name}/{m}": term.weight_at(m, step) for name, term in self.terms.items() for m in modalities}

    def update_target(self, step: int, total_steps: int) -> None:
        """After the optimizer's step: move the target, or the average, towards the encoder."""
        momentum = self.momentum_at(step, total_steps) if self.average is None else self.config.average
        if self.follower is not None and momentum is not None:
            follow(self.follower, self.encoder, momentum)


def _in_order(micro_batch: MicroBatch) -> list[Batch]:
    return [micro_batch[modality] for modality in MODALITIES if modality in micro_batch]
