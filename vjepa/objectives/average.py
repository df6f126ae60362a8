"""An encoder that follows another by an exponential moving average of all its parameters.

The EMA target is one, and so is the average of a student that a run exports in its place.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from vjepa.nn.encoder import Encoder


def follower_of(encoder: Encoder) -> Encoder:
    """A copy whose parameters are fp32, need no gradient and change only through `start` and `follow`."""
    return copy.deepcopy(encoder).float().requires_grad_(False)


@torch.no_grad()
def start(follower: Encoder, encoder: Encoder) -> None:
    """follower <- encoder."""
    for mine, theirs in zip(follower.parameters(), encoder.parameters(), strict=True):
        mine.copy_(theirs)


@torch.no_grad()
def follow(follower: Encoder, encoder: Encoder, momentum: float) -> None:
    """follower <- momentum * follower + (1 - momentum) * encoder, over all parameters in one foreach call."""
    theirs = [parameter.detach() for parameter in encoder.parameters()]
    mine: list[Tensor] = list(follower.parameters())
    torch._foreach_lerp_(mine, theirs, 1.0 - momentum)  # pyright: ignore[reportPrivateImportUsage]
