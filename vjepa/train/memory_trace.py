"""What a forward and a backward pass allocate, followed through the code itself on a model of a few blocks.

The objective runs once under FakeTensorMode: shapes and types are true, nothing is computed or stored. A dispatch mode
counts the bytes of all live storages by the section of the step that made them. All blocks of a stack are alike, so
one block in the middle stands for those that were left out; bytes are linear in the number of clips, so two such
traces, of two sizes and with the same events, give every size. `memory.py` adds them up.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vjepa.batch import MODALITIES, Batch, Grid, Mask, Modality
from vjepa.nn.encoder import EncoderConfig
from vjepa.nn.predictor import PredictorConfig
from vjepa.nn.rope import grid_table, sincos_table
from vjepa.objectives import JEPA, ObjectiveConfig
from vjepa.objectives.build import objective_of
from vjepa.objectives.checks import freeze_unused
from vjepa.train.distributed import World
from vjepa.train.parallel import Activations, ParallelConfig, parallelise

DeviceType = Literal["cpu", "cuda"]
Precision = Literal["fp32", "bf16"]
Series = NDArray[np.int64]  # bytes at each event
STATE = "state"


@dataclass(frozen=True)
class ViewSize:
    """One view of every clip."""

    frames: int
    size: int  # pixels of a side
    kept: int | None = None  # tokens that the encoder sees; None: all


@dataclass(frozen=True)
class Load:
    """What a micro-batch holds of one modality."""

    clips: int
    frames: int
    size: int  # pixels of a side
    masks: tuple[tuple[int, int], ...]  # context and masked tokens of every clip, for each mask
    context_of: tuple[int | None, ...] = ()  # for each mask the earlier one whose context it shares; (): none does
    views: tuple[ViewSize, ...] = ()  # all views, global ones first; (): the clip alone
    num_global: int = 0  # global views; 0: all

    def __post_init__(self) -> None:
        if self.clips < 1:
            raise ValueError(f"clips={self.clips} must be at least 1: leave the modality out instead")


Loads = Mapping[Modality, Load]


def objective_on_meta(encoder: EncoderConfig, predictor: PredictorConfig | None, config: ObjectiveConfig) -> JEPA:
    """The objective's shapes."""
    return objective_of(config, encoder, predictor, device="meta")


def fake_micro_batch(loads: Loads, encoder: EncoderConfig) -> dict[Modality, Batch]:
    """A micro-batch of these shapes; under FakeTensorMode it holds nothing."""
    return {modality: _batch(modality, loads[modality], encoder) for modality in MODALITIES if modality in loads}


