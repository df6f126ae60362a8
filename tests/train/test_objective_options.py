"""Every way to prevent collapse is a named option over any recipe, and trains."""

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import vjepa
from launch.config import RECIPES, load_config
from tests.objectives.every_objective import LOCAL, OBJECTIVES, options, overrides, save_teacher
from tests.objectives.test_losses import micro_batch
from tests.train.ranks import on_ranks, train_debug
from tests.train.test_trainer import DebugRun, numbers, rows
from vjepa.config import ConfigError, ModelConfig, PredictorSettings, build_models
from vjepa.objectives import JEPA, ObjectiveConfig

OPTIONS = [name for name in OBJECTIVES if options(name)]


@pytest.mark.parametrize("option", OPTIONS)
def test_an_objective_trains_twenty_steps(option: str, teacher: Path, debug_run: DebugRun, tmp_path: Path) -> None:
    found = rows(debug_run(tmp_path / "run", "train.steps=20", *overrides(option, teacher), options=[option]))
    assert [row["step"] for row in found] == list(range(1, 21))
    assert all(math.isfinite(value) for row in found for value in row.values())
    assert found[-1]["loss"] < found[0]["loss"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_says_what_it_is_and_when_to_choose_it(option: str) -> None:
    text = (RECIPES / "options" / f"{option}.yaml").read_text()
    assert "arXiv" in text
    assert "When to choose it" in text


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("option", "mode", "micro_batch"), [("sigreg", "ddp", 6), ("vicreg", "fsdp", 6), ("sigreg", "fsdp", 2)]
)
def test_two_ranks_have_the_statistics_of_one_process(
    option: str, mode: str, micro_batch: int, alone: dict[str, Path], debug_shards: Path, tmp_path: Path
) -> None:
    sizes = [f"train.micro_batch.{modality}={micro_batch}" for modality in ("video", "image")]
    arguments = ("train.steps=20", f"train.parallel.mode={mode}", *sizes, "--option", option)
    on_ranks(2, train_debug, tmp_path / "run", debug_shards, *arguments)
    found, wanted = rows(tmp_path / "run"), rows(alone[option])
    assert found[0]["grad_norm"] == pytest.approx(wanted[0]["grad_norm"], rel=1e-5)
    for mine, theirs in zip(found, wanted, strict=True):
        # Batch normalisation over twelve clips amplifies what the order of a sum leaves: equal at first, then close.
        rel = 2e-6 if mine["step"] <= 5 else 1e-3
        for name in [name for name in theirs if name.startswith("loss")]:
            assert mine[name] == pytest.approx(theirs[name], rel=rel), f"{name} at step {mine['step']}"


@pytest.fixture(scope="module")
def alone(debug_run: DebugRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of one process, by option."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: debug_run(folder / name, "train.steps=20", options=[name]) for name in ("sigreg", "vicreg")}


@pytest.mark.parametrize("option", ["sigreg", "vicreg", "lejepa"])
def test_a_batch_in_parts_has_the_statistics_of_the_whole(
    option: str, teacher: Path, debug_run: DebugRun, tmp_path: Path
) -> None:
    more = ("train.steps=5", *overrides(option, teacher))
    wanted = rows(debug_run(tmp_path / "whole", *more, options=[option]))
    parts = ("train.micro_batch.video=3", "train.micro_batch.image=3")
    found = rows(debug_run(tmp_path / "parts", *more, *parts, options=[option]))
    assert found[0]["grad_norm"] == pytest.approx(wanted[0]["grad_norm"], rel=1e-5)
    for mine, theirs in zip(found, wanted, strict=True):
        for name in [name for name in theirs if name.startswith(("loss", "effective_weight"))]:
            assert mine[name] == pytest.approx(theirs[name], rel=2e-5), f"{name} at step {mine['step']}"


def test_views_that_are_not_there_are_refused_before_a_run() -> None:
    config = load_config("debug", "primary", ["run_dir=unused", *LOCAL, "data.video.clip.views=1"], options=["lejepa"])
    alone = replace(config.data.video.clip, views=1, local=replace(config.data.video.clip.local, views=0))
    data = replace(config.data, video=replace(config.data.video, clip=alone))
    with pytest.raises(ConfigError, match=r"invariance compares views of a clip, and data\.video\.clip has one"):
        replace(config, data=data).check(needs_sources=False)


def test_a_projector_is_saved_loaded_and_part_of_no_export(debug_run: DebugRun, tmp_path: Path) -> None:
    whole = debug_run(tmp_path / "whole", "train.steps=10", options=["sigreg"])
    run = debug_run(tmp_path / "run", "train.steps=10", options=["sigreg"])
    (run / "checkpoints" / "step_00000010").rename(tmp_path / "aside")
    debug_run(run, "train.steps=10", options=["sigreg"], resume=True)
    assert numbers(run) == numbers(whole)
    assert not [name for name in vjepa.from_pretrained(run / "exports" / "primary").state_dict() if "heads" in name]


@pytest.mark.parametrize(
    ("embedding", "said"),
    [
        ({"pool": "step"}, "needs embedding.of=whole"),
        ({"levels": [5]}, "the encoder has 4 supervised levels"),
        ({"projector": 0}, "must be at least 1"),
    ],
)
def test_embeddings_that_are_not_there_are_refused(embedding: dict[str, Any], said: str) -> None:
    settings = PredictorSettings(embed_dim=48, depth=1, num_heads=3)
    models = build_models(ModelConfig(name="vit_debug"), settings, seed=0, device="meta")
    with pytest.raises(ValueError, match=said):
        JEPA(ObjectiveConfig(target="online", terms={"sigreg": {"embedding": embedding}}), *models)


def test_every_level_can_carry_its_own_statistics() -> None:
    settings = PredictorSettings(embed_dim=48, depth=1, num_heads=3)
    models = build_models(ModelConfig(name="vit_debug"), settings, seed=0)
    terms = {"sigreg": {"embedding": {"of": "context", "levels": [1, 3], "projector": 8, "hidden_dim": 16}}}
    objective = JEPA(ObjectiveConfig(terms=terms), *models)
    batch = micro_batch("video")
    result = objective(batch, 0)
    result.loss.backward()
    reached = {name for name, p in objective.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert "encoder.norms.0.weight" in reached
    assert "encoder.norms.2.weight" in reached
    assert not {"encoder.norms.1.weight", "encoder.norms.3.weight"} & reached
    assert {f"heads.sigreg.embeddings.projectors.{i}.fc2.weight" for i in (0, 1)} <= reached


def test_vjepa2_supervises_the_last_block_of_whatever_depth() -> None:
    for recipe, depth in (("debug", 4), ("vit_large", 24), ("vit_gigantic", 48)):
        config = load_config(recipe, "primary", ["run_dir=unused"], options=["vjepa2"])
        assert config.model.encoder_config().levels == (depth - 1,)
        assert [name for name, term in config.objective.terms.items() if term is not None] == ["masked_prediction"]


@pytest.mark.parametrize(("momentum", "is_warned"), [(0.9, True), (0.99999, True), (0.99, False), (0.99925, False)])
def test_a_momentum_outside_the_known_range_is_warned_of(
    momentum: float, is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        ObjectiveConfig(momentum=momentum)
        ObjectiveConfig(momentum=0.996, momentum_end=1.0)  # I-JEPA's ramp ends there
    assert bool(caplog.records) is is_warned
