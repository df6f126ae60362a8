"""Activation checkpointing, compilation and data parallelism, in this order and in one place.

The order matters: a checkpointed block is compiled as a whole, and what is sharded is the block that runs. The
optimizer is built after it; one built before would hold parameters that no gradient reaches (reference
torch-and-distributed 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vjepa.nn.encoder import Encoder
from vjepa.nn.predictor import Predictor
from vjepa.objectives.jepa import JEPA
from vjepa.train.distributed import World

Activations = Literal["keep", "selective", "recompute"]
COMPILER = "inductor"  # of torch.compile
# Entry points other than forward: FSDP gathers parameters around those it knows.
ENTRIES = {"encoder": "forward_levels", "predictor": "forward_queries", "target": "forward_levels"}


@dataclass
class ParallelConfig:
    """How the model is spread over ranks, and what a step keeps in memory."""

    mode: Literal["ddp", "fsdp"] = "ddp"  # ddp: a copy on every rank; fsdp: every parameter, target too, in shards
    shard_ranks: int | None = None  # ranks that share one copy, the rest replicate it (HSDP); null: all
    activations: Activations = "keep"  # of each block for the backward pass; selective recomputes all but some products
    compile: bool = False  # torch.compile each block
    reduce_each: bool = False  # fsdp: average gradients with each micro-batch, which keeps them in shards; else once

    def __post_init__(self) -> None:
        if self.shard_ranks is not None and self.mode != "fsdp":
            raise ValueError(f"parallel.shard_ranks={self.shard_ranks} needs parallel.mode=fsdp")
        if self.reduce_each and self.mode != "fsdp":
            raise ValueError("parallel.reduce_each=true needs parallel.mode=fsdp: ddp has all gradients on every rank")
        if self.shard_ranks is not None and self.shard_ranks < 1:
            raise ValueError(f"parallel.shard_ranks={self.shard_ranks} must be at least 1; null shards over all ranks")

    def check_world(self, world_size: int) -> None:
        """Refuse shards that do not fit the ranks."""
        if self.shard_ranks is not None and world_size % self.shard_ranks:
            raise ValueError(
                f"train.parallel.shard_ranks={self.shard_ranks} must divide the {world_size} ranks: every copy of the "
                "model lies on that many"
            )


def parallelise(
    objective: JEPA,
    config: ParallelConfig,
    world: World,
    *,
    precision: str,
    fill: Callable[[JEPA], None] | None = None,
) -> nn.Module:
    """Prepare an objective for training on these ranks; call what is returned in place of it.

    An objective on the meta device gets its memory here, once it is in shards, and its values from `fill`: no rank ever
    holds more than its own part.
    """
    config.check_world(world.size)
    for stack in _trained_stacks(objective).values():
        for block in stack.blocks:
            _recompute(block, config.activations)
    if config.compile:
        for stack in _stacks(objective).values():
            for block in stack.blocks:
                block.compile(backend=COMPILER, dynamic=True)  # context lengths change from step to step
    is_sharded = config.mode == "fsdp" and world.size > 1
    if is_sharded:
        _shard(objective, _mesh(config, world), precision)
    if fill is not None:
        objective.to_empty(device=world.device)
        fill(objective)
    if world.size == 1 or is_sharded:
        return objective
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(objective, device_ids=device_ids, gradient_as_bucket_view=True)


def _trained_stacks(objective: JEPA) -> dict[str, Encoder | Predictor]:
    """What holds blocks and is trained."""
    stacks: dict[str, Encoder | Predictor] = {"encoder": objective.encoder}
    return stacks if objective.predictor is None else stacks | {"predictor": objective.predictor}


def _stacks(objective: JEPA) -> dict[str, Encoder | Predictor]:
    """What holds blocks that compute."""
    target = objective.target_encoder
    return _trained_stacks(objective) | ({} if target is None else {"target": target})


def _mesh(config: ParallelConfig, world: World) -> DeviceMesh:
    shards = config.shard_ranks or world.size
    if shards == world.size:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    shape = (world.size // shards, shards)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def _shard(objective: JEPA, mesh: DeviceMesh, precision: str) -> None:
    """Shard every block, then what is left of encoder, predictor, target and average; parameters keep their names.

    Master weights and gradients stay fp32; with bf16 what is gathered for a block is bf16. Of an average nothing
    is ever gathered.
    """
    computed = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=computed, reduce_dtype=torch.float32 if computed else None)
    average = {} if objective.average is None else {"average": objective.average}
    for name, stack in (_stacks(objective) | average).items():
        for block in stack.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        # The target has no backward pass that would free its root: gathered parameters would meet the EMA.
        fully_shard(stack, mesh=mesh, mp_policy=policy, reshard_after_forward=name == "target" or None)
        if name in ENTRIES:
            register_fsdp_forward_method(stack, ENTRIES[name])
    for head in objective.heads.values():
        if any(True for _ in head.parameters()):
            fully_shard(head, mesh=mesh)  # in fp32: statistics come after it


@contextmanager
def gradient_sync(module: nn.Module, *, is_last: bool) -> Iterator[None]:
    """Gradients are averaged over ranks where `is_last`: with a step's last micro-batch, or with each of them."""
    if isinstance(module, DistributedDataParallel) and not is_last:
        with module.no_sync():
            yield
        return
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(is_last, recurse=False)
    yield


def full(value: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank (collective); any other tensor as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """All parameters of a module, whole, on the CPU of the main rank ({} on the others); collective where sharded."""
    state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return cast(dict[str, Tensor], state)


# ------------------------------------------------------------------------------------------- activation checkpointing


def _recompute(block: nn.Module, activations: Activations) -> None:
    """Let a block keep less for its backward pass. Its parameters keep their names: no module is wrapped."""
    if activations == "keep":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # there is no dropout
    if activations == "selective":
        options["context_fn"] = _selective_contexts
    block.forward = partial(checkpoint, block.forward, **options)


def _selective_contexts() -> Any:
    """Contexts for one call: attention and every second matrix product are kept, everything else is recomputed.

    The policy of torchtitan (reference torch-and-distributed 2.7): about half the memory of keeping all.
    """
    attention, products = _kept_operators()
    counts = {False: 0, True: 0}  # products seen in the forward pass and in its repetition

    def policy(context: Any, operator: Any, *_arguments: Any, **_keywords: Any) -> CheckpointPolicy:
        if operator in products:
            counts[context.is_recompute] += 1
        keep = operator in attention or (operator in products and counts[context.is_recompute] % 2 == 1)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _kept_operators() -> tuple[set[Any], set[Any]]:
    """Attention kernels and matrix products as torch's dispatcher calls them; those this torch has not are left out."""
    attention = (
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_flash_attention",
        "aten._scaled_dot_product_efficient_attention",
        "aten._scaled_dot_product_cudnn_attention",
        "aten._flash_attention_forward",
        "aten._efficient_attention_forward",
        "xformers_flash.flash_fwd",
        "xformers_flash3.flash_fwd",
        "torch_attn._varlen_attn",
    )
    return {op for op in map(_operator, attention) if op}, {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}


def _operator(name: str) -> Any:
    namespace, name = name.split(".")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    return None if packet is None else packet.default