def _batch(modality: Modality, load: Load, encoder: EncoderConfig) -> Batch:
    side = load.size // encoder.patch_size
    grid: Grid = (max(1, load.frames // encoder.tubelet_size), side, side)

    def pixels(view: ViewSize) -> Tensor:
        return torch.empty(load.clips, encoder.in_chans, view.frames, view.size, view.size, dtype=torch.uint8)

    def indices(count: int) -> Tensor:
        return torch.zeros(load.clips, count, dtype=torch.int64)

    views = load.views or (ViewSize(load.frames, load.size),)
    shared = load.context_of or (None,) * len(load.masks)
    return Batch(
        modality=modality,
        step=0,
        ordinals=tuple(range(load.clips)),
        keys=(),
        views=tuple(map(pixels, views)),
        masks=tuple(Mask(indices(k), indices(m), of) for (k, m), of in zip(load.masks, shared, strict=True)),
        grid=grid,
        num_global=load.num_global,
        view_contexts=tuple(None if view.kept is None else indices(view.kept) for view in views),
    )


# ------------------------------------------------------------------------------------------------- counting live bytes


class LiveBytes(TorchDispatchMode):
    """Bytes of live storages by the section that made them, noted at every allocation."""

    def __init__(self) -> None:
        super().__init__()
        self.section = STATE
        self.live: dict[str, int] = {}
        self.events: list[tuple[str, dict[str, int]]] = []  # section that runs, live bytes by section
        self._made: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()  # storage: section, bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._made:
            return
        made = [self.section, storage.nbytes()]
        self._made[storage] = made
        self._change(made[0], made[1])
        weakref.finalize(storage, self._drop, made)
        self.note()

    def note(self) -> None:
        self.events.append((self.section, dict(self.live)))

    def claim(self, tensor: Tensor, section: str) -> None:
        """Count a tensor's storage under another section."""
        made = self._made[tensor.untyped_storage()]
        self._drop(made)
        made[0] = section
        self._change(section, made[1])

    def _drop(self, made: list[Any]) -> None:
        self._change(made[0], -made[1])

    def _change(self, section: str, size: int) -> None:
        self.live[section] = self.live.get(section, 0) + size


@contextmanager
def _autocast_of_cuda() -> Iterator[None]:
    """Autocast as CUDA has it, on CPU tensors: LayerNorm in fp32, where autocast on CPUs leaves bf16."""
    plain = F.layer_norm

    def layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return plain(x, shape, weight, bias, eps)
        with torch.autocast("cpu", enabled=False):
            return plain(x.float(), shape, weight, bias, eps)

    F.layer_norm = layer_norm
    try:
        yield
    finally:
        F.layer_norm = plain


@contextmanager
def fake_tensors(device_type: DeviceType) -> Iterator[None]:
    """Tensors without memory, on the CPU; with "cuda", autocast does what it does there.

    A CPU-only torch aborts in the backward pass of fake CUDA tensors: it has no device guard for them.
    """
    tables = (grid_table, sincos_table)  # they keep what they made: no fake table may stay, no real one be found
    with ExitStack() as stack:
        for table in tables:
            table.cache_clear()
            stack.callback(table.cache_clear)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if device_type == "cuda":
            stack.enter_context(_autocast_of_cuda())
        yield


# ------------------------------------------------------------------------------------------------------ a short model


@dataclass(frozen=True)
class Trace:
    """Live bytes by section at every allocation of a forward and a backward pass of a short model."""

    sections: tuple[str, ...]  # what runs at each event
    live: Mapping[str, Series]  # section that made them: bytes; constant state is left out


@dataclass(frozen=True)
class Stack:
    """A stack of blocks in a short model: how many it has, and which of them stands for those left out."""

    name: str
    blocks: int

    @property
    def middle(self) -> int:
        return self.blocks - 2


def short_encoder(config: EncoderConfig) -> tuple[EncoderConfig, Stack]:
    """As few blocks as have every level, a first, a last and one without a level in between."""
    levels = len(config.levels)
    depth = max(levels + 1, 3)
    return replace(config, depth=depth, levels=(*range(levels - 1), depth - 1)), Stack("encoder", depth)


def short_predictor(config: PredictorConfig) -> tuple[PredictorConfig, Stack]:
    return replace(config, depth=3), Stack("predictor", 3)


def short_stacks(encoder: EncoderConfig, predictor: PredictorConfig | None) -> list[Stack]:
    """The stacks of a short model."""
    stacks = [short_encoder(encoder)[1]]
    return stacks if predictor is None else [*stacks, short_predictor(predictor)[1]]


def trace(
    encoder: EncoderConfig,
    predictor: PredictorConfig | None,
    objective: ObjectiveConfig,
    loads: Loads,
    *,
    activations: Activations,
    precision: Precision,
    device_type: DeviceType,
) -> Trace:
    """Forward and backward pass of the short model of these configurations."""
    short = short_encoder(encoder)[0]
    short_reader = None if predictor is None else short_predictor(predictor)[0]
    jepa = objective_on_meta(short, short_reader, objective)
    freeze_unused(jepa, list(loads))
    alone = World(0, 1, torch.device("cpu"))
    parallelise(jepa, ParallelConfig(activations=activations), alone, precision=precision)
    with fake_tensors(device_type):
        jepa.to_empty(device="cpu")
        counter = LiveBytes()
        for parameter in jepa.parameters():
            counter.add(parameter)
        _mark_sections(jepa, counter)
        with counter:
            _forward_backward(jepa, fake_micro_batch(loads, short), counter, precision)
    names = [name for name in counter.live if name != STATE]
    live = {name: np.array([event.get(name, 0) for _, event in counter.events], dtype=np.int64) for name in names}
    return Trace(tuple(section for section, _ in counter.events), live)


def section(stack: Stack, block: int, what: Literal["forward", "backward", "gradients"]) -> str:
    """The name of what one block makes."""
    return f"{stack.name} {what} {block}"


def _forward_backward(jepa: JEPA, micro_batch: dict[Modality, Batch], counter: LiveBytes, precision: Precision) -> None:
    """As Trainer._forward_backward; the result stays until the update, as there."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        result = jepa(micro_batch, 0)
        counter.section = "loss"
        loss = result.loss / 1
    counter.section = "loss backward"
    counter.note()
    loss.backward()
    del loss
    counter.section = "update"
    counter.note()


def _mark_sections(jepa: JEPA, counter: LiveBytes) -> None:
    """Let hooks tell the counter which part of the step runs; gradients are counted under their block's name."""
    counter.section = "encoder embed" if jepa.target is None else "target"
    if jepa.target is not None:
        jepa.target.register_forward_hook(lambda *_: _enter(counter, "encoder embed"))
    stacks = [("encoder", jepa.encoder.blocks, "encoder levels")]
    if jepa.predictor is not None:
        stacks.append(("predictor", jepa.predictor.blocks, "heads and losses"))
    for name, blocks, after in stacks:
        for index, block in enumerate(blocks):
            _mark_block(block, counter, Stack(name, len(blocks)), index)
        blocks[-1].register_forward_hook(lambda *_, after=after: _enter(counter, after))
    for name, parameter in jepa.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_claim_gradient(counter, _owner(name)))


def _mark_block(block: nn.Module, counter: LiveBytes, stack: Stack, index: int) -> None:
    def before(_block: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if index == 0:  # its input's gradient ends the stack's backward pass
            arguments[0].register_hook(lambda _gradient: _enter(counter, f"{stack.name} embed backward"))
        _enter(counter, section(stack, index, "forward"))

    def after(_block: nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(lambda _gradient: _enter(counter, section(stack, index, "backward")))

    block.register_forward_pre_hook(before)
    block.register_forward_hook(after)


def _enter(counter: LiveBytes, name: str) -> None:
    counter.note()
    counter.section = name


def _owner(parameter: str) -> str:
    """The section of a parameter's gradient."""
    stack, _, rest = parameter.partition(".")
    if rest.startswith("blocks."):
        return f"{stack} gradients {rest.split('.')[1]}"
    return f"{stack} gradients"


def _claim_gradient(counter: LiveBytes, owner: str) -> Callable[[Tensor], None]:
    def claim(parameter: Tensor) -> None:
        assert parameter.grad is not None
        counter.claim(parameter.grad, owner)

    return claim
