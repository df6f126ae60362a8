"""A training step without memory: the real objective, optimizer and EMA under FakeTensorMode, on any ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.train.live_storages import LiveStorages
from vjepa.nn.encoder import EncoderConfig
from vjepa.nn.predictor import PredictorConfig
from vjepa.objectives import JEPA, ObjectiveConfig
from vjepa.objectives.checks import freeze_unused
from vjepa.train.distributed import World
from vjepa.train.memory_trace import DeviceType, Loads, Precision, fake_micro_batch, fake_tensors, objective_on_meta
from vjepa.train.optim import OptimConfig, build_optimizer
from vjepa.train.parallel import ParallelConfig, gradient_sync, parallelise


@contextmanager
def fake_ranks(size: int) -> Iterator[World]:
    """The first of so many ranks, whose collectives do nothing."""
    if size > 1:
        dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield World(0, size, torch.device("cpu"))
    finally:
        if size > 1:
            dist.destroy_process_group()


def measured_peak(
    encoder: EncoderConfig,
    predictor: PredictorConfig,
    loads: Loads,
    *,
    parallel: ParallelConfig,
    world_size: int,
    precision: Precision,
    device_type: DeviceType,
    num_micro_batches: int,
    config: ObjectiveConfig | None = None,
) -> int:
    """Bytes of live storages at the fullest moment of the second step."""
    with fake_ranks(world_size) as world:
        objective = objective_on_meta(encoder, predictor, config or ObjectiveConfig())
        freeze_unused(objective, list(loads))
        module = parallelise(objective, parallel, world, precision=precision)
        with fake_tensors(device_type):
            objective.to_empty(device="cpu")
            optimizer = build_optimizer(objective, OptimConfig())
            with LiveStorages(objective.parameters()) as storages:
                _update_without_gradients(objective, optimizer)
                storages.peak = storages.live
                result = None
                for index in range(num_micro_batches):
                    result = None
                    batch = fake_micro_batch(loads, encoder)
                    with gradient_sync(module, is_last=parallel.reduce_each or index == num_micro_batches - 1):
                        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                            result = module(batch, 0)
                        result.loss.backward()
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                objective.update_target(1, 10)
                assert result is not None
    return storages.peak


def _update_without_gradients(objective: JEPA, optimizer: torch.optim.Optimizer) -> None:
    """The first step's update, which makes the optimizer's state."""
    for parameter in objective.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
