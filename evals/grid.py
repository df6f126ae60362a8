"""Heads that learn side by side: one reading of the features trains a whole grid of learning rates and weight decays.

Any module is a head, and any loss will do. Batches are a function of the step, and so are schedules and noise: a fit
that is stopped goes on where it was, and two ranks that split every batch learn what one process learns.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from vjepa.schedules import linear_ramp
from vjepa.train.distributed import ALONE, World

FORMAT_VERSION = 1
MAX_OVER_HEADS = "max_over_heads"  # ends the name of the papers' number, whose head is chosen on what it is scored on

Batches = Callable[[int], tuple[Any, Any]]
"""Step -> features and labels of this rank's part of its batch: as many rows on every rank, in the order of ranks."""


class Loss(Protocol):
    """Outputs of a head and labels -> a scalar; over several ranks by the convention of vjepa's collectives.py."""

    def __call__(self, outputs: Any, labels: Any, *, step: int) -> Tensor: ...


class GridStateError(ValueError):
    """A stored state does not belong to this fit, or cannot be read; the message says what to do."""


# ------------------------------------------------------------------------------------------------ what is asked for


@dataclass(frozen=True)
class Setting:
    """What one head of the grid is trained with."""

    lr: float
    weight_decay: float

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.weight_decay < 0:
            raise ValueError(f"{self}: lr must be positive and weight_decay not negative")

    def __str__(self) -> str:
        return f"lr {self.lr:g}, weight decay {self.weight_decay:g}"


def grid(lrs: Sequence[float], weight_decays: Sequence[float]) -> tuple[Setting, ...]:
    """Every learning rate with every weight decay."""
    if not lrs or not weight_decays:
        raise ValueError(f"lrs={list(lrs)}, weight_decays={list(weight_decays)}: give at least one of each")
    return tuple(Setting(lr, weight_decay) for lr in lrs for weight_decay in weight_decays)


@dataclass(frozen=True)
class Schedule:
    """The share of its learning rate that a head trains with: warm-up from `start` to 1, then a cosine to `final`."""

    warmup_steps: int = 0
    start: float = 0.0
    """Share at step 0."""
    final: float = 0.0
    """Share after the last step."""
    warmup: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or min(self.start, self.final) < 0:
            raise ValueError(f"{self}: warmup_steps, start and final must not be negative")

    def at(self, step: int, steps: int) -> float:
        """The share at the update numbered `step` from 0, of `steps` in all."""
        if step < self.warmup_steps:
            progress = step / self.warmup_steps
            return self.start + (1 - self.start) * (progress if self.warmup == "linear" else _cosine(progress))
        progress = linear_ramp(step, self.warmup_steps, max(steps, self.warmup_steps + 1))
        return 1 + (self.final - 1) * _cosine(progress)

    def lr(self, peak: float, step: int, steps: int) -> float:
        """The learning rate at an update, of a head whose own is `peak`."""
        return peak * self.at(step, steps)


class LearningRates(Protocol):
    """A learning rate for every head and step: a Schedule, or what a recipe has in its place."""

    def lr(self, peak: float, step: int, steps: int) -> float: ...


def _cosine(progress: float) -> float:
    return (1 - math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class AdamW:
    """AdamW; all parameters decay, as in the published probes (evaluation.md 1.1)."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float | None = None
    """Largest gradient norm of one head; None: not clipped."""

    def __post_init__(self) -> None:
        _check_clipping(self.clip_grad)

    def build(self, head: nn.Module, setting: Setting) -> torch.optim.Optimizer:
        betas = (self.beta1, self.beta2)
        return torch.optim.AdamW(
            head.parameters(), lr=setting.lr, weight_decay=setting.weight_decay, betas=betas, eps=self.eps
        )


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum, as in DINOv3's linear probe (evaluation.md 1.6)."""

    momentum: float = 0.9
    clip_grad: float | None = None
    """Largest gradient norm of one head; None: not clipped."""

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} must lie in 0 <= momentum < 1")
        _check_clipping(self.clip_grad)

    def build(self, head: nn.Module, setting: Setting) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            head.parameters(), lr=setting.lr, weight_decay=setting.weight_decay, momentum=self.momentum
        )


