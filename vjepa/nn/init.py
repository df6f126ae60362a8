"""Initialisation that depends on nothing but the seed, the module's scope and a parameter's name.

Every parameter draws from its own generator, seeded by (seed, scope, name), on the CPU: the same numbers for every
world size, sharding and order of construction. A model is built on the meta device, filled with NaN, initialised, and
checked, so that a parameter nobody initialises cannot go unnoticed. Of a sharded parameter every rank draws the whole
and keeps its own part: one parameter at a time is whole, never the model.

Rules of the reference (section 1.1): weights truncated normal, std 0.02; biases 0; LayerNorm (1, 0); the residual
outputs of block i (from 1) divided by sqrt(2 i); modality embeddings normal with std 1e-6; mask tokens 0 by default.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

WEIGHT_STD = 0.02
MODALITY_EMBED_STD = 1e-6
RESIDUAL_OUTPUT = re.compile(r"blocks\.(\d+)\.(attn\.proj|mlp\.fc2)\.weight$")

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def build(
    factory: Callable[[], ModuleT],
    *,
    scope: str,
    seed: int,
    weight_std: float = WEIGHT_STD,
    device: torch.device | str | None = None,
) -> ModuleT:
    """Build on the meta device, then materialise and initialise on `device` ("meta" leaves it unmaterialised)."""
    device = torch.device(device or "cpu")
    with torch.device("meta"):
        module = factory()
    if device.type == "meta":
        return module
    module.to_empty(device=device)
    initialise(module, scope=scope, seed=seed, weight_std=weight_std)
    return module


@torch.no_grad()
def initialise(module: nn.Module, *, scope: str, seed: int, weight_std: float = WEIGHT_STD) -> None:
    """Initialise every parameter in place, whole or in shards; a parameter left unset is an error naming it."""
    norms = {name for name, part in module.named_modules() if isinstance(part, nn.LayerNorm)}
    mask_token_std = getattr(getattr(module, "config", None), "mask_token_std", 0.0)
    for name, parameter in module.named_parameters():
        generator = _generator(seed, f"{scope}.{name}")
        parameter.fill_(math.nan)
        owner, _, leaf = name.rpartition(".")
        if owner in norms:
            parameter.fill_(1.0 if leaf == "weight" else 0.0)
        elif leaf == "bias":
            parameter.zero_()
        elif owner == "mask_tokens":
            assign(parameter, _normal(parameter, mask_token_std, generator))
        elif owner == "modality_embeds" or leaf.endswith("_embed"):
            assign(parameter, _normal(parameter, MODALITY_EMBED_STD, generator))
        elif leaf == "weight":
            assign(parameter, _weight(parameter, name, weight_std, generator))
    unset = [name for name, parameter in module.named_parameters() if not _own_part(parameter).isfinite().all()]
    if unset:
        raise RuntimeError(f"no initialisation rule for {unset}: add one to vjepa/nn/init.py")


@torch.no_grad()
def assign(parameter: Tensor, values: Tensor) -> None:
    """Set a parameter, or this rank's shard of it, from its whole values; no rank waits for another."""
    if isinstance(parameter, DTensor):
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
    _own_part(parameter).copy_(values)


def _own_part(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _normal(parameter: Tensor, std: float, generator: torch.Generator) -> Tensor:
    return torch.randn(parameter.shape, generator=generator) * std


def _weight(parameter: Tensor, name: str, std: float, generator: torch.Generator) -> Tensor:
    values = torch.empty(parameter.shape)
    nn.init.trunc_normal_(values, std=std, generator=generator)
    if match := RESIDUAL_OUTPUT.search(name):
        values /= math.sqrt(2.0 * (int(match[1]) + 1))
    return values
