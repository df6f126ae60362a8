"""A latent variable for the predictor: what the context cannot tell of the target, in few nats.

LeCun's position paper (A Path Towards Autonomous Machine Intelligence, 2022, section 4): where several targets fit one
context, a latent z picks one of them. Here z is inferred from the target at the masked places and from nothing else,
q(z | target). Nothing stops such a z from being a copy of the target, so that the predictor needs no context any more
(latent bypass): its information must be limited. Two ways, both with a price in nats, KL(q(z | target) || p(z)), whose
mean over clips is an upper bound of the information that z carries about the target:

    gaussian    z ~ N(mean, variance), p = N(0, I): limited by noise, and by the number of coordinates
    discrete    z = groups of one-hot codes, p uniform: at most groups x log(codes) nats, whatever the price

Noise is drawn on the CPU from (seed, step, clip's ordinal, mask): the same on any number of ranks and micro-batches.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjepa.nn.gather import take_tokens
from vjepa.nn.init import WEIGHT_STD, initialise


@dataclass
class LatentConfig:
    """The predictor's latent variable; `none` has none."""

    kind: Literal["none", "gaussian", "discrete"] = "none"
    per: Literal["clip", "token"] = "clip"  # one latent for all masked tokens of a clip and mask, or one for each
    dim: int = 16  # gaussian: coordinates
    groups: int = 4  # discrete: variables, each of them one of `codes`
    codes: int = 16  # discrete: values of a variable; groups x log(codes) nats is all that a latent can carry
    temperature: float = 1.0  # discrete: of the softmax through which gradients go; lower is nearer to the codes
    hidden_dim: int = 256  # of the network that infers the latent
    seed: int = 0  # of the noise

    def __post_init__(self) -> None:
        for name in ("dim", "groups", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"latent.{name}={getattr(self, name)} must be at least 1; kind=none has no latent")
        if self.codes < 2:
            raise ValueError(f"latent.codes={self.codes} must be at least 2: one code tells nothing")
        if self.temperature <= 0:
            raise ValueError(f"latent.temperature={self.temperature} must be positive")

    @property
    def width(self) -> int:
        """Channels of the latent: the predictor's `latent_dim`; 0 where there is none."""
        return {"none": 0, "gaussian": self.dim, "discrete": self.groups * self.codes}[self.kind]


class Latent(NamedTuple):
    """The latent of one mask: `value` [B, 1 or M, width] and its price by clip, `nats` [B], both fp32.

    A tuple, because FSDP2 before torch 2.13 finds no tensors in a dataclass that a module returns, and would leave the
    gradients of `LatentInference` different on every rank.
    """

    value: Tensor
    nats: Tensor


class LatentInference(nn.Module):
    """q(z | target): an MLP over the target's tokens at the masked places, their mean where z is of the clip."""

    def __init__(self, config: LatentConfig, target_dim: int) -> None:
        super().__init__()
        if config.kind == "none":
            raise ValueError("latent.kind=none has nothing to infer: choose gaussian or discrete")
        self.config = config
        self.fc1 = nn.Linear(target_dim, config.hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(config.hidden_dim, 2 * config.dim if config.kind == "gaussian" else config.width)

    def initialise(self, *, scope: str, seed: int, weight_std: float = WEIGHT_STD) -> None:
        """Fill every weight, whole or in shards: with the usual small ones z begins as noise that costs nothing."""
        initialise(self, scope=scope, seed=seed, weight_std=weight_std)

    def forward(self, target: Tensor, masked: Sequence[Tensor], noise: Sequence[Tensor]) -> list[Latent]:
        """The target [B, N, L*D], and for each mask its masked places [B, M] and noise [B, 1 or M, width] -> samples.

        No gradient reaches the target: it is what z has to describe. Of its tokens only those at the masked places
        count; that all go through the first layer saves a copy of them for each mask.
        """
        features = self.act(self.fc1(target.detach()))  # [B, N, hidden]
        return [self._sample(take_tokens(features, places), drawn) for places, drawn in zip(masked, noise, strict=True)]

    def _sample(self, features: Tensor, noise: Tensor) -> Latent:
        """Features [B, M, hidden] of the masked places -> z."""
        if self.config.per == "clip":
            features = features.mean(dim=1, keepdim=True)
        told = self.fc2(features).float()  # whatever autocast says: the price is a statistic
        if self.config.kind == "gaussian":
            mean, log_variance = told.chunk(2, dim=-1)
            return Latent(mean + (0.5 * log_variance).exp() * noise, gaussian_nats(mean, log_variance).sum(dim=1))
        logits = told.unflatten(-1, (self.config.groups, self.config.codes))
        codes = straight_through(logits + noise.unflatten(-1, logits.shape[-2:]), self.config.temperature)
        return Latent(codes.flatten(-2), categorical_nats(logits).sum(dim=1))


def gaussian_nats(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, I)) in nats, both [..., dim] -> [...]."""
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(dim=-1)


def categorical_nats(logits: Tensor) -> Tensor:
    """KL(softmax(logits) || uniform) in nats, summed over groups: [..., groups, codes] -> [...]."""
    log_q = F.log_softmax(logits, dim=-1)
    return (log_q.exp() * (log_q + math.log(logits.shape[-1]))).sum(dim=(-2, -1))


def straight_through(scores: Tensor, temperature: float) -> Tensor:
    """One-hot of the largest score [..., codes], with the gradient of softmax(scores / temperature).

    Of logits plus Gumbel noise this is a sample of softmax(logits) (Gumbel-softmax, arXiv 1611.01144, section 2.2).
    """
    soft = (scores / temperature).softmax(dim=-1)
    hard = F.one_hot(scores.argmax(dim=-1), scores.shape[-1]).to(soft.dtype)
    return hard + (soft - soft.detach())


def latent_noise(
    config: LatentConfig, ordinals: Sequence[int], num_masked: int, *, step: int, name: str, device: torch.device
) -> Tensor:
    """Noise of the clips' latents [B, 1 or M, width], fp32: standard normal, or Gumbel for discrete ones.

    A function of (config.seed, step, ordinal, name) for each clip; `name` tells modalities and masks apart.
    """
    noise = torch.empty(len(ordinals), 1 if config.per == "clip" else num_masked, config.width)
    for row, ordinal in zip(noise, ordinals, strict=True):
        digest = hashlib.sha256(f"{config.seed}/{step}/{ordinal}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        if config.kind == "gaussian":
            row.normal_(generator=generator)
        else:
            row.uniform_(generator=generator)
    if config.kind == "discrete":
        noise = -(-noise.clamp_min(torch.finfo(torch.float32).tiny).log()).log()
    if device.type == "cuda":
        noise = noise.pin_memory()  # a pageable copy would wait for the device
    return noise.to(device, non_blocking=True)
