"""AdamW with an asserted partition of the parameters, and step-indexed learning rate and weight decay."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from vjepa.objectives.projector import GlobalBatchNorm
from vjepa.schedules import LearningRateConfig, interpolate


@dataclass
class OptimConfig:
    """AdamW as in the reference (section 4.2)."""

    lr: LearningRateConfig = field(default_factory=LearningRateConfig)
    weight_decay: float = 0.04  # at step 0
    weight_decay_end: float | None = None  # at the last step, linear in between; null keeps it constant
    beta1: float = 0.9  # decay of the gradient's average
    beta2: float = 0.999  # decay of the squared gradient's average
    eps: float = 1e-8  # added to the denominator
    clip_grad: float | None = None  # largest gradient norm; null: no clipping, as in the reference

    def __post_init__(self) -> None:
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise ValueError(f"optim.clip_grad={self.clip_grad} must be positive; null switches clipping off")


def split_parameters(module: nn.Module) -> dict[str, list[str]]:
    """Names of the trainable parameters by group: `decay`, and `no_decay` for biases and norms.

    By name, not by shape: mask tokens and modality embeddings are vectors here and decay, as in the reference.
    """
    norms = {name for name, part in module.named_modules() if isinstance(part, nn.LayerNorm | GlobalBatchNorm)}
    groups: dict[str, list[str]] = {"decay": [], "no_decay": []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            owner, _, leaf = name.rpartition(".")
            groups["no_decay" if leaf == "bias" or owner in norms else "decay"].append(name)
    return groups


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over every trainable parameter of `module`, each in exactly one group."""
    named = dict(module.named_parameters())
    groups = split_parameters(module)
    flat = [name for names in groups.values() for name in names]
    trainable = [name for name, parameter in named.items() if parameter.requires_grad]
    assert sorted(flat) == sorted(trainable), "parameter groups are no partition"  # sorted: repeats show too
    if not trainable:
        raise ValueError("there is no trainable parameter")
    return torch.optim.AdamW(
        [
            {"params": [named[name] for name in names], "group": group, "weight_decay": 0.0}
            for group, names in groups.items()
            if names
        ],
        lr=config.lr.start,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def set_schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, total_steps: int
) -> dict[str, float]:
    """Set learning rate and weight decay for the update numbered `step` from 0; what was set, to log."""
    lr = config.lr.at(step, total_steps)
    weight_decay = interpolate(config.weight_decay, config.weight_decay_end, step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["group"] == "decay" else 0.0
    return {"lr": lr, "weight_decay": weight_decay}
