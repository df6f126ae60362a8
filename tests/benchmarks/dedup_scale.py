"""Time, memory and recall of the search for near pairs: `python -m tests.benchmarks.dedup_scale [--records N]`.

Random hashes of videos (8 words of 64 bits); one in a hundred has a copy in which a tenth of the bits differ.
"""

import argparse
import resource
import time

import numpy as np

from data_pipeline.prepare.near import near_pairs
from data_pipeline.prepare.phash import HASH_BITS, distance

LIMIT, ALTERED = 0.15, 0.1


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.dedup_scale", description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    records = parser.parse_args().records
    generator = np.random.default_rng(0)
    copies = records // 100
    hashes = generator.integers(0, 2**64, (records, 8), np.uint64)
    flips = generator.random((copies, 512)) < ALTERED
    hashes[-copies:] = hashes[:copies] ^ np.packbits(flips, axis=1).view(np.uint64)
    del flips
    telling = np.full(records, 255, np.uint8)
    judged = 0

    def judge(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        nonlocal judged
        judged += len(left)
        return distance(hashes, telling, left, right)

    before, began = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
    pairs, _ = near_pairs(hashes, HASH_BITS["video"], bit_error=LIMIT, judge=judge, limit=LIMIT)
    spent = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    right = int(np.sum(pairs[:, 1] - pairs[:, 0] == records - copies))
    print(
        f"{records} records: {spent:.0f} s of CPU, peak memory {peak / 1e3:.0f} MB (before the search "
        f"{before.ru_maxrss / 1e3:.0f}), {judged} pairs compared, {right} of {copies} copies found, "
        f"{len(pairs) - right} wrong"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
