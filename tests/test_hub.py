"""Weights that travel: strict, named, and in the released layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vjepa
from vjepa.hub import WeightsError, import_official, save_pretrained

CHECKPOINT = Path(__file__).parent / "golden" / "tiny_checkpoint.pt"
PREFIX = "module.backbone."


@pytest.fixture
def released() -> dict[str, Any]:
    return torch.load(CHECKPOINT, weights_only=True)


def write(folder: Path, checkpoint: dict[str, Any]) -> Path:
    path = folder / "released.pt"
    torch.save(checkpoint, path)
    return path


def load(path: Path, **options: Any) -> Any:
    return import_official(path, num_heads=1, predictor_num_heads=1, **options)


def test_a_saved_encoder_comes_back_with_the_same_features(tmp_path: Path) -> None:
    encoder = vjepa.create_model("vit_debug", levels=(1, 3), rope="tiled", seed=3)
    save_pretrained(encoder, tmp_path)
    again = vjepa.from_pretrained(tmp_path)
    clips = torch.randn(1, 3, 4, 32, 48)
    assert again.config == encoder.config
    assert torch.equal(again(clips), encoder(clips))
    assert not again.training


def test_missing_unexpected_and_wrongly_shaped_keys_are_all_listed(tmp_path: Path, released: dict[str, Any]) -> None:
    encoder: dict[str, Tensor] = released["encoder"]
    del encoder[PREFIX + "blocks.1.attn.proj.bias"]
    encoder[PREFIX + "norm.weight"] = torch.ones(24)
    encoder[PREFIX + "blocks.2.mlp.fc2.bias"] = torch.ones(7)
    with pytest.raises(WeightsError) as caught:
        load(write(tmp_path, released), key="encoder")
    message = str(caught.value)
    assert "missing: blocks.1.attn.proj.bias (24,)" in message
    assert "unexpected: norm.weight (24,)" in message
    assert "wrong shape: blocks.2.mlp.fc2.bias is (7,), expected (24,)" in message


def test_the_ema_weights_are_preferred_then_the_target_then_the_encoder(
    tmp_path: Path, released: dict[str, Any]
) -> None:
    def first_bias(checkpoint: dict[str, Any]) -> Tensor:
        return load(write(tmp_path, checkpoint))[0].blocks[0].attn.qkv.bias.detach()

    name = PREFIX + "blocks.0.attn.qkv.bias"
    assert torch.equal(first_bias(released), released["target_encoder"][name])
    ema = {**released, "ema_encoder": {k: v + 1 for k, v in released["encoder"].items()}}
    assert torch.equal(first_bias(ema), released["encoder"][name] + 1)
    only = {key: value for key, value in released.items() if key != "target_encoder"}
    assert torch.equal(first_bias(only), released["encoder"][name])
    with pytest.raises(WeightsError, match="no entry teacher"):
        load(write(tmp_path, released), key="teacher")


def test_the_distilled_layout_reads_one_level_and_writes_the_teacher_s_width(
    tmp_path: Path, released: dict[str, Any]
) -> None:
    predictor = {k: v for k, v in released["predictor"].items() if "predictor_embed" not in k and "proj." not in k}
    predictor |= {k: v for k, v in released["predictor"].items() if "attn.proj" in k}
    predictor |= {
        PREFIX + "predictor_embed.weight": torch.randn(12, 24),
        PREFIX + "predictor_embed.bias": torch.randn(12),
    }
    for head in ("predictor_proj", "predictor_proj_context"):
        predictor |= {f"{PREFIX}{head}.weight": torch.randn(40, 12), f"{PREFIX}{head}.bias": torch.randn(40)}
    distilled = {"ema_encoder": released["encoder"], "predictor": predictor}
    encoder, found = load(write(tmp_path, distilled))
    assert (found.config.num_levels, found.config.target_dim) == (1, 40)
    context, masked = torch.arange(4)[None], torch.arange(4, 12)[None]
    tokens = encoder(torch.randn(1, 3, 1, 24, 32), context=context)
    predicted, visible = found(tokens, context=context, masked=masked, grid=(1, 3, 4), modality="image")
    assert (predicted.shape, visible.shape) == ((1, 8, 40), (1, 4, 40))


def test_the_trained_mask_token_serves_both_modalities(released: dict[str, Any]) -> None:
    _, predictor = load(CHECKPOINT)
    trained = released["predictor"][PREFIX + "mask_tokens.0"].flatten()
    assert torch.equal(predictor.mask_tokens["video"].detach(), trained)
    assert torch.equal(predictor.mask_tokens["image"].detach(), trained)


@pytest.mark.parametrize(("name", "levels"), [("vit_giant", (9, 19, 29, 39)), ("vit_gigantic", (11, 23, 37, 47))])
def test_the_giants_are_told_apart_by_their_weights(name: str, levels: tuple[int, ...]) -> None:
    """The released ViT-G was trained with block 37, not the equally spaced 35. Shapes only: nothing is loaded."""
    from vjepa.hub.layouts import VJEPA21, ReleasedEncoder

    model = vjepa.create_model(name, device="meta")
    official = {"patch_embed.proj.weight": model.tokenizer.video.weight, "norms_block.0.weight": torch.ones(1)}
    official |= {n: p for n, p in model.named_parameters() if n.startswith("blocks.")}
    config = ReleasedEncoder(official, VJEPA21, "shapes").config()
    assert (config.embed_dim, config.depth, config.num_heads) == (
        model.embed_dim,
        model.config.depth,
        model.config.num_heads,
    )
    assert round(config.mlp_ratio * config.embed_dim) == model.state_dict()["blocks.0.mlp.fc1.bias"].shape[0]
    assert config.levels == levels


def test_files_that_are_no_checkpoint_of_this_kind_are_refused_by_name(
    tmp_path: Path, released: dict[str, Any]
) -> None:
    garbage = tmp_path / "garbage.pt"
    garbage.write_bytes(b"not a checkpoint")
    with pytest.raises(WeightsError, match=r"garbage\.pt cannot be read"):
        import_official(garbage)
    with pytest.raises(WeightsError, match="no 'predictor' entry"):
        load(write(tmp_path, {"encoder": released["encoder"]}))
    older = {k: v for k, v in released["encoder"].items() if "norms_block" not in k}
    with pytest.raises(WeightsError, match=r"nearest is V-JEPA 2\.1.* lacks norms_block"):
        load(write(tmp_path, {**released, "encoder": older}), key="encoder")


def test_a_folder_without_weights_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        vjepa.from_pretrained(tmp_path)
