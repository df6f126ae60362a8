"""Writes the two golden files here: a checkpoint in the released layout at a tiny size, and what is computed from it.

    python -m tests.golden.make

It was written once, by the version of the code that reproduced every tensor of the reference's golden file
(../shared/golden/vjepa21_tiny) within 1e-6. Run it again only together with that comparison: a new file made by broken
code would hide the break.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from tests.golden.compute import compute, load_models

DIM, DEPTH, WIDTH, LEVELS = 24, 4, 12, 4
FOLDER = Path(__file__).parent


def checkpoint(generator: torch.Generator, *, dim: int = DIM, width: int = WIDTH) -> dict[str, dict[str, Tensor]]:
    """Random weights under the released names, with every bias, embedding and mask token away from zero.

    `dim` is the encoder's width, `width` the predictor's.
    """

    def draw(*shape: int) -> Tensor:
        fan_in = math.prod(shape[1:])
        scale = 1.5 / max(1, fan_in) ** 0.5 if len(shape) > 1 and shape[0] > 1 else 0.3
        return torch.randn(shape, generator=generator) * scale

    def block(prefix: str, size: int) -> dict[str, Tensor]:
        state = {}
        for norm in ("norm1", "norm2"):
            state |= {f"{prefix}.{norm}.weight": 1 + draw(size), f"{prefix}.{norm}.bias": draw(size)}
        for name, rows, columns in (
            ("attn.qkv", 3 * size, size),
            ("attn.proj", size, size),
            ("mlp.fc1", 4 * size, size),
            ("mlp.fc2", size, 4 * size),
        ):
            state |= {f"{prefix}.{name}.weight": draw(rows, columns), f"{prefix}.{name}.bias": draw(rows)}
        return state

    def encoder() -> dict[str, Tensor]:
        state = {"img_mod_embed": draw(1, 1, dim), "video_mod_embed": draw(1, 1, dim)}
        for name, frames in (("patch_embed", 2), ("patch_embed_img", 1)):
            state |= {f"{name}.proj.weight": draw(dim, 3, frames, 8, 8), f"{name}.proj.bias": draw(dim)}
        for i in range(DEPTH):
            state |= block(f"blocks.{i}", dim)
        for i in range(LEVELS):
            state |= {f"norms_block.{i}.weight": 1 + draw(dim), f"norms_block.{i}.bias": draw(dim)}
        return state

    def predictor() -> dict[str, Tensor]:
        state = {"img_mod_embed": draw(1, 1, width), "video_mod_embed": draw(1, 1, width)}
        state |= {f"mask_tokens.{i}": draw(1, 1, width) for i in range(2)}
        state |= {"predictor_embed.0.weight": draw(dim, LEVELS * dim), "predictor_embed.0.bias": draw(dim)}
        state |= {"predictor_embed.2.weight": draw(width, dim), "predictor_embed.2.bias": draw(width)}
        for i in range(2):
            state |= block(f"predictor_blocks.{i}", width)
        state |= {"predictor_norm.weight": 1 + draw(width), "predictor_norm.bias": draw(width)}
        for name in ("predictor_proj", "predictor_proj_context"):
            state |= {f"{name}.weight": draw(LEVELS * dim, width), f"{name}.bias": draw(LEVELS * dim)}
        return state

    wrap = "module.backbone."
    parts = {"encoder": encoder(), "target_encoder": encoder(), "predictor": predictor()}
    return {part: {wrap + name: value for name, value in state.items()} for part, state in parts.items()}


def main() -> None:
    generator = torch.Generator().manual_seed(20261122)
    weights = FOLDER / "tiny_checkpoint.pt"
    torch.save(checkpoint(generator), weights)
    cases = {}
    for modality, frames in (("video", 4), ("image", 1)):
        clip = torch.randn(2, 3, frames, 24, 32, generator=generator)
        tokens = max(1, frames // 2) * 3 * 4
        order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(2)])
        third = tokens // 3
        cases[modality] = {
            "clip": clip,
            "masks_context": [order[:, :third].sort().values, order[:, : third // 2].sort().values],
            "masks_target": [order[:, third : 2 * third].sort().values, order[:, third:].sort().values],
        }
    expected = {name: case | compute(case, name, *load_models(weights)) for name, case in cases.items()}
    torch.save(expected, FOLDER / "tiny_expected.pt")
    print({path.name: path.stat().st_size for path in FOLDER.glob("*.pt")})


if __name__ == "__main__":
    main()
