"""V-JEPA 2 weights give the numbers of the transformers class, and are never taken for 2.1, nor 2.1 for them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vjepa
from tests.hub.released_files import (
    CROP,
    DIM,
    FRAMES,
    PATCH,
    PREFIX,
    WIDTH,
    transformers_model,
    version_2,
    version_2_encoder,
    version_2_predictor,
    write,
)
from vjepa.hub import WeightsError, import_official, load_strict
from vjepa.hub.layouts import ReleasedEncoder, recognise
from vjepa.nn.encoder import Encoder
from vjepa.nn.predictor import Predictor

GOLDEN_2_1 = Path(__file__).parents[1] / "golden" / "tiny_checkpoint.pt"
GRID = (FRAMES // 2, CROP // PATCH, CROP // PATCH)
NUM_TOKENS = GRID[0] * GRID[1] * GRID[2]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("released"), version_2())


@pytest.fixture(scope="module")
def ours(path: Path) -> tuple[Encoder, Predictor]:
    return import_official(path)


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    """VJEPA2Model with the target encoder's weights; its default mask token, 1, has token 0's values."""
    predictor = version_2_predictor(3)
    predictor["mask_tokens.1"] = predictor["mask_tokens.0"]
    return transformers_model(version_2_encoder(2), predictor)


@pytest.fixture(scope="module")
def clips() -> Tensor:
    return torch.randn(2, 3, FRAMES, CROP, CROP, generator=torch.Generator().manual_seed(0))


def close(mine: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_encoder_within_1e_5_of_transformers(ours: Any, theirs: nn.Module, clips: Tensor) -> None:
    close(ours[0](clips), theirs(clips.transpose(1, 2), skip_predictor=True).last_hidden_state)


@torch.no_grad()
def test_an_image_is_a_frame_repeated_to_a_tubelet(ours: Any, theirs: nn.Module, clips: Tensor) -> None:
    image = clips[:, :, :1]
    close(ours[0](image), theirs(image.transpose(1, 2), skip_predictor=True).last_hidden_state)


@torch.no_grad()
def test_the_masked_encoder_within_1e_5_of_transformers(ours: Any, theirs: Any, clips: Tensor) -> None:
    """Their encoder takes no mask: its parts are called, with the tokens' own positions."""
    context = torch.stack([torch.randperm(NUM_TOKENS)[:17].sort().values for _ in clips])
    x = theirs.encoder.embeddings(clips.transpose(1, 2))
    x = x.gather(1, context[:, :, None].expand(-1, -1, DIM))
    for layer in theirs.encoder.layer:
        x = layer(x, position_mask=context)[0]
    close(ours[0](clips, context=context), theirs.encoder.layernorm(x))


@torch.no_grad()
def test_the_predictor_within_1e_5_of_transformers(ours: Any, theirs: nn.Module, clips: Tensor) -> None:
    order = torch.stack([torch.randperm(NUM_TOKENS) for _ in clips])
    context, masked = order[:, :20].sort().values, order[:, 20:45].sort().values
    output = theirs(clips.transpose(1, 2), context_mask=[context], target_mask=[masked])
    tokens = ours[0](clips).gather(1, context[:, :, None].expand(-1, -1, DIM))
    predicted, visible = ours[1](tokens, context=context, masked=masked, grid=GRID, modality="video")
    close(predicted, output.predictor_output.last_hidden_state)
    assert visible is None


@torch.no_grad()
def test_the_wrong_rope_would_load_and_give_other_features(ours: Any, clips: Tensor) -> None:
    """Why the layout decides it: no shape shows the difference."""
    wrong = vjepa.create_model("vit_debug", levels=(3,), image_tokenizer=False, modality_embed=False)
    load_strict(wrong, ours[0].state_dict(), source="the same names")
    assert (wrong(clips) - ours[0](clips)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"rope": "interleaved"}, "rope=interleaved contradicts .* V-JEPA 2 weights .* trained with rope=tiled"),
        ({"levels": (0, 1, 2, 3)}, r"levels=\(0, 1, 2, 3\) contradicts .* trained with levels \(3,\)"),
    ],
)
def test_version_2_weights_as_2_1_are_refused(path: Path, asked: dict[str, Any], told: str) -> None:
    with pytest.raises(WeightsError, match=told):
        import_official(path, **asked)
    again, _ = import_official(path, rope="tiled", levels=(3,))
    assert again.config == import_official(path)[0].config


