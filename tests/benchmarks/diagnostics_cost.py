"""What the diagnostics and the online probes cost, by measure and as a share of training time.

    python -m tests.benchmarks.diagnostics_cost [--device cpu] [--repeats 5]

Prints the median milliseconds of every measure for one modality and level, on 2048 rows as `train.levels` takes them,
at the widths of the debug recipe, of ViT-B and of ViT-L. Then all that a diagnostic step adds, over the default
diagnostics_every: for the debug recipe against its step, measured in turns with it; for ViT-L, on features of the
shapes of its recipe's micro-batch, against the step's operations at the rate of a product of its matrices measured here
(bf16 on CUDA). No step is as fast as that: the share of ViT-L is an upper bound. One rank, one thread; of several ranks
each takes a part.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from launch.config import load_config
from tests.benchmarks.gpu_step import micro_batches
from vjepa.batch import Batch, Modality
from vjepa.config import build_models
from vjepa.nn.rope import grid_positions
from vjepa.objectives.checks import freeze_unused
from vjepa.objectives.jepa import JEPA, Result
from vjepa.objectives.terms import Outputs
from vjepa.train import diagnostics, representation
from vjepa.train.config import TrainConfig
from vjepa.train.distributed import World
from vjepa.train.levels import MAX_ROWS, diagnose, level_diagnostics
from vjepa.train.memory_trace import objective_on_meta
from vjepa.train.optim import build_optimizer
from vjepa.train.probes import OnlineProbes, ProbeConfig

SHAPES = {"debug": (12, (2, 4, 4), 48), "ViT-B": (4, (8, 16, 16), 768), "ViT-L": (4, (8, 16, 16), 1024)}
LIDAR_CLIPS, LIDAR_VIEWS = 100, 10
CLASSES = 400
SMALL = 16  # the part of ViT-L's parameters whose distance is measured
EVERY = TrainConfig.diagnostics_every


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
        "information (all of the above)": lambda: representation.information(rows),
        "lidar": lambda: representation.lidar(views),
        "prediction_nmse": lambda: representation.prediction_nmse(predicted, tokens),
        "position_decodability": lambda: representation.position_decodability(tokens, positions),
    }


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median over repeats, after one that is not counted."""
    return statistics.median([once(call, device) for _ in range(repeats + 1)][1:])


def once(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds; of a process's own time on a CPU, which others do not disturb."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    begin = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (clock() - begin)


def debug_shares(device: torch.device, repeats: int) -> tuple[float, float]:
    """What diagnostics and probes of the debug recipe take, as shares of its step; measured in turns with it."""
    config = load_config("debug", "primary", ["run_dir=unused"])
    objective = JEPA(config.objective, *build_models(config.model, config.predictor, seed=0, device=device))
    freeze_unused(objective, list(config.train.batch.as_dict()))
    optimizer = build_optimizer(objective, config.train.optim)
    batches = micro_batches(config, device, repeats + 1)
    world = World(0, 1, device)
    probes = OnlineProbes(ProbeConfig("kind", CLASSES), objective.encoder.embed_dim, world)
    found: list[Result] = []

    def step() -> None:
        found[:] = [objective(batches[len(taken)], len(taken))]
        found[0].loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        objective.update_target(len(taken), config.train.steps)

    taken: list[tuple[float, float, float]] = []
    for _ in range(repeats + 1):
        parts = (
            step,
            lambda: diagnose(objective, found[0].outputs, world),
            lambda: probes.observe(found[0].outputs["video"], labelled(batches[0]["video"])),
        )
        first, second, third = (once(part, device) for part in parts)
        taken.append((first, second, third))
    whole, look, probe = (statistics.median(values) for values in zip(*taken[1:], strict=True))
    return look / whole, probe / whole


def large_shares(device: torch.device, repeats: int) -> tuple[float, float, int]:
    """The same of ViT-L's recipe, one micro-batch of one rank, and the recipe's own diagnostics_every."""
    config = load_config("vit_large", "primary", ["run_dir=unused"])
    encoder = config.model.encoder_config()
    objective = objective_on_meta(encoder, config.predictor.predictor_config(encoder), config.objective)
    [batches] = micro_batches(config, device, 1)
    world = World(0, 1, device)
    probes = OnlineProbes(ProbeConfig("kind", CLASSES), encoder.embed_dim, world)
    look = 0.0
    for batch in batches.values():  # a level at a time, to spare memory
        outputs: dict[Modality, Outputs] = {batch.modality: features(batch, encoder.embed_dim)}
        look += len(encoder.levels) * milliseconds(partial(level_diagnostics, outputs, (0,), world), device, repeats)
    parameters = [torch.randn(sum(p.numel() for p in objective.encoder.parameters()) // SMALL, device=device)] * 2
    look += SMALL * milliseconds(lambda: representation.parameter_distance(parameters[:1], parameters[1:]), device, 1)
    video = batches["video"]
    probe = milliseconds(partial(probes.observe, features(video, encoder.embed_dim), labelled(video)), device, repeats)
    step = 1e3 * objective.flops(batches) / operations_per_second(encoder.embed_dim, device, repeats)
    return look / step, probe / step, config.train.diagnostics_every


def features(batch: Batch, dim: int) -> Outputs:
    """Random features of one level, of a batch's shapes."""
    device, tokens = batch.clips.device, math.prod(batch.grid)
    target = torch.randn(len(batch), tokens, dim, device=device)
    context, predicted = (target[:, : indices.shape[1]] for indices in (batch.masks[0].context, batch.masks[0].masked))
    return Outputs(batch.modality, batch.grid, 1, batch.masks, [context], [predicted], [None], target)


def labelled(batch: Batch) -> Batch:
    return replace(batch, extra={"kind": [index % CLASSES for index in range(len(batch))]})


def operations_per_second(dim: int, device: torch.device, repeats: int) -> float:
    """Of the product of an MLP's matrices on 4096 tokens."""
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens, weight = (torch.randn(*shape, device=device, dtype=kind) for shape in ((4096, dim), (dim, 4 * dim)))
    seconds = milliseconds(lambda: tokens @ weight, device, 4 * repeats) / 1e3
    return 2 * 4096 * dim * 4 * dim / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    calls = {name: measures(*shape, device) for name, shape in SHAPES.items()}
    print(f"{'ms for one modality and level':32}" + "".join(f"{name:>10}" for name in SHAPES))
    for measure in next(iter(calls.values())):
        found = [milliseconds(calls[name][measure], device, options.repeats) for name in SHAPES]
        print(f"{measure:32}" + "".join(f"{value:10.2f}" for value in found))
    look, probe = debug_shares(device, 4 * options.repeats)
    print(
        f"debug recipe: a diagnostic step adds {look:.0%} of a step, {look / EVERY:.2%} of the time with "
        f"diagnostics_every={EVERY}; online probes {probe:.1%} of every step"
    )
    look, probe, every = large_shares(device, options.repeats)
    print(
        f"ViT-L: a diagnostic step adds at most {look:.0%} of a step, {look / EVERY:.2%} of the time with "
        f"diagnostics_every={EVERY} and {look / every:.2%} with its recipe's {every}; online probes {probe:.2%}"
    )


if __name__ == "__main__":
    main()
