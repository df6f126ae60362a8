"""Weights through every door, one after another: import, a run of no step, export, from_pretrained, transformers, ONNX.

The truth is never ours: for V-JEPA 2 it is transformers' class, filled by a conversion that is written down apart from
the code under test; for V-JEPA 2.1, which transformers 5.24 does not have, it is the reference's golden values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launch.config import RunConfig, load_config
from launch.train import train
from tests.hub.released_files import (
    CROP,
    DIM,
    FRAMES,
    transformers_model,
    version_2,
    version_2_encoder,
    version_2_predictor,
    write,
)
from vjepa.hub import (
    compare_with_transformers,
    describe,
    export_hf,
    export_onnx,
    from_pretrained,
    import_official,
    predictor_from_pretrained,
    save_pretrained,
)
from vjepa.hub.__main__ import main
from vjepa.registry import create_predictor
from vjepa.train.signals import StopFlag

VERSION_2 = (
    "model.rope=tiled",
    "model.interpolate_rope=false",
    "model.image_tokenizer=false",
    "model.modality_embed=false",
    "predictor.embed_dim=72",
    "predictor.num_heads=12",
)
GOLDEN_2_1 = (
    *("model.embed_dim=48", "model.depth=12", "model.num_heads=3", "model.levels=[3,6,9,12]"),
    *("predictor.embed_dim=24", "predictor.depth=12", "predictor.num_heads=2"),
)


def untrained_run(folder: Path, *overrides: str, options: tuple[str, ...] = ()) -> RunConfig:
    """A run of no step: what it would start from is exported."""
    asked = [f"run_dir={folder}", "train.steps=0", "data.workers=0", *overrides]
    config = load_config("debug", "primary", asked, options=options)
    train(config, resume=False, stop=StopFlag())
    return config


@dataclass(frozen=True)
class Chain:
    """A V-JEPA 2 file, the run that began with it, and what transformers makes of the file."""

    released: Path
    export: Path
    clips: Tensor
    theirs: nn.Module


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    released = write(folder, version_2())
    untrained_run(folder / "run", f"init_from={released}", *VERSION_2, options=("vjepa2",))
    theirs = transformers_model(version_2_encoder(2), version_2_predictor(3))
    clips = torch.randn(2, 3, FRAMES, CROP, CROP, generator=torch.Generator().manual_seed(0))
    return Chain(released, folder / "run" / "exports" / "primary", clips, theirs)


def close(mine: Tensor, other: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(mine, other, atol=atol, rtol=0)


def features_of(model: Any, clips: Tensor) -> Tensor:
    return model(clips.transpose(1, 2), skip_predictor=True).last_hidden_state


# ----------------------------------------------------------------------------------------------- V-JEPA 2, every door


@torch.no_grad()
def test_a_released_file_through_a_run_of_no_step_is_transformers_own_numbers(chain: Chain, tmp_path: Path) -> None:
    from transformers import VJEPA2Model

    truth = features_of(chain.theirs, chain.clips)
    ours = from_pretrained(chain.export)
    close(ours(chain.clips), truth)
    predictor = predictor_from_pretrained(chain.export)
    folder = export_hf(ours, tmp_path / "hf", predictor, size=CROP, frames=FRAMES)
    close(features_of(VJEPA2Model.from_pretrained(str(folder)).eval(), chain.clips), truth)
    close(from_pretrained(folder)(chain.clips), truth)
    report = export_onnx(ours, tmp_path / "video.onnx", frames=FRAMES, size=CROP)
    assert report["passed"]
    close(onnx_tokens(tmp_path / "video.onnx", chain.clips), truth, atol=1e-4)


@torch.no_grad()
def test_a_run_s_own_predictor_gives_its_numbers_in_transformers(chain: Chain, tmp_path: Path) -> None:
    """With a trained predictor's spread of weights, that a wrong one would show."""
    from transformers import VJEPA2Model

    ours, predictor = from_pretrained(chain.export), predictor_from_pretrained(chain.export)
    assert predictor is not None
    assert not predictor.config.context_head, "no term of V-JEPA 2 trains it"
    generator = torch.Generator().manual_seed(1)
    for parameter in predictor.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.25)
    folder = export_hf(ours, tmp_path / "hf", predictor, size=CROP, frames=FRAMES)
    assert compare_with_transformers(ours, folder, predictor) < 1e-5
    another = create_predictor(predictor.config, weight_std=0.25)
    assert compare_with_transformers(ours, folder, another) > 0.1, "a wrong one shows"
    theirs = VJEPA2Model.from_pretrained(str(folder)).eval()
    order = torch.stack([torch.randperm(64, generator=generator) for _ in chain.clips])
    context, masked = order[:, :20].sort().values, order[:, 20:45].sort().values
    output = theirs(chain.clips.transpose(1, 2), context_mask=[context], target_mask=[masked])
    tokens = ours(chain.clips).gather(1, context[:, :, None].expand(-1, -1, DIM))
    predicted, _ = predictor(tokens, context=context, masked=masked, grid=(4, 4, 4), modality="video")
    close(output.predictor_output.last_hidden_state, predicted)


