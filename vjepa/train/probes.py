"""How good are the features, while they are learned? Two probes on labels that training itself never sees.

A k-NN asks the mean tokens of the last clips; an attentive probe, one cross-attention query and a linear layer, is
trained beside the encoder with an optimizer of its own. Both name the clips of a step before they learn from them.
They look at the last level of a step's last micro-batch, detached: no number of the training depends on them. There is
nothing random in them, and their state is part of the checkpoint.

Read them along one run. The clips are those that are trained on, and come again in every epoch: where the queue holds
an epoch or more, the k-NN may meet the same clip again. What features are worth, `launch.evaluate` says.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional as F

from vjepa.batch import Batch, Modality
from vjepa.objectives.jepa import JEPA
from vjepa.objectives.outputs import Outputs
from vjepa.train.distributed import World
from vjepa.train.levels import own_tokens

log = logging.getLogger(__name__)
UNLABELLED = -1
STATE_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass
class ProbeConfig:
    """Online probes; off without a label."""

    label: str | None = None  # a clip's class in its record, as NAME or NAME.KEY (labels.direction); null: no probes
    classes: int = 0  # labels are 0 to classes - 1; clips without one are left out
    modality: Modality = "video"  # whose clips are asked
    features: Literal["target", "encoder"] = "target"  # encoder: the trained encoder's own tokens of the first mask
    queue: int = 4096  # last labelled clips of all ranks that the k-NN asks
    neighbours: int = 20  # k
    temperature: float = 0.07  # of the votes: exp(cosine / temperature)
    lr: float = 1e-3  # of the attentive probe's AdamW, constant

    def __post_init__(self) -> None:
        if self.label is not None and self.classes < 2:
            raise ValueError(f"probe.label={self.label} needs probe.classes of at least 2, got {self.classes}")
        if not 1 <= self.neighbours <= self.queue:
            raise ValueError(f"probe.neighbours={self.neighbours} must be between 1 and probe.queue={self.queue}")
        if min(self.temperature, self.lr) <= 0:
            raise ValueError(f"probe.temperature={self.temperature} and probe.lr={self.lr} must be positive")


class AttentivePool(nn.Module):
    """Tokens [B, K, D] -> class scores [B, classes]: one query attends to layer-normed tokens, a linear layer scores.

    Keys and values need no projections of their own: the query and the linear layer hold them. All begins at zero, as
    a linear probe of mean tokens.
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(dim))
        self.weight = nn.Parameter(torch.zeros(classes, dim))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        attention = (tokens @ self.query / tokens.shape[-1] ** 0.5).softmax(dim=-1)  # [B, K]
        return F.linear((attention[:, None] @ tokens).squeeze(1), self.weight, self.bias)