def test_version_2_weights_do_not_fit_a_2_1_encoder(path: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        load_strict(vjepa.create_model("vit_debug"), import_official(path)[0].state_dict(), source="V-JEPA 2")
    assert "missing: tokenizer.image.weight" in str(caught.value)
    assert "missing: norms.3.weight" in str(caught.value)


def test_2_1_weights_with_the_rope_of_version_2_are_refused() -> None:
    with pytest.raises(WeightsError, match=r"rope=tiled contradicts .* V-JEPA 2\.1 weights"):
        import_official(GOLDEN_2_1, num_heads=1, predictor_num_heads=1, rope="tiled")


def test_levels_of_a_released_depth_are_those_it_was_trained_with() -> None:
    """35 is equally spaced and what the paper prints, 37 is what the weights were trained with."""
    model = vjepa.create_model("vit_gigantic", device="meta")
    weights = {"patch_embed.proj.weight": model.tokenizer.video.weight, "norms_block.0.weight": torch.ones(1)}
    weights |= {name: value for name, value in model.state_dict().items() if name.startswith("blocks.")}
    released = ReleasedEncoder(weights, recognise(weights, "G"), "G")
    with pytest.raises(WeightsError, match=r"levels=\(11, 23, 35, 47\) contradicts.*\(11, 23, 37, 47\)"):
        released.config(levels=(11, 23, 35, 47))
    with pytest.raises(WeightsError, match=r"num_heads=16, but vit_gigantic .* has 26"):
        released.config(16)


def test_the_entry_that_was_taken_is_named_in_the_log(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="vjepa.hub.released"):
        encoder, _ = import_official(path)
    assert "weights are those of 'target_encoder' (also there: ['encoder'])" in caplog.text
    expected = version_2_encoder(2)["norm.weight"]
    assert torch.equal(encoder.state_dict()["norms.0.weight"], expected)


def test_left_over_position_tables_are_dropped_by_name(tmp_path: Path, path: Path) -> None:
    checkpoint = version_2()
    checkpoint["target_encoder"][PREFIX + "pos_embed"] = torch.ones(1, NUM_TOKENS, DIM)
    checkpoint["predictor"][PREFIX + "predictor_pos_embed"] = torch.ones(1, NUM_TOKENS, WIDTH)
    encoder, _ = import_official(write(tmp_path, checkpoint))
    assert all(
        torch.equal(a, b) for a, b in zip(encoder.parameters(), import_official(path)[0].parameters(), strict=True)
    )


def test_version_1_is_not_taken_for_version_2(tmp_path: Path) -> None:
    """V-JEPA 1 has the same names, absolute positions and two mask tokens."""
    checkpoint = version_2()
    checkpoint["target_encoder"][PREFIX + "pos_embed"] = torch.ones(1, NUM_TOKENS, DIM)
    for i in range(2, 10):
        del checkpoint["predictor"][f"{PREFIX}mask_tokens.{i}"]
    with pytest.raises(WeightsError, match=r"looks like V-JEPA 1: pos_embed beside 2 mask tokens"):
        import_official(write(tmp_path, checkpoint))


def test_networks_that_were_not_trained_together_are_refused(tmp_path: Path) -> None:
    newer = torch.load(GOLDEN_2_1, weights_only=True)
    with pytest.raises(WeightsError, match=r"the encoder is V-JEPA 2, the predictor V-JEPA 2\.1"):
        import_official(write(tmp_path, {**version_2(), "predictor": newer["predictor"]}))


def test_of_an_action_conditioned_file_the_encoder_alone_is_read(tmp_path: Path) -> None:
    checkpoint = version_2()
    checkpoint["predictor"] = {PREFIX + "action_encoder.weight": torch.ones(4, 7)}
    path = write(tmp_path, checkpoint)
    assert vjepa.from_pretrained(path).config.rope == "tiled"
    with pytest.raises(WeightsError, match="conditioned on actions"):
        import_official(path)
    assert "conditioned on actions" in vjepa.hub.describe(path)["predictor"]
