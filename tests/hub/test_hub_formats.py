"""Weights out and in again: our folder, Hugging Face's, ONNX; what travels beside them; the command."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vjepa
from evals.anticipation import AnticipationFeatures
from evals.models import EncoderModel, load_models
from launch.config import load_config
from launch.export import export_run
from launch.init_from import load_initial_weights
from tests.hub.released_files import CROP, DIM, FRAMES, HEADS, hugging_face_names, version_2, write
from vjepa.config import build_models
from vjepa.hub import (
    WeightsError,
    describe,
    encoder_config,
    export_hf,
    export_onnx,
    from_pretrained,
    import_hf,
    import_official,
    predictor_from_pretrained,
    save_pretrained,
)
from vjepa.hub.__main__ import main
from vjepa.hub.files import file_digest
from vjepa.hub.folder import probe_clips
from vjepa.nn.encoder import Encoder, EncoderConfig
from vjepa.objectives.jepa import JEPA
from vjepa.registry import create_encoder

HUB = Path(vjepa.hub.__file__).parent
GOLDEN_2_1 = Path(__file__).parents[1] / "golden" / "tiny_checkpoint.pt"
VERSION_2 = (
    "model.rope=tiled",
    "model.interpolate_rope=false",
    "model.image_tokenizer=false",
    "model.modality_embed=false",
    "model.levels=[-1]",
)
VERSION_2_ENCODER = EncoderConfig(
    embed_dim=24, depth=1, num_heads=2, rope="tiled", interpolate_rope=False, image_tokenizer=False,
    modality_embed=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("released"), version_2())


@pytest.fixture
def folder(released: Path, tmp_path: Path) -> Path:
    """A Hugging Face folder of the released file."""
    encoder, predictor = import_official(released)
    return export_hf(encoder, tmp_path / "hf", predictor, size=CROP, frames=FRAMES)


def same(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    return all(torch.equal(value, right.state_dict()[name]) for name, value in left.state_dict().items())


def edited(path: Path, **fields: Any) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return path.parent


def debug_run(*overrides: str) -> tuple[Any, JEPA]:
    config = load_config("debug", "primary", ["run_dir=unused", *overrides])
    return config, JEPA(config.objective, *build_models(config.model, config.predictor, seed=5))


# ------------------------------------------------------------------------------------------------------- our own folder


def test_the_card_says_where_the_weights_are_from_and_which_they_are(tmp_path: Path) -> None:
    encoder = vjepa.create_model("vit_debug", seed=3)
    trained = {"recipe": "vit_large", "steps": 12000, "size": 384, "frames": 64, "fps": 4.0, "data": ["video/a"]}
    save_pretrained(encoder, tmp_path, extra={"pretraining": trained}, licence="cc-by-4.0")
    card = (tmp_path / "README.md").read_text()
    assert file_digest(tmp_path / "model.safetensors") in card
    assert f"| Parameters | {sum(p.numel() for p in encoder.parameters()):,} |" in card
    for line in ("license: cc-by-4.0", "| Optimizer steps | 12000 |", "| Resolution of video, pixels | 384 |"):
        assert line in card
    assert "[B, 18432, 48]" in card, "the number of tokens of a clip as trained"
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (stored["size"], stored["frames"], stored["fps"], stored["image_mean"][0]) == (384, 64, 4.0, 0.485)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_fewer_bits_are_read_back_into_fp32_with_the_measured_difference(tmp_path: Path, dtype: Any) -> None:
    encoder = vjepa.create_model("vit_debug", seed=3)
    save_pretrained(encoder, tmp_path, dtype=dtype)
    again = from_pretrained(tmp_path)
    assert {value.dtype for value in again.state_dict().values()} == {torch.float32}
    assert load_file(tmp_path / "model.safetensors")["norms.0.weight"].element_size() == 2
    with torch.no_grad():
        difference = float((again(probe_clips(encoder)) - encoder(probe_clips(encoder))).abs().max())
    assert 0 < difference < 0.1
    assert (
        f"Features, {dtype} against fp32 weights | at most {difference:.2g} in one number"
        in (tmp_path / "README.md").read_text()
    )


def test_a_weight_beyond_fp16_and_an_unknown_dtype_are_refused(tmp_path: Path) -> None:
    encoder = vjepa.create_model("vit_debug")
    with pytest.raises(ValueError, match="dtype='int8' is unknown"):
        save_pretrained(encoder, tmp_path, dtype="int8")  # pyright: ignore[reportArgumentType]
    encoder.state_dict()["norms.0.weight"][3] = 1e5
    with pytest.raises(ValueError, match=r"dtype=fp16: norms\.0\.weight has values beyond"):
        save_pretrained(encoder, tmp_path, dtype="fp16")
    flat = create_encoder(VERSION_2_ENCODER)
    flat.state_dict()["blocks.0.mlp.fc1.bias"][3] = 1e5
    with pytest.raises(ValueError, match=r"dtype=fp16: encoder\.layer\.0\.mlp\.fc1\.bias has values beyond"):
        export_hf(flat, tmp_path / "hf", size=32, dtype="fp16")
    assert not (tmp_path / "hf").exists()


def test_a_2_1_file_travels_whole_predictor_and_all(tmp_path: Path) -> None:
    encoder, predictor = import_official(GOLDEN_2_1, num_heads=1, predictor_num_heads=1)
    save_pretrained(encoder, tmp_path, predictor=predictor)
    again, beside = from_pretrained(tmp_path), predictor_from_pretrained(tmp_path)
    assert again.config == encoder.config
    assert same(again, encoder)
    assert beside is not None
    assert beside.config == predictor.config
    assert same(beside, predictor)
    (tmp_path / "predictor.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        predictor_from_pretrained(tmp_path)


def test_a_run_says_its_steps_and_data_in_the_card(tmp_path: Path) -> None:
    config, objective = debug_run()
    card = (export_run(tmp_path, config, objective.encoder.state_dict(), steps=40) / "README.md").read_text()
    assert "| Recipe | debug |" in card
    assert "| Optimizer steps | 40 |" in card
    assert f"| Data | video/{next(iter(config.data.video.sources))}, image/" in card


# ----------------------------------------------------------------------------------------------- Hugging Face's folders


def test_a_folder_that_transformers_saved_is_read_in_parts_with_a_classifier_s_prefix(
    released: Path, tmp_path: Path
) -> None:
    checkpoint = torch.load(released, weights_only=True)
    parts = [
        {key.removeprefix("module.backbone."): value for key, value in checkpoint[part].items()}
        for part in ("target_encoder", "predictor")
    ]
    weights = {f"vjepa2.{name}": value.contiguous() for name, value in hugging_face_names(*parts).items()}
    weights |= {"pooler.query_tokens": torch.ones(2), "classifier.weight": torch.ones(2)}
    names = sorted(weights)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: weights[name] for name in held}, tmp_path / file)
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "vjepa2", "hidden_size": DIM, "num_hidden_layers": 4, "num_attention_heads": HEADS}
    config |= {"pred_hidden_size": 72, "pred_num_hidden_layers": 2, "crop_size": CROP}
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = import_official(released)
    encoder, predictor = import_hf(tmp_path)
    assert encoder.config == expected[0].config == encoder_config(tmp_path)
    assert predictor is not None
    assert predictor.config == expected[1].config
    assert same(encoder, expected[0])
    assert same(predictor, expected[1])
    assert f"{CROP}: transformers numbers rows" in describe(tmp_path)["crop_size"]


def test_a_folder_without_predictor_gives_none_and_what_is_missing_is_listed(released: Path, tmp_path: Path) -> None:
    folder = export_hf(from_pretrained(released), tmp_path, size=CROP)
    assert import_hf(folder)[1] is None
    assert predictor_from_pretrained(folder) is None
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.2.attention.key.bias"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"missing: blocks\.2\.attn\.qkv\.bias"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"use_rope_interleave": True}, "use_rope_interleave: a V-JEPA 2.1 model of transformers"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05"),
        ({"num_attention_heads": 5}, "48 channels do not divide"),
        ({"pred_num_attention_heads": 7}, "pred_hidden_size=72 does not divide"),
        ({"patch_size": [16, 8]}, r"patch_size=\[16, 8\] must be one number"),
        ({"model_type": "videomae"}, "model_type is 'videomae'"),
        ({"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 8}, r"vit_large .* has 16"),
    ],
)
def test_a_configuration_of_other_numbers_is_refused(folder: Path, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(WeightsError, match=told):
        from_pretrained(edited(folder / "config.json", **fields))


def test_a_2_1_encoder_is_not_written_for_transformers_and_every_reason_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="VJEPA2Model cannot hold") as caught:
        export_hf(vjepa.create_model("vit_debug"), tmp_path / "hf")
    for reason in (
        "rope='interleaved'",
        "interpolate_rope=True",
        "image_tokenizer=True",
        "levels=",
        "has no V-JEPA 2.1",
    ):
        assert reason in str(caught.value)
    assert not (tmp_path / "hf").exists()


def test_the_hidden_width_survives_that_transformers_rounds_down(tmp_path: Path) -> None:
    """int(88 * (120 / 88)) is 119."""
    config = EncoderConfig(
        embed_dim=88, depth=1, num_heads=4, mlp_ratio=120 / 88, rope="tiled", interpolate_rope=False,
        image_tokenizer=False, modality_embed=False,
    )  # fmt: skip
    encoder = create_encoder(config)
    folder = export_hf(encoder, tmp_path, size=32)
    stored = json.loads((folder / "config.json").read_text())
    assert int(stored["hidden_size"] * stored["mlp_ratio"]) == 120
    assert same(from_pretrained(folder), encoder)


def test_weights_of_another_rope_or_other_levels_do_not_begin_a_run(released: Path) -> None:
    _, objective = debug_run("model.image_tokenizer=false", "model.modality_embed=false", "model.levels=[-1]")
    with pytest.raises(WeightsError, match=r"model\.rope=interleaved here, tiled there; model\.interpolate_rope=True"):
        load_initial_weights(objective, released)


# ----------------------------------------------------------------------------------------------------------------- ONNX


@pytest.fixture(scope="module")
def small() -> Encoder:
    config = EncoderConfig(embed_dim=24, depth=1, num_heads=2, patch_size=8)
    return create_encoder(config, weight_std=0.3)


def test_onnx_has_the_encoder_s_numbers_for_video_and_for_images(small: Encoder, tmp_path: Path) -> None:
    for name, frames, count in (("video", 4, 18), ("image", 1, 9)):
        path = tmp_path / f"{name}.onnx"
        report = export_onnx(small, path, frames=frames, size=24)
        assert report == json.loads((tmp_path / f"{name}.parity.json").read_text())
        assert (report["modality"], report["passed"]) == (name, True)
        assert report["max_abs_difference"] <= 1e-4 < report["largest_feature"]
        assert report["tokens"] == [[1, count, 24], [3, count, 24]], "any number of clips"
        assert report["sha256"][path.name] == file_digest(path)


def test_an_onnx_file_of_other_numbers_is_an_error_with_the_figure(
    small: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(path: Path, clips: Tensor) -> Tensor:
        return small(clips).detach() + 2e-4

    monkeypatch.setattr("vjepa.hub.onnx_export._write", lambda *_: None)
    monkeypatch.setattr("vjepa.hub.onnx_export._run", other)
    with pytest.raises(ValueError, match=r"differs from the encoder by 0\.0002"):
        export_onnx(small, tmp_path / "a.onnx", frames=2, size=16)
    assert json.loads((tmp_path / "a.parity.json").read_text())["passed"] is False


def test_a_missing_package_is_named_with_the_command(
    small: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"needs onnxscript.*pip install onnx onnxruntime onnxscript"):
        export_onnx(small, tmp_path / "a.onnx", frames=2, size=16)


@pytest.mark.parametrize("path", sorted(HUB.glob("*.py")), ids=lambda path: path.stem)
def test_what_is_optional_is_imported_only_where_it_is_used(path: Path) -> None:
    """Training imports vjepa.hub on every rank: transformers and ONNX's packages must not come with it."""
    tree = ast.parse(path.read_text())
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert names, "nothing was found: the test would check nothing"
    assert not {name.split(".")[0] for name in names} & {"transformers", "onnx", "onnxruntime", "onnxscript"}


