"""Other encoders give what they give at home: their own normalisation, their patch tokens, no class tokens."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vjepa
from evals.adapters import CallableFeatures, Normalisation, load_transformers
from evals.clip_protocol import encode_clips
from evals.dense_features import LevelFeatures
from evals.features import EncoderFeatures, FeatureSource
from evals.probe_config import load_probe
from vjepa.batch import normalise
from vjepa.hub import from_pretrained
from vjepa.nn.encoder import Encoder
from vjepa.registry import model_config


def random_clips(count: int = 2, frames: int = 4, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, frames, size, size), dtype=torch.uint8, generator=generator)


def save(folder: Path, model: Any, mean: float | None = None) -> Path:
    model.save_pretrained(folder)
    if mean is not None:
        stored = {"image_mean": [mean] * 3, "image_std": [0.5] * 3}
        (folder / "preprocessor_config.json").write_text(json.dumps(stored))
    return folder


def tiny_vjepa2() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.VJEPA2Config(
        crop_size=16,
        patch_size=8,
        frames_per_clip=4,
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
    )
    return transformers.VJEPA2Model(config).eval()


def tiny_dinov2() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(
        image_size=28, patch_size=14, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, num_register_tokens=3
    )
    return transformers.Dinov2WithRegistersModel(config).eval()


def test_a_video_model_sees_normalised_clips_and_gives_its_grid(tmp_path: Path) -> None:
    model = tiny_vjepa2()
    source: FeatureSource = load_transformers(save(tmp_path / "tiny-vjepa2", model))
    clips = random_clips()
    tokens = source.tokens(clips)
    assert (source.name, tuple(tokens.shape)) == ("tiny-vjepa2", (2, 2, 2, 2, 32))
    with torch.no_grad():
        expected = model(normalise(clips).transpose(1, 2), skip_predictor=True).last_hidden_state
    torch.testing.assert_close(tokens.flatten(1, 3), expected)


def test_an_image_model_sees_frames_one_by_one_without_class_tokens_and_registers(tmp_path: Path) -> None:
    model = tiny_dinov2()
    source = load_transformers(save(tmp_path / "tiny-dinov2", model, mean=0.25), name="dino")
    clips = random_clips(size=28)
    tokens = source.tokens(clips)
    assert (source.name, tuple(tokens.shape)) == ("dino", (2, 4, 2, 2, 32))
    frame = (clips[1, :, 3].float() / 255 - 0.25) / 0.5
    with torch.no_grad():
        expected = model(frame[None]).last_hidden_state[0, 4:]  # one class token, three registers
    torch.testing.assert_close(tokens[1, 3].flatten(0, 1), expected)


def test_image_models_take_other_sizes_than_they_were_made_for(tmp_path: Path) -> None:
    source = load_transformers(save(tmp_path / "m", tiny_dinov2()))
    assert source.tokens(random_clips(count=1, frames=1, size=56)).shape == (1, 1, 4, 4, 32)


def test_videomae_has_its_fixed_number_of_frames(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        image_size=16,
        patch_size=8,
        num_frames=4,
        tubelet_size=2,
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=1,
        intermediate_size=64,
    )
    source = load_transformers(save(tmp_path / "mae", transformers.VideoMAEModel(config).eval(), mean=0.5))
    assert source.tokens(random_clips()).shape == (2, 2, 2, 2, 32)
    with pytest.raises(ValueError, match=r"set clips\.frames=4 \(is 8\)"):
        source.tokens(random_clips(frames=8))


def test_a_size_that_vjepa2_would_get_wrong_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", tiny_vjepa2())
    with pytest.raises(ValueError, match=r"config\.crop_size=16"):
        load_transformers(folder).tokens(random_clips(size=32))
    assert load_transformers(folder, crop_size=32).tokens(random_clips(size=32)).shape == (2, 2, 4, 4, 32)
    with pytest.raises(ValueError, match="do not divide into tubelets of 2"):
        load_transformers(folder).tokens(random_clips(frames=3))


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load_transformers(tmp_path)


def test_weights_that_are_missing_are_refused_and_not_drawn_at_random(tmp_path: Path) -> None:
    """`transformers` only logs it: the rows of `trained` would be those of random weights."""
    safetensors = pytest.importorskip("safetensors.torch")
    folder = save(tmp_path / "m", tiny_dinov2())
    weights = safetensors.load_file(folder / "model.safetensors")
    fewer = {name: value for name, value in weights.items() if "mask_token" not in name}
    safetensors.save_file(fewer, folder / "model.safetensors", metadata={"format": "pt"})
    load_transformers(folder)  # what no token depends on may be missing
    renamed = {f"backbone.{name}": value for name, value in weights.items()}
    safetensors.save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"m lacks .* weights of its model, such as embeddings"):
        load_transformers(folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cannot read .*m "):
        load_transformers(folder)


def test_weights_stored_in_bf16_are_computed_with_in_fp32(tmp_path: Path) -> None:
    model, clips = tiny_vjepa2().to(torch.bfloat16), random_clips()
    source = load_transformers(save(tmp_path / "m", model))
    exact = model.float()
    with torch.no_grad():
        wanted = exact(normalise(clips).transpose(1, 2), skip_predictor=True).last_hidden_state
    torch.testing.assert_close(source.tokens(clips).flatten(1, 3), wanted)


def test_a_users_own_function_is_a_source() -> None:
    def patches(clips: Tensor) -> Tensor:  # [B, 3, T, H, W] -> the mean colour of each patch
        return torch.nn.functional.avg_pool3d(clips, (2, 8, 8)).flatten(2).transpose(1, 2)

    source: FeatureSource = CallableFeatures("mean_colour", patches, 8, 2, Normalisation((0.5,) * 3, (0.5,) * 3))
    clips = random_clips()
    tokens = source.tokens(clips)
    assert tokens.shape == (2, 2, 2, 2, 3)
    expected = clips[1, :, 2:4, 8:, :8].float().mean(dim=(1, 2, 3)) / 127.5 - 1
    torch.testing.assert_close(tokens[1, 1, 1, 0], expected)
    assert encode_clips(source, clips[:, None].expand(-1, 3, -1, -1, -1, -1)).shape == (2, 24, 3)


def test_a_function_that_gives_other_tokens_is_refused() -> None:
    source = CallableFeatures("cls", lambda clips: torch.zeros(len(clips), 9, 3), 8, 2)
    with pytest.raises(ValueError, match=r"cls gave \[2, 9, 3\].*Class tokens"):
        source.tokens(random_clips())


def test_several_levels_lie_side_by_side_as_tokens_or_channels() -> None:
    encoder = vjepa.create_model("vit_debug", patch_size=8, seed=0)
    count, clips = len(encoder.levels), random_clips()
    assert count > 1
    last = EncoderFeatures("e", encoder).tokens(clips)
    as_tokens = LevelFeatures("e", encoder, encoder.levels, join="tokens").tokens(clips)
    as_channels = LevelFeatures("e", encoder, encoder.levels).tokens(clips)
    assert (as_tokens.shape, as_channels.shape) == ((2, 2 * count, 2, 2, 48), (2, 2, 2, 2, 48 * count))
    torch.testing.assert_close(as_tokens[:, -2:], last)
    torch.testing.assert_close(as_channels[..., -48:], last)
    first = LevelFeatures("e", encoder, encoder.levels[:1], join="tokens").tokens(clips)
    assert torch.equal(first, as_tokens[:, :2])
    assert not torch.equal(first, as_tokens[:, -2:])


def test_an_encoder_with_one_norm_has_it_behind_every_block_that_is_read(tmp_path: Path) -> None:
    """As V-JEPA 2's own code reads the four levels of Diving48 and Jester."""
    model, clips = tiny_vjepa2(), random_clips()
    encoder = from_pretrained(save(tmp_path / "m", model))
    found = LevelFeatures("v2", encoder, (0, 1), join="tokens").tokens(clips)
    with torch.no_grad():
        outputs = model(normalise(clips).transpose(1, 2), skip_predictor=True, output_hidden_states=True)
        wanted = [model.encoder.layernorm(state) for state in outputs.hidden_states[1:3]]
    torch.testing.assert_close(found.flatten(1, 3), torch.cat(wanted, dim=1), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="no level norm"):
        LevelFeatures("v2", encoder, (2,))


def test_levels_that_recipes_leave_open_are_the_papers() -> None:
    config = load_probe("diving48", ["data.root=/data"])
    for depth, blocks in ((24, (17, 19, 21, 23)), (40, (24, 29, 34, 39)), (6, (5,))):
        one_norm = replace(model_config("vit_debug"), depth=depth, levels=(depth - 1,))
        assert config.blocks(Encoder(one_norm)) == blocks
    several = Encoder(model_config("vit_tiny"))
    assert config.blocks(several) == several.levels
    with pytest.raises(ValueError, match="has no norm in this encoder"):
        load_probe("diving48", ["data.root=/data", "levels=[1]"]).blocks(several)