Optim = AdamW | SGD
"""What the optimisers of a grid share; learning rate and weight decay are each head's own."""


def _check_clipping(clip_grad: float | None) -> None:
    if clip_grad is not None and clip_grad <= 0:
        raise ValueError(f"clip_grad={clip_grad} must be positive; None switches clipping off")


@dataclass(frozen=True)
class StateFile:
    """Where a fit keeps its state, to go on from it."""

    path: Path
    every: int = 500
    """Steps between two savings; it is saved at the end, too."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every}: must be at least 1")


# ----------------------------------------------------------------------------------------------------- which samples


@dataclass
class Draws:
    """Which of `count` samples each step's batch holds: one shuffle after another, a function of (seed, ordinal)."""

    count: int
    batch_size: int
    """Over all ranks."""
    seed: int = 0
    _orders: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.count < 1 or self.batch_size < 1:
            raise ValueError(f"count={self.count}, batch_size={self.batch_size}: both must be at least 1")

    def ordinals(self, step: int, world: World = ALONE) -> range:
        """This rank's places in the fit's global order."""
        if self.batch_size % world.size:
            raise ValueError(f"batch_size={self.batch_size} does not divide among {world.size} ranks")
        each = self.batch_size // world.size
        first = step * self.batch_size + world.rank * each
        return range(first, first + each)

    def sample(self, ordinal: int) -> int:
        """The number of the sample at a place in the global order."""
        turn, place = divmod(ordinal, self.count)
        if turn not in self._orders:
            if len(self._orders) > 2:  # a batch touches few turns; small sets must not fill the memory with orders
                self._orders.clear()
            self._orders[turn] = torch.randperm(self.count, generator=generator(self.seed, "order", turn))
        return int(self._orders[turn][place])


def generator(*identity: object) -> torch.Generator:
    """A generator on the CPU that is a function of what is given."""
    return torch.Generator().manual_seed(derived_seed(*identity))