def onnx_tokens(path: Path, clips: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["tokens"], {"clips": clips.numpy()})[0])


# --------------------------------------------------------------------------------------- V-JEPA 2.1, the golden values


@dataclass(frozen=True)
class Golden:
    """What the reference's checkpoint gives, and the export of the run that began with it."""

    expected: dict[str, Any]
    export: Path


@pytest.fixture(scope="module")
def golden(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    source, folder = shared / "golden" / "vjepa21_tiny", tmp_path_factory.mktemp("golden")
    encoder, predictor = import_official(
        source / "checkpoint.pt", key="encoder", num_heads=3, predictor_num_heads=2
    )  # head counts are not in the weights: our folder says them to the run
    imported = save_pretrained(encoder, folder / "imported", predictor=predictor)
    untrained_run(folder / "run", f"init_from={imported}", "init_predictor=true", *GOLDEN_2_1)
    expected = torch.load(source / "expected.pt", weights_only=True)
    return Golden(expected, folder / "run" / "exports" / "primary")


@torch.no_grad()
@pytest.mark.parametrize("case", ["video", "image"])
def test_golden_features_after_import_a_run_of_no_step_and_export(golden: Golden, case: str) -> None:
    known = golden.expected[case]
    close(from_pretrained(golden.export)(known["clip"]), known["features"])


@torch.no_grad()
def test_golden_features_after_onnx_within_1e_4(golden: Golden, tmp_path: Path) -> None:
    """Of video; an image's file is compared in test_hub_formats.py, with an encoder that traces faster."""
    known, path = golden.expected["video"], tmp_path / "video.onnx"
    export_onnx(from_pretrained(golden.export), path, frames=known["clip"].shape[2], size=known["clip"].shape[-1])
    close(onnx_tokens(path, known["clip"]), known["features"], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("case", ["video", "image"])
def test_golden_predictions_after_import_a_run_of_no_step_and_export(golden: Golden, case: Any) -> None:
    predictor, known = predictor_from_pretrained(golden.export), golden.expected[case]
    assert predictor is not None
    grid = from_pretrained(golden.export).grid(known["clip"])
    fields = ("context", "masks_context", "masks_target", "predicted_targets", "predicted_context")
    for tokens, context, masked, wanted, at_context in zip(*(known[field] for field in fields), strict=True):
        predicted, visible = predictor(tokens, context=context, masked=masked, grid=grid, modality=case)
        close(predicted, wanted)
        assert visible is not None
        close(visible, at_context)


def test_transformers_is_refused_the_golden_model_for_lack_of_2_1(golden: Golden, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"installed transformers .* V-JEPA 2\.1"):
        export_hf(from_pretrained(golden.export), tmp_path / "hf")


# ------------------------------------------------------------------------------------------------ the run's own folder


def test_a_run_of_no_step_exports_what_it_would_start_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vjepa.objectives import build_objective

    config = untrained_run(tmp_path / "run")
    assert "done: 0 steps; " in capsys.readouterr().out
    export = tmp_path / "run" / "exports" / "primary"
    start = build_objective(config.objective, config.model, config.predictor, seed=config.train.seed)
    predictor = predictor_from_pretrained(export)
    assert predictor is not None
    for found, wanted in ((from_pretrained(export), start.encoder), (predictor, start.predictor)):
        assert wanted is not None
        assert found.config == wanted.config
        assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in found.state_dict().items())
    assert "87,264 parameters, 48 wide, 2 blocks" in describe(export)["predictor"]
    assert '"final_loss": null' in (tmp_path / "run" / "summary.json").read_text()


def test_fewer_than_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.steps=-1 must be at least 0"):
        load_config("debug", "primary", ["run_dir=unused", "train.steps=-1"])


def test_the_predictor_stays_out_of_what_transformers_cannot_hold_if_asked(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A student's predictor gives the teacher's channels: VJEPA2Model cannot hold it, the encoder it can."""
    student, teachers = from_pretrained(chain.export), predictor_from_pretrained(chain.export)
    assert teachers is not None
    wide = create_predictor(replace(teachers.config, target_dim=40))
    save_pretrained(student, tmp_path / "student", predictor=wide)
    command = ["export", str(tmp_path / "student"), str(tmp_path / "hf"), "--format", "hf", "--size", str(CROP)]
    assert main(command) == 2
    assert "the predictor's target_dim=40" in capsys.readouterr().err
    assert main([*command, "--no-predictor"]) == 0
    assert predictor_from_pretrained(tmp_path / "hf") is None
