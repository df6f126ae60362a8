"""Who reads what: pure functions from (seed, ordinal) to a record and from a step to its ordinals.

Nothing here remembers anything, so an order does not depend on the world size, on workers, or on where a run was
interrupted. A permutation is a small block cipher over the indices (Feistel network with cycle walking): O(1) time and
no memory, whatever the number of samples.
"""

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

Order = Literal["shuffle", "replacement"]
BLOCK = 1000
"""Ordinals per mixture block; every block holds each source's exact share, rounded to 1/1000."""
_ROUNDS = 8
_MASK = (1 << 64) - 1


def hash64(*parts: object) -> int:
    """A 64-bit number that depends only on `parts` (stable over processes, machines and Python versions)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(value: int) -> int:
    """Scramble 64 bits (the finaliser of splitmix64)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def permute(position: int, size: int, key: int) -> int:
    """Where `position` lands in the permutation of `range(size)` that `key` names."""
    if not 0 <= position < size:
        raise ValueError(f"position={position}: must be in [0, {size})")
    half = max(3, ((size - 1).bit_length() + 1) // 2)  # at least 64 values: few rounds on fewer bits shuffle poorly
    low = (1 << half) - 1
    value = position
    while True:
        left, right = value >> half, value & low
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_mix((right + (turn << 58) + key) & _MASK) & low)
        value = (left << half) | right
        if value < size:  # outside: walk the cycle until it comes back in
            return value


@dataclass(frozen=True)
class Source:
    """A source as the plan sees it."""

    name: str
    size: int
    weight: float = 1.0


@dataclass(frozen=True)
class Place:
    """Where an ordinal's record lies: the `index`-th of `source`, on that source's pass number `epoch`.

    With replacement there are no passes: `epoch` is the plan's.
    """

    epoch: int
    source: int
    index: int


def quotas(sources: Sequence[Source], block: int = BLOCK) -> list[int]:
    """Samples of each source in every block, by largest remainder; they sum to `block`.

    Raises ValueError for a share so small that the source would never be read.
    """
    total = sum(source.weight for source in sources)
    exact = [source.weight / total * block for source in sources]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(sources)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: block - sum(counts)]:
        counts[i] += 1
    for source, count in zip(sources, counts, strict=True):
        if count == 0:
            raise ValueError(
                f"source {source.name!r}: weight {source.weight} of {total} is less than 1 sample in {block}, "
                "so it would never be read; raise its weight or remove it"
            )
    return counts


class Plan:
    """The global order of one modality: `locate(ordinal)` for any ordinal >= 0, without end.

    `shuffle`: each source in passes, every record once in each; exact shares in every block of ordinals.
    `replacement`: every ordinal draws its source by weight and a record of it uniformly, as the V-JEPA reference does
    (weight / size for each record, drawn with replacement). In a draw of as many samples as there are records, a share
    of 1/e = 36.8 % of them comes never and 26.4 % more than once.
    """

    def __init__(self, seed: int, sources: Sequence[Source], order: Order = "shuffle"):
        if seed < 0:
            raise ValueError(f"seed={seed}: must not be negative")
        if not sources:
            raise ValueError("sources: a plan needs at least one")
        for source in sources:
            if source.size < 1:
                raise ValueError(f"source {source.name!r}: it holds no samples; remove it or ingest something")
        self.seed = seed
        self.sources = tuple(sources)
        self.total = sum(source.size for source in sources)
        self.order = order
        self._quotas = quotas(sources) if len(sources) > 1 and order == "shuffle" else []
        self._bounds = list(accumulate(source.weight for source in sources))

    def locate(self, ordinal: int) -> Place:
        """The record at this place of the global order."""
        if ordinal < 0:
            raise ValueError(f"ordinal={ordinal}: must not be negative")
        if self.order == "replacement":
            return self._draw(ordinal)
        source, position = self._position(ordinal)
        name, size = self.sources[source].name, self.sources[source].size
        epoch, within = divmod(position, size)
        return Place(epoch, source, permute(within, size, hash64(self.seed, name, epoch)))

    def substitute(self, ordinal: int, attempt: int) -> Place:
        """The record tried instead when the one at `ordinal` is bad: same source, any index; attempt >= 1."""
        place = self.locate(ordinal)
        source = self.sources[place.source]
        index = hash64(self.seed, source.name, "substitute", ordinal, attempt) % source.size
        return Place(place.epoch, place.source, index)

    def epoch_of(self, ordinal: int) -> int:
        """How many times as many samples as there are records come before this ordinal."""
        return ordinal // self.total

    def counts(self, ordinals: Iterable[int]) -> dict[str, int]:
        """How many of these ordinals each source supplies: the realised shares of a batch, a window or a run.

        Substitutes change nothing, they are of the same source. About 15 microseconds an ordinal.
        """
        found = Counter(self.locate(ordinal).source for ordinal in ordinals)
        return {source.name: found[i] for i, source in enumerate(self.sources)}

    def _draw(self, ordinal: int) -> Place:
        """A source by weight and one of its records, both drawn for this ordinal alone."""
        share = hash64(self.seed, "replacement", ordinal) / 2**64 * self._bounds[-1]
        chosen = bisect_right(self._bounds, share, hi=len(self._bounds) - 1)
        source = self.sources[chosen]
        index = hash64(self.seed, source.name, "replacement", ordinal) % source.size
        return Place(self.epoch_of(ordinal), chosen, index)

    def _position(self, ordinal: int) -> tuple[int, int]:
        """Source and how many samples of it come before, up to the order inside a block."""
        if len(self.sources) == 1:
            return 0, ordinal
        block, slot = divmod(ordinal, BLOCK)
        slot = permute(slot, BLOCK, hash64(self.seed, "block", block))
        for source, quota in enumerate(self._quotas):
            if slot < quota:
                return source, block * quota + slot
            slot -= quota
        raise AssertionError(f"quotas {self._quotas} do not sum to {BLOCK}")


def check_batch(global_batch: int, world: int, accumulate: int) -> int:
    """Samples in one micro-batch of one rank; ValueError unless the global batch divides evenly."""
    for name, value in (("global batch", global_batch), ("world", world), ("accumulate", accumulate)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    if global_batch % (world * accumulate):
        raise ValueError(
            f"global batch {global_batch} does not divide into {world} ranks x {accumulate} micro-batches "
            f"(= {world * accumulate}); choose a multiple of {world * accumulate}"
        )
    return global_batch // (world * accumulate)


def micro_batches(step: int, *, global_batch: int, world: int, rank: int, accumulate: int = 1) -> list[range]:
    """The ordinals of one rank's share of one step, cut into `accumulate` contiguous micro-batches."""
    size = check_batch(global_batch, world, accumulate)
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank}: must be in [0, {world})")
    if step < 0:
        raise ValueError(f"step={step}: must not be negative")
    first = step * global_batch + rank * size * accumulate
    return [range(first + i * size, first + (i + 1) * size) for i in range(accumulate)]
