"""What a latent does to a predictor, by its kind and its price, on clips where the truth is known.

python -m tests.benchmarks.latent_bypass [--seeds 3] [--steps 200]

The first time step of a clip is visible, the second is to be predicted. A clip has three colours, which the first step
tells, and an event that it does not: the right half of the second step is inverted or not, one bit or 0.69 nats. The
target encoder stays as it was drawn.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vjepa.batch import Batch, Mask
from vjepa.config import ModelConfig, PredictorSettings
from vjepa.nn.latent import LatentConfig
from vjepa.objectives import JEPA, ObjectiveConfig, build_objective
from vjepa.objectives.checks import freeze_unused
from vjepa.train.latents import latent_diagnostics

BATCH, SIDE, PATCH = 16, 4, 8  # clips, patches of a side, pixels of a patch
TOKENS = SIDE * SIDE  # of a time step
RATE = 3e-3
CASES: dict[str, tuple[dict[str, Any], float | None]] = {  # latent, weight of its information
    "no latent": ({}, None),
    "gaussian per token": ({"kind": "gaussian", "per": "token"}, None),
    "gaussian per token, 0.003 a nat": ({"kind": "gaussian", "per": "token"}, 0.003),
    "gaussian per token, 0.01 a nat": ({"kind": "gaussian", "per": "token"}, 0.01),
    "gaussian per clip": ({"kind": "gaussian", "dim": 4}, None),
    "gaussian per clip, 0.03 a nat": ({"kind": "gaussian", "dim": 4}, 0.03),
    "discrete per clip, 1 x 2 codes": ({"kind": "discrete", "groups": 1, "codes": 2}, None),
    "discrete per clip, 4 x 16 codes": ({"kind": "discrete"}, None),
}


def clips(step: int, seed: int) -> Tensor:
    """The clips of a step, [BATCH, 3, 4, 32, 32] uint8: a function of (seed, step)."""
    generator = torch.Generator().manual_seed(seed * 100_003 + step)
    basis = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(7))  # the same of every clip
    first = torch.rand(BATCH, 3, 1, 1, generator=generator) * basis
    is_event = torch.randint(2, (BATCH, 1, 1, 1), generator=generator).bool()
    second = first.clone()
    second[..., SIDE // 2 :] = torch.where(is_event, 1 - first, first)[..., SIDE // 2 :]
    frames = torch.stack((first, first, second, second), dim=2)  # [B, 3, 4, SIDE, SIDE]
    pixels = frames.repeat_interleave(PATCH, dim=3).repeat_interleave(PATCH, dim=4)
    noisy = pixels + 0.03 * torch.randn(pixels.shape, generator=generator)
    return (noisy.clamp(0, 1) * 255).to(torch.uint8)


def batch(step: int, seed: int) -> Batch:
    first = torch.arange(TOKENS).expand(BATCH, -1)
    ordinals = tuple(range(step * BATCH, (step + 1) * BATCH))
    masks = (Mask(first, first + TOKENS),)
    return Batch("video", step, ordinals, ("",) * BATCH, (clips(step, seed),), masks, (2, SIDE, SIDE))


def objective(latent: Mapping[str, Any], weight: float | None, seed: int) -> JEPA:
    """A debug-sized encoder and predictor; the EMA target of momentum 1 stays as it is."""
    terms: dict[str, Any] = {"masked_prediction": {}}
    if weight is not None:
        terms["latent_information"] = {"weight": weight}
    built = build_objective(
        ObjectiveConfig(momentum=1.0, latent=LatentConfig(**latent), terms=terms),
        ModelConfig("vit_debug", depth=2, levels=[-1], patch_size=PATCH),
        PredictorSettings(embed_dim=48, depth=1, num_heads=3),
        seed=seed,
    )
    freeze_unused(built, ["video"])
    return built


def train(model: JEPA, steps: int, every: int, seed: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Steps and rows as a run would log them, every so many steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for step in range(steps):
        result = model({"video": batch(step, seed)}, step)
        result.loss.backward()
        if (step + 1) % every == 0:
            found = result.metrics | latent_diagnostics(model, result.outputs)
            yield step + 1, {name: value.item() for name, value in found.items()}
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| latent | L1 | nats | reliance | context reliance |\n|---|---|---|---|---|")
    names = ("loss/masked_prediction", *(f"diag/video/latent/{n}" for n in ("nats", "reliance", "context_reliance")))
    for case, (latent, weight) in CASES.items():
        rows = []
        for seed in range(arguments.seeds):
            *_, (_, row) = train(objective(latent, weight, seed), arguments.steps, arguments.steps, seed)
            rows.append(row)
        cells = [", ".join(f"{row[name]:.3g}" for row in rows if name in row) for name in names]
        print(f"| {case} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