class OnlineProbes(nn.Module):
    """Both probes and what they remember; the same on all ranks, which must make the same calls."""

    def __init__(self, config: ProbeConfig, dim: int, world: World) -> None:
        super().__init__()
        self.config, self.world = config, world
        self.attentive = AttentivePool(dim, config.classes)
        # One place more than the queue: clips without a label are written there, and nobody reads it.
        self.register_buffer("features", torch.zeros(config.queue + 1, dim))
        self.register_buffer("labels", torch.full((config.queue + 1,), UNLABELLED))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("sums", torch.zeros(4, dtype=torch.float64))  # since the last `figures`: see there
        self.to(world.device)
        self.optimizer = torch.optim.AdamW(self.attentive.parameters(), lr=config.lr, weight_decay=0.0)
        self._is_first = True
        self.features: Tensor
        self.labels: Tensor
        self.pushed: Tensor
        self.sums: Tensor

    def observe(self, outputs: Outputs, batch: Batch) -> None:
        """Name the clips of a micro-batch, then learn from them; collective, and nothing is read by the host."""
        tokens = self._tokens(outputs)  # [B, K, D]
        labels = self._labels(batch)
        is_sound = tokens.isfinite().all(dim=-1).all(dim=-1)  # one step that is skipped must not end the probes
        tokens = torch.where(is_sound[:, None, None], tokens, 0)
        labels = torch.where(is_sound, labels, UNLABELLED)
        features = F.normalize(tokens.mean(dim=1), dim=-1)
        self._learn(tokens, labels, (self._vote(features) == labels).sum())
        self._push(features, labels)

    def figures(self) -> dict[str, Tensor]:
        """What to log of the labelled clips since the last call, the same on all ranks."""
        labelled, nearest, attentive, loss = self.sums.clone()
        self.sums.zero_()
        count = labelled.clamp_min(1)
        return {
            "probe/labelled": labelled,
            "probe/knn/accuracy": nearest / count,
            "probe/attentive/accuracy": attentive / count,
            "probe/attentive/loss": loss / count,
        }

    def state(self) -> dict[str, Any]:
        """Everything that the next figures depend on, as a checkpoint takes it."""
        return {
            "model": get_model_state_dict(self),
            "optimizer": get_optimizer_state_dict(self.attentive, self.optimizer, options=STATE_OPTIONS),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        set_model_state_dict(self, state["model"])
        set_optimizer_state_dict(self.attentive, self.optimizer, state["optimizer"], options=STATE_OPTIONS)

    def _tokens(self, outputs: Outputs) -> Tensor:
        """The last level's tokens [B, K, D], fp32, without gradient."""
        if self.config.features == "encoder":
            tokens, count = own_tokens(outputs), outputs.num_levels
        else:
            tokens, count = outputs.target, outputs.num_target_levels
        if tokens is None:
            raise ValueError(
                f"train.probe.features={self.config.features}: there are none here, choose the other of target "
                "and encoder"
            )
        return tokens.detach().chunk(count, dim=-1)[-1].float()

    def _labels(self, batch: Batch) -> Tensor:
        """The clips' classes, [B] int64; UNLABELLED where a record carries none."""
        name, *keys = (self.config.label or "").split(".")
        values = batch.extra.get(name) or [None] * len(batch)
        found = [self._class(value, keys, clip) for value, clip in zip(values, batch.keys, strict=True)]
        if self._is_first and self.world.is_main and set(found) == {UNLABELLED}:
            log.warning(
                "train.probe.label=%s: no %s clip of the first batch has it; its records carry %s",
                *(self.config.label, batch.modality, ", ".join(sorted(batch.extra)) or "nothing"),
            )
        self._is_first = False
        return torch.tensor(found, dtype=torch.int64).to(self.world.device, non_blocking=True)

    def _class(self, value: Any, keys: list[str], clip: str) -> int:
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None:
            return UNLABELLED
        if not isinstance(value, int) or not 0 <= value < self.config.classes:
            raise ValueError(
                f"train.probe.label={self.config.label}: clip {clip} has {value!r}, which is no class from 0 to "
                f"{self.config.classes - 1}: choose another label, or set train.probe.classes"
            )
        return value

    @torch.no_grad()
    def _vote(self, features: Tensor) -> Tensor:
        """The class that the nearest clips of the queue name, [B]; features: [B, D], unit vectors."""
        near = (features @ self.features.T).masked_fill(self.labels == UNLABELLED, -torch.inf)  # [B, queue + 1]
        cosine, index = near.topk(self.config.neighbours, dim=-1)
        weights = (cosine / self.config.temperature).exp()  # 0 for places that are still empty
        named = F.one_hot(self.labels[index].clamp_min(0), self.config.classes)  # [B, k, classes]
        return (weights[:, :, None] * named).sum(dim=1).argmax(dim=-1)

    def _learn(self, tokens: Tensor, labels: Tensor, nearest: Tensor) -> None:
        """One step of the attentive probe on the labelled clips of all ranks, whose counts travel with the gradient."""
        parameters = list(self.attentive.parameters())
        with torch.enable_grad():
            scores = self.attentive(tokens)
            loss = F.cross_entropy(scores, labels, ignore_index=UNLABELLED, reduction="sum")
        gradients = torch.autograd.grad(loss, parameters)
        attentive = (scores.argmax(dim=-1) == labels).sum()
        counts = torch.stack([(labels != UNLABELLED).sum(), nearest, attentive, loss.detach()])
        total = self.world.sum(torch.cat([*(gradient.flatten() for gradient in gradients), counts]))
        gradient, counts = total[:-4], total[-4:]
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, part in zip(parameters, (gradient / counts[0].clamp_min(1)).split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.sums += counts

    @torch.no_grad()
    def _push(self, features: Tensor, labels: Tensor) -> None:
        """Write the labelled clips of all ranks over the oldest of the queue."""
        features, labels = self.world.gather_rows(features), self.world.gather_rows(labels)
        is_labelled = labels != UNLABELLED
        place = (self.pushed + is_labelled.cumsum(dim=0) - 1) % self.config.queue
        place = torch.where(is_labelled, place, self.config.queue)
        self.features[place] = features
        self.labels[place] = labels
        self.pushed += is_labelled.sum()


def build_probes(config: ProbeConfig, objective: JEPA, world: World) -> OnlineProbes | None:
    """The probes of a run, None where no label is named."""
    if config.label is None:
        return None
    teacher = getattr(objective.target, "encoder", objective.encoder)
    encoder = objective.encoder if config.features == "encoder" else teacher
    return OnlineProbes(config, encoder.embed_dim, world)
