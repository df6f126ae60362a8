"""The average of a student beside a target that is none, and a frozen teacher's weights in bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vjepa
from tests.objectives.test_losses import micro_batch
from tests.objectives.test_targets import SETTINGS
from vjepa.batch import normalise
from vjepa.config import ModelConfig
from vjepa.objectives import JEPA, ObjectiveConfig, build_objective
from vjepa.objectives.build import load_teacher
from vjepa.objectives.checks import freeze_unused
from vjepa.objectives.config import TeacherConfig
from vjepa.registry import create_encoder, model_config
from vjepa.train.optim import OptimConfig, build_optimizer

MOMENTUM = 0.9
ONE_TERM: dict[str, Any] = {"masked_prediction": {}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider and deeper than the student; no weight is one that bf16 has exactly, norms and biases neither."""
    encoder = create_encoder(model_config("vit_debug", embed_dim=96, depth=6, num_heads=4, levels=(2, 5)), seed=3)
    generator = torch.Generator().manual_seed(4)
    for parameter in encoder.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return vjepa.hub.save_pretrained(encoder, tmp_path_factory.mktemp("teacher"))


def distilled(teacher: Path, precision: Any = "fp32", average: float | None = MOMENTUM, device: Any = None) -> JEPA:
    config = ObjectiveConfig(
        target="frozen", average=average, teacher=TeacherConfig(str(teacher), precision=precision), terms=ONE_TERM
    )
    return build_objective(config, ModelConfig(name="vit_debug"), SETTINGS, seed=0, device=device)


def copies(module: torch.nn.Module | None) -> dict[str, Tensor]:
    assert module is not None
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    assert [name for name, value in found.items() if not torch.equal(value, wanted[name])] == []


def train(objective: JEPA, steps: int) -> list[dict[str, Tensor]]:
    """The encoder's weights after each step."""
    freeze_unused(objective, ["video", "image"])
    optimizer = build_optimizer(objective, OptimConfig())
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    seen = []
    for step in range(steps):
        objective(micro_batch("video", "image"), step).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.update_target(step, steps)
        seen.append(copies(objective.encoder))
    return seen


def test_the_average_of_some_steps_is_that_of_the_formula(teacher: Path) -> None:
    objective = distilled(teacher)
    by_hand = {name: value.double() for name, value in copies(objective.encoder).items()}
    for weights in train(objective, steps=4):
        by_hand = {name: MOMENTUM * mean + (1 - MOMENTUM) * weights[name].double() for name, mean in by_hand.items()}
    found = copies(objective.average)
    for name, mean in by_hand.items():
        torch.testing.assert_close(found[name].double(), mean, rtol=1e-5, atol=1e-7)
    name = "blocks.0.mlp.fc1.weight"
    assert (found[name] - copies(objective.encoder)[name]).abs().max() > 1e-3, "it is not the encoder"


def test_training_leaves_the_teacher_and_an_average_leaves_training(teacher: Path) -> None:
    with_one, without = distilled(teacher), distilled(teacher, average=None)
    before = copies(with_one.target)
    losses = train(with_one, 3)[-1], train(without, 3)[-1]
    assert_equal(*losses)
    assert_equal(copies(with_one.target), before)
    for module in (with_one.target, with_one.average):
        assert module is not None
        assert not any(p.requires_grad or p.grad is not None for p in module.parameters())


def test_the_average_begins_as_the_encoder_and_is_the_export(teacher: Path) -> None:
    objective = distilled(teacher, device="meta")
    objective.to_empty(device="cpu")
    objective.initialise(seed=1)
    load_teacher(objective)
    assert_equal(copies(objective.average), copies(objective.encoder))
    assert objective.exported is objective.average
    assert objective.get_submodule(objective.config.exported) is objective.average
    assert distilled(teacher, average=None).config.exported == "encoder"
    assert ObjectiveConfig().exported == "target.encoder"


@pytest.mark.parametrize("target", ["online", "pixels"])
def test_other_targets_may_have_an_average_too(target: Any) -> None:
    config = ObjectiveConfig(target=target, average=MOMENTUM, terms=ONE_TERM)
    objective = build_objective(config, ModelConfig(name="vit_debug"), SETTINGS, seed=0)
    assert objective.exported is objective.average


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"target": "ema", "average": 0.99}, "objective.average=0.99 is not for target=ema"),
        ({"target": "pixels", "average": 1.0}, "at least 0 and below 1; with 1 it would never move"),
    ],
)
def test_an_average_that_means_nothing_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ObjectiveConfig(**options)


def bytes_of(objective: JEPA) -> int:
    assert objective.target is not None
    return sum(p.numel() * p.element_size() for p in objective.target.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_a_teacher_in_bf16_has_half_the_bytes_and_nearly_the_targets(teacher: Path, autocast: bool) -> None:
    """Of targets with a variance of 1 the root of the mean squared difference is below 0.02 (measured 0.006)."""
    exact, held = distilled(teacher), distilled(teacher, "bf16")
    assert bytes_of(held) * 2 == bytes_of(exact)
    clips = [normalise(batch.clips) for batch in micro_batch("video", "image").values()]
    assert exact.target is not None
    assert held.target is not None
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        pairs = list(zip(held.target(clips), exact.target(clips), strict=True))
    for mine, theirs in pairs:
        assert mine.dtype == torch.float32
        difference = (mine - theirs).square().mean().sqrt().item()
        print(f"autocast {autocast}: {difference:.4f}")
        assert 0 < difference < 0.02


def test_a_student_of_a_teacher_in_bf16_trains_and_the_teacher_stays(teacher: Path) -> None:
    objective = distilled(teacher, "bf16", device="meta")
    objective.to_empty(device="cpu")
    objective.initialise(seed=0)
    load_teacher(objective)
    before = copies(objective.target)
    assert_equal(before, copies(distilled(teacher, "bf16").target))
    train(objective, 2)
    assert_equal(copies(objective.target), before)
