"""Action anticipation: what happens a second after the clip ends? (reference evaluation.md 1.2)

The frozen encoder reads the context, the frozen predictor fills in the tokens of the anticipated moment, and an
attentive probe with three queries (verb, noun, action) reads both.

**Where a clip ends.** EPIC-Kitchens defines anticipation as t_a seconds before the action's *start*: the default here.
The reference code measures from its *end* (facebookresearch/vjepa2 issue 173), so its clips may show most of the
action: `form: vjepa2_compat`. Figures of the two forms cannot be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evals.features import bf16_on_gpus, finite
from vjepa.batch import Grid, normalise
from vjepa.nn.encoder import Encoder, View
from vjepa.nn.predictor import Predictor

QUESTIONS = ("verb", "noun", "action")
Form = Literal["start_relative", "vjepa2_compat"]


@dataclass
class AnticipationConfig:
    """When a clip ends before an action, and how the answer is scored (evaluation.md 1.2)."""

    form: Form = "start_relative"  # vjepa2_compat: measured from the action's end, as in the reference's code
    train_seconds_min: float = 0.25  # t_a of training is drawn from this range
    train_seconds_max: float = 1.75
    validation_seconds: float = 1.0  # t_a of validation
    train_point_max: float = 0.25  # training aims at a point drawn from this first (last) share of the action
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    recall_at: int = 5  # k of the class-mean recall

    def __post_init__(self) -> None:
        if not 0 <= self.train_seconds_min <= self.train_seconds_max or self.validation_seconds < 0:
            raise ValueError(
                f"anticipation: train_seconds_min={self.train_seconds_min}, train_seconds_max={self.train_seconds_max} "
                f"and validation_seconds={self.validation_seconds} must not be negative, and the first two must rise"
            )
        if not 0 <= self.train_point_max <= 1 or not 0 <= self.focal_alpha <= 1 or self.focal_gamma < 0:
            raise ValueError(
                f"anticipation: train_point_max={self.train_point_max} and focal_alpha={self.focal_alpha} must be in "
                f"0..1, focal_gamma={self.focal_gamma} not negative"
            )
        if self.recall_at < 1:
            raise ValueError(f"anticipation.recall_at={self.recall_at} must be at least 1")


# ----------------------------------------------------------------------------------------------------- which frames


def context_end(start: float, stop: float, seconds: float, point: float, form: Form) -> float:
    """When the context of an action from `start` to `stop` ends: `seconds` before a point of the action.

    The point lies the share `point` of the action behind its start, or, as the reference has it, before its end.
    """
    if not start <= stop:
        raise ValueError(f"an action from {start} s to {stop} s ends before it begins")
    aim = start + point * (stop - start) if form == "start_relative" else stop - point * (stop - start)
    return aim - seconds


def draw_aim(config: AnticipationConfig, generator: np.random.Generator | None) -> tuple[float, float]:
    """(seconds, point) of an action: drawn for training, the same for all of validation (no generator)."""
    if generator is None:
        return config.validation_seconds, 0.0
    seconds = generator.uniform(config.train_seconds_min, config.train_seconds_max)
    return float(seconds), float(generator.uniform(0, config.train_point_max))


def context_times(end: float, frames: int, fps: float, begin: float = 0.0) -> np.ndarray:
    """Times of a clip whose last frame is 1 / fps before `end`, and none before `begin`: [T] seconds."""
    return np.maximum(end - np.arange(frames, 0, -1) / fps, begin)


# ----------------------------------------------------------------------------------------------------- which tokens


@dataclass(frozen=True)
class AnticipationFeatures:
    """Tokens of a clip and those that the predictor expects later; both are frozen, in evaluation mode."""

    name: str
    encoder: Encoder
    predictor: Predictor
    fps: float  # frames of the clip a second
    bf16: bool = False  # compute under bf16 autocast, on CUDA only

    def __post_init__(self) -> None:
        wanted, width = self.predictor.config, self.encoder.embed_dim
        if wanted.encoder_dim != width or wanted.num_levels not in (1, len(self.encoder.levels)):
            raise ValueError(
                f"the predictor reads {wanted.num_levels} levels of width {wanted.encoder_dim}, the encoder has "
                f"{len(self.encoder.levels)} of width {width}: give the two that were trained together"
            )
        if wanted.target_dim % width:
            raise ValueError(
                f"the predictor gives {wanted.target_dim} channels, which are no levels of width {width}: it was "
                "trained on another model's features"
            )

    @torch.no_grad()
    def tokens(self, clips: Tensor, seconds: Tensor) -> Tensor:
        """uint8 clips [B, C, T, H, W], anticipation times [B] -> [B, N + h*w, D], float32 on the CPU.

        The first N are the encoder's last level, the others the predictor's last level for one time step, the one that
        lies int(seconds * fps / tubelet) steps behind the clip's last.
        """
        device = next(self.encoder.parameters()).device
        self.encoder.eval()
        self.predictor.eval()
        with bf16_on_gpus(device, enabled=self.bf16):
            return finite(self._tokens(normalise(clips.to(device)), seconds).float().cpu(), self.name)

    def _tokens(self, clips: Tensor, seconds: Tensor) -> Tensor:
        grid, width = self.encoder.grid(clips), self.encoder.embed_dim
        levels = self.encoder.forward_levels([View(clips)])[0][0]  # [B, N, L*D]
        count = levels.shape[1]
        future, whole = self.future_places(grid, seconds)
        future = future.to(levels.device)
        context = torch.arange(count, device=levels.device).expand(len(clips), -1)
        read = levels[..., -self.predictor.config.num_levels * width :]
        predicted, _ = self.predictor(read, context=context, masked=future, grid=whole, modality="video")
        return torch.cat((levels[..., -width:], predicted[..., -width:]), dim=1)

    def future_places(self, grid: Grid, seconds: Tensor) -> tuple[Tensor, Grid]:
        """Indices [B, h*w] of the anticipated time steps, and the grid that holds the clips and all of them."""
        t, h, w = grid
        steps = t + (seconds.double() * self.fps / self.encoder.tubelet_size + 1e-6).long()  # [B]
        places = steps.cpu()[:, None] * (h * w) + torch.arange(h * w)
        return places, (int(steps.max()) + 1, h, w)


# ------------------------------------------------------------------------------------------------- loss and classes


def focal_loss(logits: Tensor, labels: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss, summed over rows and classes (Lin et al. 2017): logits [B, classes], labels [B] -> scalar."""
    truth = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    right = torch.exp(-cross_entropy)  # probability of the true answer, class by class
    weight = alpha * truth + (1 - alpha) * (1 - truth)
    return (weight * (1 - right) ** gamma * cross_entropy).sum()


