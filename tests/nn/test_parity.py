"""The reference's numbers: model, losses and gradients, video and image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden.compute import LAMBDA, compute, load_models
from vjepa import hub

OURS = Path(__file__).parents[1] / "golden"
TENSORS = ("features", "features_hierarchical", "targets")
LISTS = ("context", "predicted_targets", "predicted_context", "distance_weights_sqrt_dmin")
LOSSES = ("loss_pred", "loss_context", "loss_context_unweighted", "loss")


@pytest.fixture(scope="module")
def ours() -> tuple[dict[str, Any], dict[str, Any]]:
    expected = torch.load(OURS / "tiny_expected.pt", weights_only=True)
    models = load_models(OURS / "tiny_checkpoint.pt")
    return expected, {case: compute(expected[case], case, *models) for case in ("video", "image")}


@pytest.fixture(scope="module")
def reference(shared: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = shared / "golden" / "vjepa21_tiny"
    expected = torch.load(folder / "expected.pt", weights_only=True)
    models = load_models(folder / "checkpoint.pt", num_heads=3, predictor_num_heads=2)
    return expected, {case: compute(expected[case], case, *models) for case in ("video", "image")}


def assert_equal_tensors(expected: dict[str, Any], found: dict[str, Any]) -> None:
    for name in TENSORS:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    for name in LISTS:
        for mine, theirs in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", ["video", "image"])
@pytest.mark.parametrize("source", ["ours", "reference"])
def test_every_recorded_tensor_within_1e_5(source: str, case: str, request: pytest.FixtureRequest) -> None:
    expected, found = request.getfixturevalue(source)
    assert_equal_tensors(expected[case], found[case])


@pytest.mark.parametrize("case", ["video", "image"])
@pytest.mark.parametrize("source", ["ours", "reference"])
def test_losses_within_1e_6(source: str, case: str, request: pytest.FixtureRequest) -> None:
    expected, found = request.getfixturevalue(source)
    assert float(expected[case].get("lam", LAMBDA)) == LAMBDA
    for name in LOSSES:
        assert float(found[case][name]) == pytest.approx(float(expected[case][name]), abs=1e-6), name


@pytest.mark.parametrize("case", ["video", "image"])
def test_gradient_norms_of_ours_within_1e_4_relative(case: str, ours: Any) -> None:
    expected, found = ours
    for part in ("encoder", "predictor"):
        assert found[case]["grad_norms"][part].keys() == expected[case]["grad_norms"][part].keys()
        for name, norm in expected[case]["grad_norms"][part].items():
            assert float(found[case]["grad_norms"][part][name]) == pytest.approx(float(norm), rel=1e-4), name


@pytest.mark.parametrize("case", ["video", "image"])
def test_gradient_norms_of_the_reference_within_1e_4_relative(case: str, reference: Any) -> None:
    expected, found = reference
    compared = 0
    for part in ("encoder", "predictor"):
        rename = official_names(part)
        for name, norm in expected[case]["grad_norms"][part].items():
            official = name.replace("module.", "").replace("backbone.", "")
            if official.startswith("mask_tokens.") and official != "mask_tokens.0":
                continue
            mine = rename(official, case)
            if mine not in found[case]["grad_norms"][part]:
                assert float(norm) == 0, f"{official} has a gradient in the reference, {mine} has none"
                continue
            assert float(found[case]["grad_norms"][part][mine]) == pytest.approx(float(norm), rel=1e-4, abs=1e-9), name
            compared += 1
    assert compared > 250


def official_names(part: str) -> Any:
    encoder = {
        "patch_embed.proj": "tokenizer.video",
        "patch_embed_img.proj": "tokenizer.image",
        "video_mod_embed": "tokenizer.video_embed",
        "img_mod_embed": "tokenizer.image_embed",
        "norms_block": "norms",
    }
    predictor = {
        "predictor_embed": "embed",
        "predictor_blocks": "blocks",
        "predictor_norm": "norm",
        "predictor_proj_context": "context_head",
        "predictor_proj": "masked_head",
        "video_mod_embed": "modality_embeds.video",
        "img_mod_embed": "modality_embeds.image",
    }

    def rename(name: str, case: str) -> str:
        if name == "mask_tokens.0":
            return f"mask_tokens.{case}"
        for old, new in (encoder if part == "encoder" else predictor).items():
            if name == old or name.startswith(old + "."):
                return new + name[len(old) :]
        return name

    return rename


def test_a_clip_of_another_size_and_shape_within_1e_5(shared: Path) -> None:
    folder = shared / "golden" / "vjepa21_tiny"
    expected = torch.load(folder / "expected.pt", weights_only=True)["video"]
    encoder, _ = hub.import_official(folder / "checkpoint.pt", num_heads=3, predictor_num_heads=2, key="encoder")
    with torch.no_grad():
        found = encoder(expected["clip_other_size"])
    torch.testing.assert_close(found, expected["features_other_size"], atol=1e-5, rtol=0)
