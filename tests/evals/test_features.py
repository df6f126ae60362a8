"""Frozen features are what the encoder gives, and the baselines are what they are called."""

import math

import pytest
import torch
from torch import Tensor

import vjepa
from evals.datasets import LabelledClips
from evals.dense_features import LevelFeatures
from evals.features import (
    EncoderFeatures,
    FeatureSource,
    PixelFeatures,
    extract,
    position_features,
    read_features,
    read_out,
)
from evals.labelled_suite import default_sources
from vjepa.batch import normalise
from vjepa.nn.encoder import Encoder
from vjepa.registry import create_encoder


def tiny_encoder(seed: int = 0) -> Encoder:
    return vjepa.create_model("vit_debug", patch_size=8, seed=seed)


def random_clips(count: int = 5, frames: int = 4, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, frames, size, size), dtype=torch.uint8, generator=generator)


def test_features_are_the_encoders_tokens_of_normalised_clips() -> None:
    encoder, clips = tiny_encoder(), random_clips()
    tokens = extract(encoder, clips, batch_size=2)
    assert tokens.shape == (5, 2, 2, 2, 48)
    with torch.no_grad():
        expected = encoder(normalise(clips))
    torch.testing.assert_close(tokens.flatten(1, 3), expected)
    assert not tokens.requires_grad


def test_the_batch_size_changes_nothing() -> None:
    encoder, clips = tiny_encoder(), random_clips()
    torch.testing.assert_close(extract(encoder, clips, batch_size=1), extract(encoder, clips, batch_size=5))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_no_numbers_are_refused(value: float) -> None:
    """Every metric would give a number for them: mIoU .10, k-NN chance."""
    encoder, clips = vjepa.create_model("vit_debug", seed=0), torch.zeros(1, 3, 4, 32, 32, dtype=torch.uint8)
    with torch.no_grad():
        encoder.get_parameter(f"norms.{len(encoder.levels) - 1}.bias")[3] = value
    for source in (EncoderFeatures("mine", encoder), LevelFeatures("mine", encoder)):
        with pytest.raises(ValueError, match="the features of mine are not finite: its weights are broken"):
            source.tokens(clips)


def test_extraction_is_fp32_under_autocast_and_leaves_the_mode_as_it_was() -> None:
    encoder, clips = tiny_encoder().train(), random_clips()
    expected = extract(encoder, clips)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = extract(encoder, clips)
    assert tokens.dtype == torch.float32
    assert torch.equal(tokens, expected)
    assert encoder.training


def test_the_untrained_encoder_is_the_architecture_at_its_initialisation() -> None:
    """Seed 3 made the model before training; whatever the weights are now, the baseline is that initialisation."""
    trained = tiny_encoder(seed=3)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.1)
    sources = {source.name: source for source in default_sources(trained, seed=3)}
    assert list(sources) == ["trained", "untrained", "rgb", "rgb_difference"]
    clips = random_clips()
    assert torch.equal(sources["untrained"].tokens(clips), extract(tiny_encoder(seed=3), clips))
    assert torch.equal(sources["trained"].tokens(clips), extract(trained, clips))
    wider = {source.name: source for source in default_sources(trained, seed=3, init_std=0.05)}
    expected = create_encoder(trained.config, seed=3, weight_std=0.05)
    assert torch.equal(wider["untrained"].tokens(clips), extract(expected, clips))


# ------------------------------------------------------------------------------------------------------- the pixels


def test_rgb_features_are_the_pixels_of_each_tubelet_and_its_position() -> None:
    clips = random_clips(frames=6, size=24)
    tokens = PixelFeatures(patch_size=8, tubelet_size=2).tokens(clips)
    assert tokens.shape == (5, 3, 3, 3, 3 * 2 * 8 * 8 + 24)
    tubelet = normalise(clips)[4, :, 2:4, 16:24, 8:16]
    assert torch.equal(tokens[4, 1, 2, 1, :384], tubelet.flatten())
    assert torch.equal(tokens[4, 1, 2, 1, 384:], position_features((3, 3, 3))[1, 2, 1])


def test_rgb_difference_adds_the_absolute_change_inside_each_tubelet() -> None:
    clips = random_clips(frames=6, size=24)
    tokens = PixelFeatures(patch_size=8, tubelet_size=3, difference=True).tokens(clips)
    assert tokens.shape == (5, 2, 3, 3, 3 * 3 * 64 + 3 * 2 * 64 + 24)
    tubelet = normalise(clips)[2, :, 3:6, 0:8, 16:24]
    assert torch.equal(tokens[2, 1, 0, 2, :576], tubelet.flatten())
    assert torch.equal(tokens[2, 1, 0, 2, 576:960], (tubelet[:, 1:] - tubelet[:, :-1]).abs().flatten())


def test_a_clip_that_stands_still_has_no_difference() -> None:
    clips = random_clips(frames=1).expand(-1, -1, 4, -1, -1)
    change = PixelFeatures(8, 2, difference=True).tokens(clips)[..., 384 : 384 + 192]
    assert not change.any()
    assert PixelFeatures(8, 2).tokens(clips)[..., :384].any()


def test_positions_differ_between_all_tokens_and_only_along_their_axes() -> None:
    position = position_features((4, 3, 2))
    assert position.shape == (4, 3, 2, 24)
    assert len(position.flatten(0, 2).unique(dim=0)) == 24
    assert torch.equal(position[0, 1, 1, 8:], position[3, 1, 1, 8:]), "rows and columns do not depend on the time"
    assert position[1, 0, 0, 0].item() == pytest.approx(math.sin(math.pi * 1.5 / 4))


def test_pixels_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="clips of 5 frames, 16x16"):
        PixelFeatures(8, 2).tokens(random_clips(frames=5))
    with pytest.raises(ValueError, match="no change inside one frame"):
        PixelFeatures(8, 1, difference=True)


# ----------------------------------------------------------------------------------------------------- the readouts


def test_readouts_are_mean_std_and_max_over_tokens() -> None:
    tokens = torch.tensor([[1.0, 10.0], [3.0, 10.0]]).view(1, 2, 1, 1, 2)
    assert read_out(tokens, "mean").tolist() == [[2.0, 10.0]]
    assert read_out(tokens, "msm").tolist() == [[2.0, 10.0, 1.0, 0.0, 3.0, 10.0]]
    assert torch.equal(read_out(tokens, "tokens"), tokens)


@pytest.mark.parametrize("source", [EncoderFeatures("model", tiny_encoder()), PixelFeatures(8, 2)])
def test_reading_in_batches_keeps_the_order_of_clips_and_labels(source: FeatureSource) -> None:
    data = LabelledClips(random_clips(), {"number": torch.arange(5)})
    found = read_features(source, data, ["mean", "tokens"], batch_size=2)
    tokens = source.tokens(data.clips)
    torch.testing.assert_close(found.features["tokens"], tokens)
    torch.testing.assert_close(found.features["mean"], read_out(tokens, "mean"))
    assert torch.equal(found.labels["number"], torch.arange(5))
