"""Which samples a step's batch holds, and seeds, as functions of what they are for."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vjepa.train.distributed import ALONE, World


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
            raise ValueError(
                f"batch_size={self.batch_size} does not divide among {world.size} ranks: set a multiple of "
                f"{world.size}, or start another number of ranks"
            )
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
