"""What a primary step costs on one GPU: clips a second, MFU and peak memory by attention, compile and activations.

    python -m tests.benchmarks.gpu_step [--models vit_large vit_gigantic] [--steps 10] [--out results.jsonl]
                                        [--attention sdpa sdpa:cudnn ...] [--activations ...] [--compile no yes]
                                        [--kernels 20]

The step is the recipe's own: its masks, both modalities at the mask group's sizes (24 videos, 36 images), bf16, AdamW
and EMA, on random pixels that are already on the device. Every combination is measured after warm-up steps over several
masks, because context lengths change from step to step. One that does not fit says so. On a CPU:

    python -m tests.benchmarks.gpu_step --models debug --attention sdpa --steps 2 --device cpu
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile

from launch.config import RunConfig, load_config
from vjepa.batch import Batch, MicroBatch, Modality
from vjepa.config import build_models
from vjepa.masking.collate import MaskCollator
from vjepa.objectives.checks import freeze_unused
from vjepa.objectives.jepa import JEPA
from vjepa.train.accounts import Accounts
from vjepa.train.distributed import World
from vjepa.train.optim import build_optimizer, set_schedule
from vjepa.train.parallel import ParallelConfig, parallelise

WARM_UP = 4
KERNELS = {
    "sdpa:flash": SDPBackend.FLASH_ATTENTION,
    "sdpa:cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa:efficient": SDPBackend.EFFICIENT_ATTENTION,
}
ATTENTION = ("sdpa", *KERNELS, "xformers", "varlen")


def micro_batches(config: RunConfig, device: torch.device, count: int) -> list[MicroBatch]:
    """Random clips of one mask group per modality, with the masks of `count` different steps."""
    sizes: dict[Modality, int] = {
        m: min(config.mask.group.of(m), size) for m, size in config.train.batch.as_dict().items()
    }
    collate = MaskCollator(
        config.mask,
        seed=0,
        batch=sizes,
        patch_size=config.model.patch_size,
        tubelet_size=config.model.tubelet_size,
    )
    clips: dict[Modality, Tensor] = {}
    made: list[MicroBatch] = []
    for step in range(count):
        batches: dict[Modality, Batch] = {}
        for modality, size in sizes.items():
            clip = config.data.video.clip if modality == "video" else config.data.image.clip
            frames = clip.frames if modality == "video" else 1
            if modality not in clips:
                shape = (size, 3, frames, clip.size, clip.size)
                clips[modality] = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
            side = clip.size // config.model.patch_size
            grid = (max(1, frames // config.model.tubelet_size), side, side)
            ordinals = tuple(range(step * size, (step + 1) * size))
            masks = collate.masks(modality, step, ordinals, grid)
            keys = tuple(map(str, ordinals))
            batches[modality] = Batch(modality, step, ordinals, keys, (clips[modality],), masks, grid).to(device)
        made.append(batches)
    return made


def measure(
    config: RunConfig, world: World, kernel: AbstractContextManager[Any], steps: int, kernels: int = 0
) -> dict[str, float]:
    """Medians over steps of one combination; after them the `kernels` longest kernels of one more step are printed."""
    is_cuda = world.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(world.device)
    encoder, predictor = build_models(config.model, config.predictor, seed=0, device=world.device)
    objective = JEPA(config.objective, encoder, predictor)
    freeze_unused(objective, list(config.train.batch.as_dict()))
    module = parallelise(objective, config.train.parallel, world, precision="bf16")
    optimizer = build_optimizer(objective, config.train.optim)
    batches = micro_batches(config, world.device, WARM_UP)
    seconds: list[float] = []

    def take(step: int) -> None:
        set_schedule(optimizer, config.train.optim, step, config.train.steps)
        with torch.autocast(world.device.type, dtype=torch.bfloat16):
            result = module(batches[step % WARM_UP], step)
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        objective.update_target(step, config.train.steps)
        if is_cuda:
            torch.cuda.synchronize(world.device)

    with kernel:
        for step in range(WARM_UP + steps):
            begin = time.perf_counter()
            take(step)
            if step >= WARM_UP:
                seconds.append(time.perf_counter() - begin)
        if kernels:
            _print_kernels(lambda: take(WARM_UP + steps), kernels)
    taken = statistics.median(seconds)
    flops = statistics.fmean(objective.flops(batch) for batch in batches)
    clips = sum(len(batch) for batch in batches[0].values())
    return {"seconds": taken, **Accounts(world.device).of(taken, clips=clips, tokens=0, flops=flops)}


def _print_kernels(step: Callable[[], None], rows: int) -> None:
    """What the device, or a CPU, does in one step: milliseconds and calls by kernel, longest first."""
    with profile() as profiler:
        step()
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    events = profiler.events() or []
    is_cuda = any(event.device_type.name == "CUDA" for event in events)
    for event in events:
        if not is_cuda or event.device_type.name == "CUDA":
            spent[event.name][0] += (event.self_device_time_total if is_cuda else event.self_cpu_time_total) / 1e3
            spent[event.name][1] += 1
    total = sum(milliseconds for milliseconds, _ in spent.values())
    print(f"one step: {total:.1f} ms in {sum(calls for _, calls in spent.values())} kernels")
    for name, (milliseconds, calls) in sorted(spent.items(), key=lambda item: -item[1][0])[:rows]:
        print(f"{milliseconds:8.2f} ms {milliseconds / total:6.1%} {calls:6d} x  {name[:110]}")


def combinations(options: argparse.Namespace) -> Iterator[tuple[str, str, str, bool]]:
    for model, attention, activations, is_compiled in itertools.product(
        options.models, options.attention, options.activations, options.compile
    ):
        yield model, attention, activations, is_compiled == "yes"


def run(model: str, attention: str, activations: Any, is_compiled: bool, options: argparse.Namespace) -> dict[str, Any]:
    """A row: the combination, and its figures or why there are none."""
    row: dict[str, Any] = {"model": model, "attention": attention, "activations": activations, "compile": is_compiled}
    config = load_config(model, "primary", ["run_dir=unused"])
    backend: Any = attention.partition(":")[0]
    parallel = ParallelConfig(activations=activations, compile=is_compiled)
    config = replace(
        config,
        model=replace(config.model, attention=backend),
        train=replace(config.train, parallel=parallel, device=options.device),
    )
    kernel = sdpa_kernel(KERNELS[attention]) if attention in KERNELS else nullcontext()
    world = World(0, 1, torch.device(options.device))
    try:
        return row | measure(config, world, kernel, options.steps, options.kernels)
    except (RuntimeError, ImportError, ValueError) as error:  # out of memory, no such kernel: said in its row
        return row | {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    finally:
        torch._dynamo.reset()
        gc.collect()
        if options.device.startswith("cuda"):
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit_large", "vit_gigantic"], help="recipes")
    parser.add_argument("--attention", nargs="+", choices=ATTENTION, default=list(ATTENTION))
    parser.add_argument("--activations", nargs="+", default=["keep", "selective", "recompute"])
    parser.add_argument("--compile", nargs="+", choices=("no", "yes"), default=["no", "yes"])
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each")
    parser.add_argument("--kernels", type=int, default=0, help="also print so many of the longest kernels of a step")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="file that gets a JSON line for each combination as it is done")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("error: torch sees no CUDA device: run this on a GPU, or --device cpu with a small recipe")
    print("| model | attention | activations | compile | s/step | clips/s | TFLOP/s | MFU | GiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for combination in combinations(options):
        row = run(*combination, options)
        cells = [row["model"], row["attention"], row["activations"], "yes" if row["compile"] else "no"]
        if "failed" in row:
            cells += [row["failed"]]
        else:
            names = ("seconds", "clips_per_second", "tflops_per_second", "mfu", "memory_peak_gib")
            cells += [f"{row[name]:.3g}" if name in row else "" for name in names]
        print(f"| {' | '.join(cells)} |", flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
