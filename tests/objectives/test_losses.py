"""Terms, targets and the objective that sums them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vjepa
from tests.masking.test_collate import FakeSample
from vjepa.batch import Batch, Mask, Modality, normalise
from vjepa.config import ModelConfig, PredictorSettings, build_models
from vjepa.masking.collate import MaskCollator, MaskConfig
from vjepa.nn.encoder import View
from vjepa.objectives import JEPA, ObjectiveConfig, build_terms
from vjepa.objectives.average import follow
from vjepa.objectives.checks import freeze_unused
from vjepa.objectives.targets import EmaTarget, normalise_levels
from vjepa.objectives.terms import ContextPrediction, Distance, MaskedPrediction, sqrt_distance_to_masked

BATCH: dict[Modality, int] = {"video": 2, "image": 2}


def micro_batch(*modalities: Modality, batch: int = 2) -> dict[Modality, Batch]:
    collate = MaskCollator(MaskConfig(), seed=0, batch=dict.fromkeys(modalities, batch), patch_size=16, tubelet_size=2)
    return {m: collate([FakeSample(ordinal, m) for ordinal in range(batch)]) for m in modalities}


def objective(**options: Any) -> JEPA:
    settings = PredictorSettings(embed_dim=48, depth=2, num_heads=3, mask_token_std=0.02)
    encoder, predictor = build_models(ModelConfig(name="vit_debug"), settings, seed=0)
    return JEPA(ObjectiveConfig(**options), encoder, predictor)


def brute_force_distance(mask: Mask, grid: tuple[int, int, int]) -> Tensor:
    _, h, w = grid

    def place(index: int) -> tuple[int, int, int]:
        return index // (h * w), index % (h * w) // w, index % w

    rows = []
    for context, masked in zip(mask.context.tolist(), mask.masked.tolist(), strict=True):
        rows.append([math.sqrt(min(math.dist(place(c), place(m)) for m in masked)) for c in context])
    return torch.tensor(rows)


@pytest.mark.parametrize("batch", [1, 3])
def test_distance_weights_are_those_of_a_loop_over_tokens(batch: int) -> None:
    [video] = micro_batch("video", batch=batch).values()
    for mask in video.masks:
        found = sqrt_distance_to_masked(mask, video.grid)
        torch.testing.assert_close(found, brute_force_distance(mask, video.grid), atol=1e-5, rtol=0)
        assert found.min() >= 1


def test_time_counts_as_one_unit_per_tubelet() -> None:
    mask = Mask(torch.tensor([[0]]), torch.tensor([[2 * 12]]))  # the same place two tubelets later, 3 x 4 grid
    assert sqrt_distance_to_masked(mask, (3, 3, 4)).item() == pytest.approx(math.sqrt(2))


def test_token_distance_is_the_channel_mean_over_all_levels() -> None:
    predicted, target = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    indices = torch.tensor([[0, 2, 3, 4, 6]]).expand(2, -1)
    expected = (predicted - target.gather(1, indices[:, :, None].expand(-1, -1, 12))).abs().mean(-1)
    torch.testing.assert_close(Distance()(predicted, target, indices, 3), expected)
    squared = (predicted - target.gather(1, indices[:, :, None].expand(-1, -1, 12))).square().mean(-1) / 2
    torch.testing.assert_close(Distance(exponent=2.0)(predicted, target, indices, 3), squared)


def test_smooth_l1_is_torch_s() -> None:
    predicted, target = torch.randn(2, 5, 12) * 2, torch.randn(2, 5, 12)
    indices = torch.arange(5).expand(2, -1)
    wanted = torch.nn.functional.smooth_l1_loss(predicted, target)
    assert Distance(is_smooth=True)(predicted, target, indices, 3).mean().item() == pytest.approx(wanted.item())


def test_a_distance_can_look_at_some_levels_alone() -> None:
    predicted, target = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    indices = torch.arange(5).expand(2, -1)
    found = Distance.of(1.0, False, [1, 3])(predicted, target, indices, 3)
    each = [Distance()(p, t, indices, 1) for p, t in zip(predicted.chunk(3, -1), target.chunk(3, -1), strict=True)]
    torch.testing.assert_close(found, (each[0] + each[2]) / 2)
    with pytest.raises(ValueError, match="the target has 3, counted from 1"):
        Distance.of(1.0, False, [4])(predicted, target, indices, 3)


@pytest.mark.parametrize(
    ("options", "said"), [({"smooth": True, "exponent": 2.0}, "smooth L1"), ({"levels": [0]}, "counted from 1")]
)
def test_distances_that_do_not_exist_are_refused(options: dict[str, Any], said: str) -> None:
    for term in (MaskedPrediction, ContextPrediction):
        with pytest.raises(ValueError, match=said):
            term(**options)


def test_targets_are_normalised_per_level_without_affine() -> None:
    tokens = torch.randn(2, 5, 12) * 7 + 3
    levels = normalise_levels(tokens, 3).unflatten(-1, (3, 4))
    torch.testing.assert_close(levels.mean(-1), torch.zeros(2, 5, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(levels.var(-1, correction=0), torch.ones(2, 5, 3), atol=1e-4, rtol=0)


def test_lambda_is_zero_then_ramps_then_holds_and_differs_by_modality() -> None:
    term = ContextPrediction()
    assert [term.weight_at("video", step) for step in (0, 15_000, 22_500, 30_000, 100_000)] == [0, 0, 0.25, 0.5, 0.5]
    assert term.weight_at("image", 22_500) == pytest.approx(0.35)
    assert ContextPrediction(warmup_start=0, warmup_end=0).weight_at("video", 0) == 0.5


def test_the_loss_is_the_weighted_sum_of_its_terms_over_modalities() -> None:
    model = objective(terms={"masked_prediction": {}, "context_prediction": {"warmup_start": 0, "warmup_end": 0}})
    found = model(micro_batch("video", "image"), 0).metrics
    per_modality = {
        "video": found["loss/masked_prediction/video"] + 0.5 * found["loss/context_prediction/video"],
        "image": found["loss/masked_prediction/image"] + 0.7 * found["loss/context_prediction/image"],
    }
    assert found["loss"].item() == pytest.approx(float(sum(per_modality.values())) / 2, abs=1e-6)


def test_a_modality_alone_has_the_whole_weight() -> None:
    model = objective(terms={"masked_prediction": {}})
    found = model(micro_batch("video"), 0).metrics
    assert found["loss"].item() == pytest.approx(found["loss/masked_prediction/video"].item())


def test_the_loss_of_a_batch_is_the_mean_of_its_clips() -> None:
    model = objective(terms={"masked_prediction": {}, "context_prediction": {"warmup_start": 0, "warmup_end": 0}})
    collate = MaskCollator(MaskConfig(), seed=0, batch={"video": 4}, patch_size=16, tubelet_size=2)
    samples = [FakeSample(ordinal) for ordinal in range(4)]
    whole = model({"video": collate(samples)}, 0).loss
    parts = [model({"video": collate([sample])}, 0).loss for sample in samples]
    assert whole.item() == pytest.approx(torch.stack(parts).mean().item(), abs=1e-6)


def test_every_trainable_parameter_gets_a_gradient_even_while_lambda_is_zero() -> None:
    model = objective()
    model(micro_batch("video", "image"), 0).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert not any(p.requires_grad for p in model.exported.parameters())


@pytest.mark.parametrize("modality", ["video", "image"])
def test_with_one_modality_the_other_s_parameters_are_frozen_by_name(modality: Modality) -> None:
    model = objective(terms={"masked_prediction": {}})
    frozen = freeze_unused(model, [modality])
    other = "image" if modality == "video" else "video"
    assert all(other in name or "context_head" in name for name in frozen)
    assert f"predictor.mask_tokens.{other}" in frozen
    model(micro_batch(modality), 0).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_the_target_gives_no_gradient_to_the_encoder_and_follows_it_by_its_momentum() -> None:
    encoder = vjepa.create_model("vit_debug", seed=0)
    target = EmaTarget(encoder)
    before = {name: value.clone() for name, value in target.encoder.state_dict().items()}
    student = vjepa.create_model("vit_debug", seed=1)
    follow(target.encoder, student, 0.75)
    for name, value in target.encoder.state_dict().items():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * student.state_dict()[name])
    assert not target([torch.randn(1, 3, 2, 32, 32)])[0].requires_grad


def test_the_target_stays_fp32_and_moves_even_by_tiny_steps() -> None:
    encoder = vjepa.create_model("vit_debug").bfloat16()
    target = EmaTarget(encoder)
    assert {p.dtype for p in target.encoder.parameters()} == {torch.float32}


def test_momentum_is_constant_by_default_and_ramps_where_it_has_an_end() -> None:
    assert {objective().momentum_at(step, 100) for step in (0, 50, 99)} == {0.99925}
    ramped = objective(momentum=0.996, momentum_end=1.0)
    assert [ramped.momentum_at(step, 101) for step in (0, 50, 100)] == pytest.approx([0.996, 0.998, 1.0])


def test_unknown_terms_and_options_are_refused_with_the_known_names() -> None:
    with pytest.raises(ValueError, match="Did you mean 'context_prediction'"):
        build_terms({"context_predicton": {}})
    with pytest.raises(ValueError, match="lamda_video"):
        build_terms({"context_prediction": {"lamda_video": 1.0}})
    with pytest.raises(ValueError, match="at least one term"):
        build_terms({"masked_prediction": None})


def test_mask_losses_are_averaged_over_masks_not_over_tokens() -> None:
    model = objective(terms={"masked_prediction": {}})
    outputs = model(micro_batch("video"), 0).outputs["video"]
    each = [
        Distance()(p, outputs.wanted, mask.masked, outputs.num_levels).mean()
        for p, mask in zip(outputs.predicted, outputs.masks, strict=True)
    ]
    assert each[0].item() != pytest.approx(each[1].item(), abs=1e-7)
    assert MaskedPrediction()(outputs).item() == pytest.approx(torch.stack(each).mean().item())


# ---------------------------------------------------------------------------------------------------- online targets


def test_an_online_target_is_the_encoder_itself_in_the_same_pass() -> None:
    model, batch = objective(target="online"), micro_batch("video", "image")
    outputs = model(batch, 0).outputs
    for modality, output in outputs.items():
        assert output.whole is not None
        [[tokens]] = model.encoder.forward_levels([View(normalise(batch[modality].clips))])
        torch.testing.assert_close(output.whole, tokens)
        torch.testing.assert_close(output.target, normalise_levels(tokens, len(model.encoder.levels)))
    assert model.target is None
    assert model.exported is model.encoder
    assert model.momentum_at(0, 10) is None
    assert not [name for name in model.state_dict() if name.startswith("target")]


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_gradient_flows_through_an_online_target_unless_it_is_stopped(stop_gradient: bool) -> None:
    model = objective(target="online", stop_gradient=stop_gradient)
    output = model(micro_batch("video"), 0).outputs["video"]
    assert output.target.requires_grad is not stop_gradient


def test_stopping_a_gradient_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"objective\.stop_gradient=true is for target=online"):
        ObjectiveConfig(stop_gradient=True)
