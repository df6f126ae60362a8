"""How much memory one rank needs for a step, by part, before anything is allocated.

State (parameters, target, gradients, optimizer) is counted from the model's shapes and the shards. What comes and goes
is traced through the code (`memory_trace.py`) and summed event by event: the peak is that of the moment at which the
sum is largest, not a sum of peaks. What FSDP gathers and reduces is added by section, as named in `_Gathered`.

Not counted: CUDA's context, libraries' workspaces and the allocator's fragments. A planner keeps a reserve for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from vjepa.batch import MODALITIES, Modality
from vjepa.nn.encoder import EncoderConfig
from vjepa.nn.predictor import PredictorConfig
from vjepa.objectives import JEPA, ObjectiveConfig
from vjepa.objectives.checks import freeze_unused
from vjepa.train.memory_trace import (
    DeviceType,
    Load,
    Loads,
    Precision,
    Series,
    Trace,
    objective_on_meta,
    section,
    short_stacks,
    trace,
)
from vjepa.train.parallel import Activations, ParallelConfig

FP32, BF16 = 4, 2
ADAM = 2 * FP32  # both averages


@dataclass(frozen=True)
class Need:
    """One rank's memory at its fullest moment."""

    moment: str  # section of the step
    parts: Mapping[str, int]  # bytes by part, the same names whatever the settings of a recipe

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def largest(self, count: int) -> list[tuple[str, int]]:
        return sorted(self.parts.items(), key=lambda item: -item[1])[:count]


@dataclass(frozen=True)
class Elements:
    """Numbers of parameters: of all of them, or of one rank's shard with its padding."""

    model: int
    target: int
    average: int
    trainable: int