def derived_seed(*identity: object) -> int:
    digest = hashlib.sha256("/".join(map(str, identity)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


# ------------------------------------------------------------------------------------------------------------- noise


@dataclass(frozen=True)
class Place:
    """Which rows of which step's batch a head sees: what noise is a function of."""

    seed: int
    step: int
    first: int
    total: int


class ChannelDropout(nn.Module):
    """Dropout2d of x [B, ..., D]: whole channels of a sample, drawn by (seed, step, row) where a grid says these.

    Two ranks drop what one process drops, and all heads of a grid the same.
    """

    place: Place | None = None

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout={p} must lie in 0 <= p < 1")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        shape = (x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])
        if self.place is None:
            kept = torch.rand(shape, device=x.device) >= self.p
        else:
            drawn = torch.rand(self.place.total, x.shape[-1], generator=generator("dropout", *_when(self.place)))
            rows = drawn[self.place.first : self.place.first + x.shape[0]]
            kept = (rows >= self.p).view(shape).to(x.device)
        return x * (kept / (1 - self.p)).to(x.dtype)


def _when(place: Place) -> tuple[int, int]:
    return place.seed, place.step


# ----------------------------------------------------------------------------------------------------------- the fit


class HeadGrid:
    """One head and one optimiser for each setting, at some step of their training."""

    def __init__(
        self,
        make_head: Callable[[], nn.Module],
        settings: Sequence[Setting],
        *,
        steps: int,
        schedule: LearningRates,
        optim: Optim,
        seed: int,
        world: World,
        about: str = "",
    ) -> None:
        if steps < 1 or not settings:
            raise ValueError(f"steps={steps}, {len(settings)} settings: there must be at least one of each")
        self.settings, self.steps, self.schedule, self.optim = tuple(settings), steps, schedule, optim
        self.seed, self.world, self.about, self.step = seed, world, about, 0
        self.heads = [self._first(make_head) for _ in self.settings]
        self.optimizers = [optim.build(*each) for each in zip(self.heads, self.settings, strict=True)]
        self.losses = torch.full((len(self.heads),), torch.nan)
        """Of this rank's last batch, one per head."""

    def _first(self, make_head: Callable[[], nn.Module]) -> nn.Module:
        """A head with the first weights of this seed, which are the same for every setting."""
        with torch.random.fork_rng(devices=self._devices()):
            torch.manual_seed(self.seed)
            return make_head().to(self.world.device).train()

    def train_step(self, features: Any, labels: Any, loss: Loss) -> None:
        """One update of every head by one batch; a head that diverges disturbs no other."""
        features, labels = (_on_device(value, self.world.device) for value in (features, labels))
        rows = _num_rows(features)
        place = Place(self.seed, self.step, rows * self.world.rank, rows * self.world.size)
        losses = []
        with torch.random.fork_rng(devices=self._devices()):
            for head in self.heads:
                torch.manual_seed(derived_seed(self.seed, self.step, self.world.rank))
                losses.append(self._backward(head, features, labels, loss, place))
        self._average_gradients()
        for head, optimizer, setting in zip(self.heads, self.optimizers, self.settings, strict=True):
            if self.optim.clip_grad is not None:
                nn.utils.clip_grad_norm_(head.parameters(), self.optim.clip_grad)
            optimizer.param_groups[0]["lr"] = self.schedule.lr(setting.lr, self.step, self.steps)
            optimizer.step()
        self.losses = torch.stack(losses)
        self.step += 1

    def _backward(self, head: nn.Module, features: Any, labels: Any, loss: Loss, place: Place) -> Tensor:
        """Gradients of one head, whose graph is gone before the next one's begins."""
        for part in head.modules():
            if isinstance(part, ChannelDropout):
                part.place = place
        head.train()
        head.zero_grad(set_to_none=True)
        with autocast(self.world.device):
            value = loss(head(features), labels, step=self.step)
        value.backward()
        return value.detach()

    def _average_gradients(self) -> None:
        """Of all heads in one collective; a parameter without gradient counts as zero, so that ranks agree."""
        if self.world.size == 1:
            return
        parameters = [each for head in self.heads for each in head.parameters() if each.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = self.world.sum(torch.cat([each.flatten() for each in gradients])) / self.world.size
        for gradient, mean in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def _devices(self) -> list[int]:
        """CUDA devices whose generators a step may touch."""
        device = self.world.device
        return [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []

    def state_dict(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "asked": self._asked(),
            "step": self.step,
            "heads": [head.state_dict() for head in self.heads],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same fit; one of another fit is a GridStateError that names what differs."""
        if state.get("format_version") != FORMAT_VERSION:
            raise GridStateError(f"format_version is {state.get('format_version')!r}, this code reads {FORMAT_VERSION}")
        stored, asked = state["asked"], self._asked()
        if differing := [name for name in asked if asked[name] != stored.get(name)]:
            raise GridStateError(
                "it belongs to another fit: "
                + "; ".join(f"{name} was {stored.get(name)}, now {asked[name]}" for name in differing)
            )
        for head, values in zip(self.heads, state["heads"], strict=True):
            head.load_state_dict(values)
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.step = state["step"]

    def _asked(self) -> dict[str, str]:
        """Everything here that decides the fit's numbers, the number of ranks apart."""
        shapes = {name: list(value.shape) for name, value in self.heads[0].state_dict().items()}
        return {
            "settings": "; ".join(map(str, self.settings)),
            "steps": str(self.steps),
            "schedule": str(self.schedule),
            "optimiser": str(self.optim),
            "seed": str(self.seed),
            "head": str(shapes),
            "data and features": self.about,
        }


def fit_grid(
    make_head: Callable[[], nn.Module],
    settings: Sequence[Setting],
    batches: Batches,
    loss: Loss,
    *,
    steps: int,
    schedule: LearningRates | None = None,
    optim: Optim | None = None,
    seed: int = 0,
    world: World = ALONE,
    state: StateFile | None = None,
    about: str = "",
    until: int | None = None,
    on_step: Callable[[HeadGrid], None] | None = None,
) -> HeadGrid:
    """Train a head for each setting with the same batches, from the same first weights, up to step `until` (the end).

    `make_head` is called with torch's generator at `seed`. With `state`, a fit goes on from the stored one, bit for bit
    as if it had not been stopped; `about` says which data and features it is of. On CUDA heads run under bf16 autocast,
    their weights stay fp32.

    Raises GridStateError for a state of another fit.
    """
    found = HeadGrid(
        make_head,
        settings,
        steps=steps,
        schedule=schedule or Schedule(),
        optim=optim or AdamW(),
        seed=seed,
        world=world,
        about=about,
    )
    if state is not None and world.on_main(state.path.is_file):
        read_state(found, state.path)
    end = steps if until is None else min(until, steps)
    while found.step < end:
        found.train_step(*batches(found.step), loss)
        if on_step is not None:
            on_step(found)
        if state is not None and (found.step % state.every == 0 or found.step == end):
            world.on_main(lambda: write_state(found, state.path))
    return found


def write_state(found: HeadGrid, path: Path) -> None:
    """Write the state beside its place and rename it: a reader finds the old or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(found.state_dict(), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_state(found: HeadGrid, path: Path) -> None:
    """Set a grid to a stored state. Raises GridStateError where it is damaged or of another fit."""
    try:
        state = torch.load(path, map_location=found.world.device, weights_only=True)
    except Exception as error:
        raise GridStateError(f"{path} is no readable state ({error}): delete it to fit anew") from error
    try:
        found.load_state_dict(state)
    except GridStateError as error:
        raise GridStateError(f"{path}: {error}. Delete it, or name another, to fit anew") from error


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on CUDA; elsewhere numbers stay as they are."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: _on_device(each, device) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_device(each, device) for each in value)
    return value


def _num_rows(features: Any) -> int:
    while not isinstance(features, Tensor):
        features = next(iter(features.values() if isinstance(features, Mapping) else features))
    return len(features)


# ------------------------------------------------------------------------------------------------------ which is best


class Meter(Protocol):
    """A metric that is accumulated over a set."""

    def update(self, outputs: Any, labels: Any, /) -> object: ...
    def reduce(self, world: World) -> object:
        """Add up what the ranks have seen."""
        ...


M = TypeVar("M", bound=Meter)


@torch.no_grad()
def score_heads(
    heads: Sequence[nn.Module],
    batches: Iterable[tuple[Any, Any]],
    make_meter: Callable[[], M],
    *,
    predict: Callable[[nn.Module, Any], Any] | None = None,
    world: World = ALONE,
) -> list[M]:
    """A meter for each head over this rank's batches of a set, added up over the ranks; features are read once.

    `predict` makes what the meter sees of a head and a batch's features; by default the head's own outputs.
    """
    meters = [make_meter() for _ in heads]
    for head in heads:
        head.eval()
    for features, labels in batches:
        features, labels = (_on_device(value, world.device) for value in (features, labels))
        for head, meter in zip(heads, meters, strict=True):
            with autocast(world.device):
                outputs = head(features) if predict is None else predict(head, features)
            meter.update(outputs, labels)
    for meter in meters:
        meter.reduce(world)
    return meters


@dataclass(frozen=True)
class Choice:
    """The head of a grid that is reported, and beside it the papers' number."""

    index: int
    """Of the head that is best on held-out training data."""
    value: float
    """Its value on the validation set."""
    max_index: int
    """Of the head that is best on the validation set itself."""
    max_over_heads: float
    """The value there: what the papers report, optimistic by the choice (evaluation.md 1.1)."""


def choose(held_out: Sequence[float], validation: Sequence[float], *, higher_is_better: bool = True) -> Choice:
    """The head that held-out training data prefer, and the maximum over heads on the validation set.

    Of equals the first; what is not finite is worse than everything.
    """
    if len(held_out) != len(validation) or not held_out:
        raise ValueError(f"{len(held_out)} held-out and {len(validation)} validation values: one of each per head")
    index, best = _best(held_out, higher_is_better), _best(validation, higher_is_better)
    return Choice(index, validation[index], best, validation[best])


def _best(values: Sequence[float], higher_is_better: bool) -> int:
    def worth(value: float) -> float:
        return -math.inf if not math.isfinite(value) else value if higher_is_better else -value

    return max(range(len(values)), key=lambda index: worth(values[index]))
