"""What the measures of the representation cost, at the widths of the debug recipe and of ViT-B.

    python -m tests.benchmarks.diagnostics_cost [--device cpu] [--repeats 5]

Prints the median milliseconds of every measure for one modality and level, on 2048 rows as `train.levels` takes them,
their sum, and its share of a step: of the debug step measured here, spread over its diagnostics_every; a ViT-B step of
the recipe's size is not measured, so there only the milliseconds are given.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from launch.config import load_config
from tests.benchmarks import gpu_step
from vjepa.nn.rope import grid_positions
from vjepa.train import diagnostics, representation
from vjepa.train.distributed import World
from vjepa.train.levels import MAX_ROWS

SHAPES = {"debug": (12, (2, 4, 4), 48), "ViT-B": (8, (8, 16, 16), 768)}  # clips, grid, width
LIDAR_CLIPS, LIDAR_VIEWS = 100, 10


def measures(clips: int, grid: tuple[int, int, int], dim: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Calls of all measures, on random features of one modality and level."""
    positions = grid_positions(grid, interpolate=False, device=device)
    tokens = torch.randn(clips, len(positions), dim, device=device)
    predicted, other = tokens + torch.randn_like(tokens), tokens.roll(1, 0)
    rows = tokens.flatten(0, 1)[:MAX_ROWS]
    views = torch.randn(LIDAR_CLIPS, LIDAR_VIEWS, dim, device=device)
    return {
        "feature_std": lambda: diagnostics.feature_std(rows),
        "mean_cosine": lambda: diagnostics.mean_cosine(rows),
        "rankme": lambda: diagnostics.rankme(rows),
        "target_prediction_cosine": lambda: diagnostics.target_prediction_cosine(predicted, tokens),
        "cross_sample_gap": lambda: diagnostics.cross_sample_gap(predicted, tokens, other),
        "spectral_measures": lambda: representation.spectral_measures(rows),
        "dead_share": lambda: representation.dead_share(rows),
        "lidar": lambda: representation.lidar(views),
        "prediction_nmse": lambda: representation.prediction_nmse(predicted, tokens),
        "position_decodability": lambda: representation.position_decodability(tokens, positions),
    }


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median over repeats, after one that is not counted."""
    taken: list[float] = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(taken[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = torch.device(options.device)
    calls = {name: measures(*shape, device) for name, shape in SHAPES.items()}
    totals = dict.fromkeys(SHAPES, 0.0)
    print(f"{'ms for one modality and level':32}" + "".join(f"{name:>10}" for name in SHAPES))
    for measure in next(iter(calls.values())):
        found = {name: milliseconds(calls[name][measure], device, options.repeats) for name in SHAPES}
        totals = {name: totals[name] + found[name] for name in SHAPES}
        print(f"{measure:32}" + "".join(f"{value:10.2f}" for value in found.values()))
    print(f"{'sum':32}" + "".join(f"{value:10.2f}" for value in totals.values()))
    config = load_config("debug", "primary", ["run_dir=unused", f"train.device={options.device}"])
    step = 1e3 * gpu_step.measure(config, World(0, 1, device), nullcontext(), options.repeats)["seconds"]
    print(
        f"debug step {step:.1f} ms: the sum is {totals['debug'] / step:.1%} of one step, "
        f"{totals['debug'] / step / config.train.diagnostics_every:.2%} of the time with diagnostics_every="
        f"{config.train.diagnostics_every}"
    )


if __name__ == "__main__":
    main()