def count_elements(objective: JEPA, shards: int = 1) -> Elements:
    """The parameters on one of so many ranks: FSDP cuts the first dimension and pads it to equal shards."""

    def total(module: nn.Module, *, is_trainable: bool = False) -> int:
        chosen = (p for p in module.parameters() if p.requires_grad or not is_trainable)
        return sum(p.numel() // p.shape[0] * math.ceil(p.shape[0] / shards) for p in chosen)

    models = [m for m in (objective.encoder, objective.predictor, objective.heads) if m is not None]
    return Elements(
        model=sum(map(total, models)),
        target=0 if objective.target_encoder is None else total(objective.target_encoder),
        average=0 if objective.average is None else total(objective.average),
        trainable=sum(total(model, is_trainable=True) for model in models),
    )


class StepMemory:
    """The memory of a step for every micro-batch and every way of sharding, at one policy of activations.

    `unit` is the smallest micro-batch; `need` takes multiples of it.
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        predictor: PredictorConfig | None,
        objective: ObjectiveConfig,
        unit: Loads,
        *,
        activations: Activations,
        precision: Precision,
        device_type: DeviceType = "cuda",
    ) -> None:
        self.activations, self.precision = activations, precision
        self.objective = objective_on_meta(encoder, predictor, objective)
        freeze_unused(self.objective, list(unit))
        first = 2 if min(load.clips for load in unit.values()) == 1 else 1  # one clip: some copies become views
        once, twice = (
            trace(
                *(encoder, predictor, objective, _times(unit, count)),
                activations=activations,
                precision=precision,
                device_type=device_type,
            )
            for count in (first, 2 * first)
        )
        assert once.sections == twice.sections, "the events of a step depend on the number of clips"
        depths = {"encoder": encoder.depth, "predictor": 0 if predictor is None else predictor.depth}
        extra = {stack.name: depths[stack.name] - stack.blocks for stack in short_stacks(encoder, predictor)}
        self.sections = once.sections
        self.events = np.array([name not in _middles(encoder, predictor) for name in once.sections])
        parts = [_by_part(found, encoder, predictor, extra) for found in (once, twice)]
        self.gradients = parts[0].pop("gradients")
        parts[1].pop("gradients")
        self.fixed = {name: 2 * parts[0][name] - parts[1][name] for name in parts[0]}  # whatever the clips
        self.per_unit = {name: (parts[1][name] - parts[0][name]) / first for name in parts[0]}
        self.gathered = _Gathered(self.objective, BF16 if precision == "bf16" else FP32).by_event(self.sections)
        self._elements: dict[int, Elements] = {}  # by shards

    def need(self, multiple: int, parallel: ParallelConfig, world_size: int, num_micro_batches: int = 1) -> Need:
        """One rank's fullest moment with micro-batches of `multiple` units."""
        parallel.check_world(world_size)
        is_sharded = parallel.mode == "fsdp" and world_size > 1
        shards = (parallel.shard_ranks or world_size) if is_sharded else 1
        whole, local = self._count(1), self._count(shards)
        moving = {name: series * multiple for name, series in self.per_unit.items()}
        gradients = self._gradients(whole, local, parallel, world_size, num_micro_batches)
        weights = self.gathered if is_sharded else sum(self.fixed.values())
        assert not isinstance(weights, int)
        total = np.where(self.events, sum(moving.values()) + gradients + weights, -1)
        fullest = int(np.argmax(total))
        parts = {
            "parameters": FP32 * local.model,
            "target encoder": _target_width(self.objective) * local.target,
            **({} if self.objective.average is None else {"average": FP32 * local.average}),
            "optimizer": ADAM * local.trainable,
            "gradients": int(gradients[fullest]),
            "weights gathered or cast": int(weights[fullest]),
            **{name: int(series[fullest]) for name, series in moving.items()},
        }
        return Need(self.sections[fullest], parts)

    def _count(self, shards: int) -> Elements:
        if shards not in self._elements:
            self._elements[shards] = count_elements(self.objective, shards)
        return self._elements[shards]

    def _gradients(
        self, whole: Elements, local: Elements, parallel: ParallelConfig, world_size: int, num_micro_batches: int
    ) -> Series:
        """DDP's buckets always exist, accumulated gradients from the second micro-batch on.

        FSDP keeps those whole until they are reduced with the last one, unless it reduces with each.
        """
        is_sharded = parallel.mode == "fsdp" and world_size > 1
        if num_micro_batches > 1:
            held = local if is_sharded and parallel.reduce_each else whole
            return np.full_like(self.gradients, FP32 * held.trainable)
        if world_size > 1 and not is_sharded:
            return np.full_like(self.gradients, FP32 * whole.trainable)
        return self.gradients * local.trainable // whole.trainable


def _times(unit: Loads, count: int) -> dict[Modality, Load]:
    return {m: replace(unit[m], clips=count * unit[m].clips) for m in MODALITIES if m in unit}


def _middles(encoder: EncoderConfig, predictor: PredictorConfig | None) -> set[str]:
    stacks = short_stacks(encoder, predictor)
    return {section(stack, stack.middle, what) for stack in stacks for what in ("forward", "backward")}


def _by_part(
    found: Trace, encoder: EncoderConfig, predictor: PredictorConfig | None, extra: Mapping[str, int]
) -> dict[str, Series]:
    """Live bytes at every event by part, the blocks that were left out added."""
    zero = np.zeros(len(found.sections), dtype=np.int64)
    names = ("gradients", "encoder activations", "predictor activations", "targets, levels, losses", "in flight")
    parts = {name: zero.copy() for name in names}
    middles = {
        section(stack, stack.middle, what): extra[stack.name]
        for stack in short_stacks(encoder, predictor)
        for what in ("forward", "backward", "gradients")
    }
    for name, series in found.live.items():
        parts[_part(name)] += series * (1 + middles.get(name, 0))
    return parts


def _part(name: str) -> str:
    stack = name.split()[0]
    if " gradients" in name:
        return "gradients"
    if "backward" in name:
        return "in flight"
    if " forward " in name:
        return f"{stack} activations"
    return "targets, levels, losses"


class _Gathered:
    """What FSDP2 holds beside the shards, by section of the step; `width` bytes an element are gathered.

    A block's forward pass: its weights, the buffer they came in and the next block's. Its backward pass: its weights,
    the next block's and its gradients; then, its weights freed, an fp32 buffer to reduce the gradients. Encoder and
    predictor keep the weights outside their blocks from the forward pass to the end of the backward pass, and their
    gradients until they are reduced there.
    """

    def __init__(self, objective: JEPA, width: int) -> None:
        self.width = width
        self.target_width = min(width, _target_width(objective))
        named = {"encoder": objective.encoder, "predictor": objective.predictor, "target": objective.target_encoder}
        stacks = {name: stack for name, stack in named.items() if stack is not None}
        nothing = dict.fromkeys(named, 0)
        self.block = nothing | {name: _elements(stack.blocks[0]) for name, stack in stacks.items()}
        self.root = nothing | {name: _elements(stack) - _elements(stack.blocks) for name, stack in stacks.items()}

    def by_event(self, sections: tuple[str, ...]) -> Series:
        bytes_of = {name: self._of(name) for name in set(sections)}
        return np.array([bytes_of[name] for name in sections], dtype=np.int64)

    def _of(self, name: str) -> int:
        width, block, root = self.width, self.block, self.root
        roots = width * (root["encoder"] + root["predictor"])
        if name == "target":
            return self.target_width * (root["target"] + 3 * block["target"])
        if name.startswith("encoder ") and "backward" not in name:
            return width * (root["encoder"] + 3 * block["encoder"])
        if "backward" not in name:
            return 0 if name == "update" else roots + 3 * width * block["predictor"]
        gradients = width * root["predictor"] + (width * root["encoder"] if name.startswith("encoder") else 0)
        stack = "encoder" if name.startswith("encoder") else "predictor"
        if name == "encoder embed backward":
            return roots + gradients + FP32 * (root["encoder"] + root["predictor"])
        return roots + gradients + max(3 * width, 2 * width + FP32) * block[stack]


def _target_width(objective: JEPA) -> int:
    """Bytes of one of the target encoder's parameters; only a frozen teacher's are not fp32."""
    target = objective.target_encoder
    return FP32 if target is None else next(target.parameters()).element_size()


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
