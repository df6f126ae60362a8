"""Near pairs among millions of signatures, without comparing all with all.

Locality-sensitive hashing by sampled bits (Indyk and Motwani 1998): two signatures that differ in a share p of their
bits agree on k sampled bits with probability (1 - p)^k. So many tables of k bits are made that a pair at the limit
meets in one of them with probability `RECALL`; only pairs that meet are compared. The tables are made one after the
other, so their number costs no memory.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np

RECALL = 0.99
"""Probability that a pair exactly at the limit is found; nearer ones are found more surely."""
_NEIGHBOURS = 64  # records after it in a bucket that each record is compared with: a crowd costs this, not its square
_CHUNK = 500_000  # pairs compared at a time
_MAX_TABLES = 1000

Judge = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Two arrays of record numbers, `[pairs]`, to their distances, `[pairs]`."""


Pairs = tuple[np.ndarray, np.ndarray]
"""Near records, int64 `[pairs, 2]`, and their distances, `[pairs]`."""


def near_pairs(signatures: np.ndarray, positions: np.ndarray, *, bit_error: float, judge: Judge, limit: float) -> Pairs:
    """The pairs of records no further apart than `limit`, each once.

    Args:
        signatures: uint64 `[records, words]`.
        positions: the bits that may be sampled, as indices into `words * 64`.
        bit_error: share of the bits in which a pair at the limit differs; decides the number of tables.
        judge: the distance that counts.
        limit: the largest distance of a pair.
    """
    count = len(signatures)
    found: dict[int, float] = {}
    for bits in _tables(count, positions, bit_error):
        for left, right in _meeting(signatures, bits):
            apart = judge(left, right)
            near = apart <= limit
            low, high = np.minimum(left[near], right[near]), np.maximum(left[near], right[near])
            found.update(zip((low * count + high).tolist(), apart[near].tolist(), strict=True))
    codes = np.array(sorted(found), np.int64)
    return np.stack([codes // max(1, count), codes % max(1, count)], axis=1), np.array([found[code] for code in codes])


def _tables(count: int, positions: np.ndarray, bit_error: float) -> Iterator[np.ndarray]:
    """The sampled bits of each table; the same every time."""
    size = min(len(positions), max(8, math.ceil(math.log2(max(2, count))) + 2))  # few strangers meet
    meet = (1 - bit_error) ** size
    tables = 1 if meet >= RECALL else math.ceil(math.log(1 - RECALL) / math.log(1 - meet))
    if tables > _MAX_TABLES:
        raise ValueError(
            f"pairs that differ in {bit_error:.0%} of their bits need {tables} tables among {count} records, more than "
            f"{_MAX_TABLES}: ask for nearer ones"
        )
    generator = np.random.default_rng(0)
    for _ in range(tables):
        yield generator.choice(positions, size, replace=False)


def _meeting(signatures: np.ndarray, bits: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of records that agree on these bits, in chunks of at most `_CHUNK`."""
    keys = np.zeros(len(signatures), np.uint64)
    for place, bit in enumerate(bits.tolist()):
        word, shift = np.uint64(place), np.uint64(bit % 64)
        keys |= ((signatures[:, bit // 64] >> shift) & np.uint64(1)) << word
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    for ahead in range(1, _NEIGHBOURS + 1):
        same = np.flatnonzero(keys[ahead:] == keys[:-ahead])
        if len(same) == 0:
            return
        for start in range(0, len(same), _CHUNK):
            at = same[start : start + _CHUNK]
            yield order[at], order[at + ahead]


def keep_one_of_each(pairs: np.ndarray, distances: np.ndarray, rank: Callable[[int], tuple]) -> list["Group"]:
    """Groups of near pairs; in each the best is kept, and whatever is near to a kept one is dropped.

    So a chain (a near b, b near c, but a not near c) keeps a and c where b is dropped for a. `rank` gives the smallest
    value to the best record.
    """
    near: dict[int, dict[int, float]] = defaultdict(dict)
    for (left, right), apart in zip(pairs.tolist(), distances.tolist(), strict=True):
        near[left][right] = near[right][left] = apart
    groups, gone = [], set()
    for best in sorted(near, key=rank):
        if best in gone:
            continue
        dropped = {other: apart for other, apart in near[best].items() if other not in gone}
        gone |= dropped.keys() | {best}
        if dropped:
            groups.append((best, dropped))
    return groups


Group = tuple[int, dict[int, float]]
"""The record that is kept, and those dropped for it with their distances."""
