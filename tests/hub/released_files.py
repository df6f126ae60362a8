"""Checkpoints in the layouts of the released files, at tiny widths, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "module.backbone."
DIM, DEPTH, HEADS = 48, 4, 3  # those of vit_debug: head counts of known sizes are known
WIDTH, PREDICTOR_DEPTH, PREDICTOR_HEADS = 72, 2, 12
PATCH, CROP, FRAMES = 16, 64, 8
MASK_TOKENS = 10


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    """Values that make every weight count: attention far from uniform, biases and norms away from their start."""
    return torch.randn(shape, generator=generator) * 0.25


def block(generator: torch.Generator, dim: int) -> dict[str, Tensor]:
    shapes = {
        "norm1.weight": (dim,),
        "norm1.bias": (dim,),
        "attn.qkv.weight": (3 * dim, dim),
        "attn.qkv.bias": (3 * dim,),
        "attn.proj.weight": (dim, dim),
        "attn.proj.bias": (dim,),
        "norm2.weight": (dim,),
        "norm2.bias": (dim,),
        "mlp.fc1.weight": (4 * dim, dim),
        "mlp.fc1.bias": (4 * dim,),
        "mlp.fc2.weight": (dim, 4 * dim),
        "mlp.fc2.bias": (dim,),
    }
    ones = ("norm1.weight", "norm2.weight")
    return {name: draw(generator, *shape) + (name in ones) for name, shape in shapes.items()}


def linear(generator: torch.Generator, name: str, rows: int, columns: int) -> dict[str, Tensor]:
    return {f"{name}.weight": draw(generator, rows, columns), f"{name}.bias": draw(generator, rows)}


def norm(generator: torch.Generator, name: str, dim: int) -> dict[str, Tensor]:
    return {f"{name}.weight": 1 + draw(generator, dim), f"{name}.bias": draw(generator, dim)}


def version_2_encoder(seed: int) -> dict[str, Tensor]:
    """V-JEPA 2: one patch embedding, one final norm (reference 6.6)."""
    g = torch.Generator().manual_seed(seed)
    state = {"patch_embed.proj.weight": draw(g, DIM, 3, 2, PATCH, PATCH), "patch_embed.proj.bias": draw(g, DIM)}
    for i in range(DEPTH):
        state |= {f"blocks.{i}.{name}": value for name, value in block(g, DIM).items()}
    return state | norm(g, "norm", DIM)


def version_2_predictor(seed: int) -> dict[str, Tensor]:
    """V-JEPA 2: linear in and out, ten mask tokens, every one another."""
    g = torch.Generator().manual_seed(seed)
    state = linear(g, "predictor_embed", WIDTH, DIM)
    state |= {f"mask_tokens.{i}": draw(g, 1, 1, WIDTH) for i in range(MASK_TOKENS)}
    for i in range(PREDICTOR_DEPTH):
        state |= {f"predictor_blocks.{i}.{name}": value for name, value in block(g, WIDTH).items()}
    return state | norm(g, "predictor_norm", WIDTH) | linear(g, "predictor_proj", DIM, WIDTH)


def wrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {PREFIX + name: value for name, value in state.items()}


def version_2() -> dict[str, Any]:
    """A whole V-JEPA 2 checkpoint; encoder and target encoder differ."""
    return {
        "encoder": wrapped(version_2_encoder(1)),
        "target_encoder": wrapped(version_2_encoder(2)),
        "predictor": wrapped(version_2_predictor(3)),
        "epoch": 7,
    }


def write(folder: Path, checkpoint: dict[str, Any], name: str = "released.pt") -> Path:
    torch.save(checkpoint, folder / name)
    return folder / name


def hugging_face_names(encoder: dict[str, Tensor], predictor: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the authors' conversion makes of it (reference 6.7), written down again, apart from the code under test."""

    def one(name: str, value: Tensor, layers: str) -> dict[str, Tensor]:
        if ".attn.qkv." not in name:
            return {layers + name.split(".", 1)[1].replace("attn.proj", "attention.proj"): value}
        q, k, v = value.chunk(3)
        stem, kind = layers + name.split(".", 1)[1].split("attn")[0] + "attention", name.rsplit(".", 1)[1]
        return {f"{stem}.query.{kind}": q, f"{stem}.key.{kind}": k, f"{stem}.value.{kind}": v}

    state = {}
    for name, value in encoder.items():
        kind = name.rsplit(".", 1)[1]
        if name.startswith("blocks."):
            state |= one(name, value, "encoder.layer.")
        elif name.startswith("norm."):
            state[f"encoder.layernorm.{kind}"] = value
        else:
            state[f"encoder.embeddings.patch_embeddings.proj.{kind}"] = value
    for name, value in predictor.items():
        kind = name.rsplit(".", 1)[1]
        if name.startswith("predictor_blocks."):
            state |= one(name, value, "predictor.layer.")
        elif not name.startswith("mask_tokens."):
            there = {"embed": "embeddings.predictor_embeddings", "norm": "layernorm", "proj": "proj"}
            state[f"predictor.{there[name.split('.')[0].removeprefix('predictor_')]}.{kind}"] = value
    tokens = [predictor[f"mask_tokens.{i}"] for i in range(MASK_TOKENS)]
    return state | {"predictor.embeddings.mask_tokens": torch.stack(tokens)}


def transformers_model(encoder: dict[str, Tensor], predictor: dict[str, Tensor]) -> nn.Module:
    """transformers' VJEPA2Model of the made files' size, with these weights (named as in V-JEPA 2's files)."""
    from transformers import VJEPA2Config, VJEPA2Model

    config = VJEPA2Config(
        crop_size=CROP,
        frames_per_clip=FRAMES,
        hidden_size=DIM,
        num_attention_heads=HEADS,
        num_hidden_layers=DEPTH,
        pred_hidden_size=WIDTH,
        pred_num_attention_heads=PREDICTOR_HEADS,
        pred_num_hidden_layers=PREDICTOR_DEPTH,
    )
    model = VJEPA2Model(config).eval()
    model.load_state_dict(hugging_face_names(encoder, predictor))
    return model