# ----------------------------------------------------------------------------------------------- the command, and evals


def test_the_command_tells_and_exports(released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(released)]) == 0
    assert "layout of V-JEPA 2\n" in capsys.readouterr().out
    out = tmp_path / "ours"
    assert main(["export", str(released), str(out), "--dtype", "bf16", "--licence", "mit"]) == 0
    assert "license: mit" in (out / "README.md").read_text()
    assert same(from_pretrained(out), from_pretrained(released)) is False, "bf16"
    assert predictor_from_pretrained(out) is not None
    assert main(["export", str(out), str(tmp_path / "hf"), "--format", "hf", "--size", str(CROP)]) == 0
    assert "transformers' features and predictions differ by at most" in capsys.readouterr().out
    assert same(from_pretrained(tmp_path / "hf"), from_pretrained(out))
    assert main(["export", str(GOLDEN_2_1), str(out), "--format", "hf"]) == 2
    assert "give num_heads" in capsys.readouterr().err
    assert main(["info", str(tmp_path)]) == 2
    assert "holds no config.json" in capsys.readouterr().err


def test_options_of_another_format_are_refused_by_name(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, told in (
        (("--format", "onnx", "--dtype", "fp16"), "--dtype fp16: ONNX files are written in fp32"),
        (("--format", "hf", "--licence", "mit"), "--licence belongs to --format safetensors, not hf"),
        (("--opset", "20"), "--opset belongs to --format onnx, not safetensors"),
    ):
        assert main(["export", str(released), str(tmp_path / "out"), *options]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_evaluations_take_version_2_files_and_folders(released: Path, folder: Path) -> None:
    for path in (released, folder):
        model = load_models([str(path)])[0]
        assert isinstance(model, EncoderModel)
        assert model.encoder.config.rope == "tiled"
        assert model.predictor is not None
        clips = torch.zeros(1, 3, 4, 32, 32, dtype=torch.uint8)
        assert model.last().tokens(clips).shape == (1, 2, 2, 2, DIM)
        future = AnticipationFeatures("ours", model.encoder, model.predictor, fps=2.0)
        assert future.tokens(clips, torch.ones(1)).shape == (1, 8 + 4, DIM)
