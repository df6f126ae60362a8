"""Targets that are not the encoder's own average: a frozen teacher of another size, and pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vjepa
from tests.objectives.test_losses import micro_batch
from vjepa.batch import normalise
from vjepa.config import ModelConfig, PredictorSettings
from vjepa.objectives import JEPA, ObjectiveConfig, build_objective
from vjepa.objectives.checks import freeze_unused
from vjepa.objectives.config import TeacherConfig
from vjepa.objectives.targets import EmaTarget, FrozenTarget, PixelTarget
from vjepa.registry import create_encoder, model_config

SETTINGS = PredictorSettings(embed_dim=48, depth=1, num_heads=3, mask_token_std=0.02)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider and deeper than the student, with two levels."""
    encoder = create_encoder(model_config("vit_debug", embed_dim=96, depth=6, num_heads=4, levels=(2, 5)), seed=3)
    return vjepa.hub.save_pretrained(encoder, tmp_path_factory.mktemp("teacher"))


def student(target: str, teacher: dict[str, Any] | None = None, **options: Any) -> JEPA:
    config = ObjectiveConfig(target=target, teacher=TeacherConfig(**teacher or {}), **options)  # pyright: ignore[reportArgumentType]
    return build_objective(config, ModelConfig(name="vit_debug"), SETTINGS, seed=0)


def taught(path: Path, levels: list[int] | None = None) -> JEPA:
    return student("frozen", teacher={"path": str(path), "levels": levels}, terms={"masked_prediction": {}})


@pytest.mark.parametrize(("levels", "width"), [(None, 192), ([-1], 96), ([3], 96)])
def test_a_student_predicts_the_teachers_levels_whatever_its_own_width(
    teacher: Path, levels: list[int] | None, width: int
) -> None:
    objective = taught(teacher, levels)
    freeze_unused(objective, ["video", "image"])
    batch = micro_batch("video", "image")
    result = objective(batch, 0)
    result.loss.backward()
    assert result.outputs["video"].predicted[0].shape[-1] == width
    assert result.outputs["video"].num_target_levels == width // 96
    assert not [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    assert not [name for name, p in objective.named_parameters() if name.startswith("target") and p.requires_grad]


def frozen(objective: JEPA) -> FrozenTarget:
    assert isinstance(objective.target, FrozenTarget)
    return objective.target


def test_the_targets_of_a_frozen_teacher_are_those_of_an_ema_copy_of_it(teacher: Path) -> None:
    encoder = vjepa.from_pretrained(teacher)
    clips = [normalise(batch.clips) for batch in micro_batch("video", "image").values()]
    for mine, theirs in zip(frozen(taught(teacher))(clips), EmaTarget(encoder)(clips), strict=True):
        assert torch.equal(mine, theirs)
    last = frozen(taught(teacher, [-1]))(clips)[0]
    torch.testing.assert_close(last, EmaTarget(encoder)(clips)[0][..., 96:])


def test_a_teacher_never_changes_and_the_student_is_what_is_exported(teacher: Path) -> None:
    objective = taught(teacher)
    before = {name: value.clone() for name, value in frozen(objective).state_dict().items()}
    objective.update_target(0, 10)
    assert objective.momentum_at(0, 10) is None
    assert all(torch.equal(value, before[name]) for name, value in frozen(objective).state_dict().items())
    assert objective.exported is objective.encoder


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "frozen"}, "needs objective.teacher.path"),
        ({"target": "ema", "teacher": {"path": "x"}}, "is read with objective.target=frozen"),
        ({"target": "frozen", "teacher": {"path": "HERE", "levels": [2]}}, r"has levels \[3, 6\]"),
        ({"target": "frozen", "teacher": {"path": "/nowhere"}}, "/nowhere does not exist"),
        ({"target": "none"}, "objective.target=none has no predictions"),
        ({"target": "ema", "embeddings": {"sigreg": {}}, "terms": {"sigreg": {}}}, "choose a name that is no term's"),
        ({"target": "ema", "terms": {"sigreg": {"shared": "views"}}}, "is not in objective.embeddings"),
    ],
)
def test_what_does_not_go_together_is_refused(teacher: Path, options: dict[str, Any], said: str) -> None:
    if options.get("teacher", {}).get("path") == "HERE":
        options = options | {"teacher": options["teacher"] | {"path": str(teacher)}}
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        student(**options)


def test_a_teacher_on_another_grid_is_refused(teacher: Path) -> None:
    config = ObjectiveConfig(target="frozen", teacher=TeacherConfig(path=str(teacher)))
    with pytest.raises(ValueError, match="its patch_size is 16, the student's is 8"):
        build_objective(config, ModelConfig(name="vit_debug", patch_size=8), SETTINGS, seed=0)


def test_pixel_targets_are_each_tokens_own_pixels_normalised(teacher: Path) -> None:
    [batch] = micro_batch("video").values()
    clips = normalise(batch.clips)
    encoder = vjepa.create_model("vit_debug")
    [found] = PixelTarget(encoder.config)([clips])
    t, h, w = encoder.grid(clips)
    for clip, frame, row, column in ((0, 0, 0, 0), (1, t - 1, h - 1, w - 1), (0, 1, 0, 1)):
        token = (frame * h + row) * w + column
        torch.testing.assert_close(found[clip, token], _normal(_block(clips[clip], frame, row, column)))


def test_a_picture_is_repeated_to_a_tubelet(teacher: Path) -> None:
    [batch] = micro_batch("image").values()
    picture = normalise(batch.clips)
    target = PixelTarget(vjepa.create_model("vit_debug").config)
    assert torch.equal(target([picture])[0], target([picture.expand(-1, -1, 2, -1, -1)])[0])


def test_a_masked_autoencoder_trains_towards_pixels() -> None:
    objective = student("pixels", terms={"masked_prediction": {"exponent": 2.0}})
    result = objective(micro_batch("video", "image"), 0)
    result.loss.backward()
    assert result.outputs["video"].predicted[0].shape[-1] == 3 * 2 * 16 * 16
    assert objective.target_encoder is None
    assert objective.exported is objective.encoder


def _block(clip: Tensor, frame: int, row: int, column: int) -> Tensor:
    """The pixels [C * 2 * 16 * 16] of a token of a clip [C, T, H, W]."""
    return clip[:, 2 * frame : 2 * frame + 2, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16].flatten()


def _normal(pixels: Tensor) -> Tensor:
    return (pixels - pixels.mean()) / (pixels.var(correction=0) + 1e-5).sqrt()
