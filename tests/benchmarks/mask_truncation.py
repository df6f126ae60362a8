"""Context and masked tokens per time step under both cuts to a common length.

    python -m tests.benchmarks.mask_truncation [--group 24] [--steps 200]

Prints one line per mask and cut: mean tokens of the context, of the masked set, and the context's tokens at the first
and the last time step. At 256 px and 16 frames (grid 8 x 16 x 16).
"""

from __future__ import annotations

import argparse

import numpy as np

from vjepa.masking.blocks import group_masks
from vjepa.masking.collate import MaskConfig

GRID = (8, 16, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--group", type=int, default=24, help="clips cut to the same counts")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    per_step = GRID[1] * GRID[2]
    for name, config in MaskConfig().of("video").items():
        for how in ("prefix", "random"):
            contexts, maskeds, times = [], [], np.zeros(GRID[0])
            for step in range(arguments.steps):
                group = range(step * arguments.group, (step + 1) * arguments.group)
                context, masked = group_masks(
                    config, GRID, seed=0, step=step, name=name, group=group, wanted=group, how=how
                )
                contexts.append(context.shape[1])
                maskeds.append(masked.shape[1])
                times += np.bincount((context // per_step).ravel(), minlength=GRID[0]) / len(group)
            first, last = times[[0, -1]] / arguments.steps
            print(
                f"{name:5} {how:6}  context {np.mean(contexts):6.0f}  masked {np.mean(maskeds):6.0f}  "
                f"context at first / last time step {first:5.1f} / {last:5.1f}"
            )


if __name__ == "__main__":
    main()