def anticipation_loss(
    logits: Mapping[str, Tensor], labels: Mapping[str, Tensor], config: AnticipationConfig | None = None
) -> Tensor:
    """Sum of the focal losses of all questions."""
    config = config or AnticipationConfig()
    losses = [
        focal_loss(scores, labels[name], alpha=config.focal_alpha, gamma=config.focal_gamma)
        for name, scores in logits.items()
    ]
    return torch.stack(losses).sum()


def restrict(logits: Tensor, classes: Sequence[int] | Tensor) -> Tensor:
    """Scores [B, classes] with -inf for every class but those given: what does not occur cannot be the answer."""
    allowed = torch.full((logits.shape[1],), -torch.inf, device=logits.device, dtype=logits.dtype)
    allowed[torch.as_tensor(classes, device=logits.device)] = 0
    return logits + allowed


class ClassMeanRecall:
    """Recall@k of every class, averaged over those that occur; counts can be summed over ranks.

    Equal to torchmetrics' MulticlassRecall(top_k=k, average="macro") where the scores are restricted to the classes
    that occur: torchmetrics counts a class that does not occur, but is predicted, as 0.
    """

    def __init__(self, num_classes: int, k: int = 5) -> None:
        self.k = k
        self.hits, self.counts = torch.zeros(2, num_classes, dtype=torch.int64)

    @classmethod
    def over(cls, state: Tensor, k: int) -> ClassMeanRecall:
        """One that counts in `state`, int64 [2, classes]: hits and rows."""
        recall = cls(0, k)
        recall.hits, recall.counts = state
        return recall

    def update(self, logits: Tensor, labels: Tensor) -> ClassMeanRecall:
        """Count scores [B, classes] for labels [B]. Returns itself."""
        nearest = logits.topk(min(self.k, logits.shape[1]), dim=1).indices
        is_hit = (nearest == labels[:, None]).any(dim=1).cpu()
        labels = labels.cpu()
        self.counts += torch.bincount(labels, minlength=len(self.counts))
        self.hits += torch.bincount(labels[is_hit], minlength=len(self.hits))
        return self

    def value(self) -> float:
        """The mean over the classes with at least one row."""
        occurs = self.counts > 0
        if not occurs.any():
            raise ValueError("nothing was counted: the set is empty")
        return (self.hits[occurs].double() / self.counts[occurs]).mean().item()
