"""Heads that learn side by side: an update of all of them by one batch, and the fit out of such updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from evals.grid.draws import derived_seed
from evals.grid.noise import ChannelDropout, Place
from evals.grid.settings import AdamW, LearningRates, Optim, Schedule, Setting
from evals.grid.state import FORMAT_VERSION, GridStateError, StateFile, read_state, write_state
from evals.pace import Pace
from vjepa.train.distributed import ALONE, World

Batches = Callable[[int], tuple[Any, Any]]
"""Step -> features and labels of this rank's part of its batch: as many rows on every rank, in the order of ranks."""


class Loss(Protocol):
    """Outputs of a head and labels -> a scalar; over several ranks by the convention of vjepa's collectives.py."""

    def __call__(self, outputs: Any, labels: Any, *, step: int) -> Tensor: ...


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
        self.notes: dict[str, list[float]] = {}
        """What a caller wants kept with the state: numbers of its own, such as those of earlier validations."""

    def _first(self, make_head: Callable[[], nn.Module]) -> nn.Module:
        """A head with the first weights of this seed, which are the same for every setting."""
        with torch.random.fork_rng(devices=self._devices()):
            torch.manual_seed(self.seed)
            return make_head().to(self.world.device).train()

    def train_step(self, features: Any, labels: Any, loss: Loss) -> None:
        """One update of every head by one batch; a head that diverges disturbs no other."""
        features, labels = (on_device(value, self.world.device) for value in (features, labels))
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

    def describe_losses(self) -> str:
        """The smallest loss of this rank's last batch, and how many heads have none any more."""
        losses = self.losses.tolist()
        finite = [loss for loss in losses if math.isfinite(loss)]
        diverged = f", {len(losses) - len(finite)} of {len(losses)} heads diverged" if len(finite) < len(losses) else ""
        return f"least loss {min(finite, default=math.nan):.4g}{diverged}"

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
            "notes": self.notes,
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
        self.step, self.notes = state["step"], dict(state.get("notes", {}))

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
    as if it had not been stopped; `about` says which data and features it is of. Numbers are fp32, but for what a head
    does in bf16 itself: attention on CUDA.

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
    end, pace = steps if until is None else min(until, steps), Pace("step", steps, done=found.step)
    while found.step < end:
        found.train_step(*batches(found.step), loss)
        pace.at(found.step, found.describe_losses)
        if on_step is not None:
            on_step(found)
        if state is not None and (found.step % state.every == 0 or found.step == end):
            world.on_main(lambda: write_state(found, state.path))
    return found


def on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: on_device(each, device) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_device(each, device) for each in value)
    return value


def _num_rows(features: Any) -> int:
    while not isinstance(features, Tensor):
        features = next(iter(features.values() if isinstance(features, Mapping) else features))
    return len(features)
