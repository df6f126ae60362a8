"""Analytic operations against torch's own counter, and against the figures of the reference for ViT-G."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vjepa.config import ModelConfig, PredictorSettings, build_models
from vjepa.nn.encoder import View
from vjepa.nn.flops import block_flops, encoder_flops, predictor_flops
from vjepa.registry import model_config

TERA = 1e12


def counted(run) -> int:
    """What torch counts, attention written out as matrix products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("frames", [4, 1], ids=["video", "image"])
def test_the_encoder_is_counted_as_torch_counts_it(frames: int) -> None:
    encoder, _ = build_models(
        ModelConfig("vit_debug", patch_size=8), PredictorSettings(embed_dim=48, num_heads=3), seed=0
    )
    clips = torch.zeros(3, 3, frames, 32, 24)
    grid, modality = encoder.grid(clips), encoder.modality(clips)
    some = torch.arange(5).expand(3, -1)
    expected = encoder_flops(encoder.config, grid, modality, 3, [5, None])
    assert counted(lambda: encoder.forward_levels([View(clips, (some, None))])) == expected


@pytest.mark.parametrize("levels", [[2, 4], [4]], ids=["two levels", "one level"])
def test_the_predictor_is_counted_as_torch_counts_it(levels: list[int]) -> None:
    settings = PredictorSettings(embed_dim=48, depth=3, num_heads=3)
    encoder, predictor = build_models(ModelConfig("vit_debug", depth=4, levels=levels), settings, seed=0)
    tokens = torch.zeros(2, 5, len(levels) * encoder.embed_dim)
    where = {"context": torch.arange(5).expand(2, -1), "masked": torch.arange(5, 12).expand(2, -1)}
    expected = predictor_flops(predictor.config, 2, [(5, 7)])
    assert counted(lambda: predictor(tokens, **where, grid=(2, 4, 4), modality="video")) == expected


def test_a_primary_step_of_vit_g_costs_what_the_reference_says() -> None:
    """Reference torch-and-distributed 2.4, truncated masks: teacher 8.9, student 7.2, predictor 1.4 TFLOP a clip."""
    encoder = model_config("vit_gigantic")
    predictor = PredictorSettings().predictor_config(encoder)
    long, short = (496, 977), (133, 1440)
    assert encoder_flops(encoder, (8, 16, 16), "video", 1, [None]) / TERA == pytest.approx(8.9, abs=0.05)
    student = 3 * encoder_flops(encoder, (8, 16, 16), "video", 1, [long[0], short[0]])
    assert student / TERA == pytest.approx(7.2, abs=0.05)
    assert 3 * predictor_flops(predictor, 1, [long, short]) / TERA == pytest.approx(1.4, abs=0.05)


def test_attention_grows_with_the_square_of_each_sequence() -> None:
    one, two = block_flops(8, 32, [10]), block_flops(8, 32, [20])
    split = block_flops(8, 32, [10, 10])
    assert split == 2 * one
    assert two - split == 4 * 8 * (20 * 20 - 2 * 10 * 10)
