"""Distillation as a run: a student of another size than its frozen teacher, whose average is what the run gives."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import vjepa
from launch.config import load_for_resume
from launch.evaluate import TRAINED, Job, _encoder
from tests.objectives.test_average import assert_equal
from tests.train.elastic import digest, witness
from tests.train.ranks import on_ranks
from tests.train.test_health import SKIP, Poison
from tests.train.test_two_ranks import assert_equal_runs, rows
from vjepa.nn.encoder import Encoder
from vjepa.registry import create_encoder, model_config
from vjepa.train import checkpoint

SETTINGS = (
    "train.steps=20",
    "predictor.depth=2",
    "objective.average=0.9",
    "objective.terms.context_prediction=null",
)
BF16 = "objective.teacher.precision=bf16"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    encoder = create_encoder(model_config("vit_debug", embed_dim=96, depth=6, num_heads=4, levels=(2, 5)), seed=3)
    return vjepa.hub.save_pretrained(encoder, tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def settings(teacher: Path) -> tuple[str, ...]:
    return (*SETTINGS, f"objective.teacher.path={teacher}")


@pytest.fixture(scope="module")
def distilled(
    debug_run: Callable[..., Path], settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return debug_run(tmp_path_factory.mktemp("distilled") / "run", *settings, options=["distill"])


@pytest.fixture(scope="module")
def held_in_bf16(
    debug_run: Callable[..., Path], settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return debug_run(tmp_path_factory.mktemp("bf16") / "run", *settings, BF16, options=["distill"])


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run)]


def stored(run: Path, step: int, name: str, like: Encoder) -> dict[str, Tensor]:
    """One encoder in a checkpoint of a run."""
    found = Encoder(like.config)
    checkpoint.load_module(checkpoint.checkpoint_path(run / "checkpoints", step), found, name)
    return found.state_dict()


def exported(run: Path) -> Encoder:
    return vjepa.from_pretrained(run / "exports/primary")


def test_the_teacher_is_in_every_checkpoint_as_it_was(distilled: Path, teacher: Path) -> None:
    read = vjepa.from_pretrained(teacher)
    wanted = digest(read.state_dict())
    for step in (5, 20):
        assert digest(stored(distilled, step, "target.encoder", read)) == wanted


def test_the_export_and_what_is_evaluated_of_a_checkpoint_is_the_average(distilled: Path) -> None:
    student = exported(distilled)
    assert_equal(student.state_dict(), stored(distilled, 20, "average", student))
    trained = stored(distilled, 20, "encoder", student)
    assert digest(trained) != digest(student.state_dict())
    config = load_for_resume(distilled / "config.yaml", [])
    for step in (5, 20):
        job = Job(distilled, "motion", TRAINED, step, None)  # pyright: ignore[reportArgumentType]
        assert_equal(_encoder(job, config).state_dict(), stored(distilled, step, "average", student))


def test_a_resumed_run_has_the_average_of_the_one_that_was_not_interrupted(
    distilled: Path, debug_run: Callable[..., Path], settings: tuple[str, ...], tmp_path: Path
) -> None:
    again = tmp_path / "run"
    shutil.copytree(distilled, again)
    shutil.rmtree(again / "exports")
    for step in (15, 20):
        shutil.rmtree(checkpoint.checkpoint_path(again / "checkpoints", step))
    debug_run(again, *settings, options=["distill"], resume=True)
    student = exported(distilled)
    assert_equal(exported(again).state_dict(), student.state_dict())
    assert_equal(stored(again, 20, "encoder", student), stored(distilled, 20, "encoder", student))
    assert losses(again) == losses(distilled)


def test_a_run_that_had_no_average_is_not_resumed_with_one(
    debug_run: Callable[..., Path], settings: tuple[str, ...], tmp_path: Path
) -> None:
    short = ("train.steps=2", "train.checkpoint.every=1")
    run = debug_run(tmp_path / "run", *settings, *short, "objective.average=null", options=["distill"])
    shutil.rmtree(checkpoint.checkpoint_path(run / "checkpoints", 2))
    with pytest.raises(checkpoint.CheckpointError, match=r"missing in the checkpoint: model\.average\."):
        debug_run(run, *settings, *short, options=["distill"], resume=True)


def test_a_skipped_step_leaves_the_average(
    debug_run: Callable[..., Path], settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Poison(monkeypatch, {2: float("nan")})  # the third step
    every = ("train.steps=4", "train.checkpoint.every=1", "train.checkpoint.keep=9")
    run = debug_run(tmp_path / "run", *settings, *every, SKIP, options=["distill"])
    student = exported(run)
    second, third, fourth = (digest(stored(run, step, "average", student)) for step in (2, 3, 4))
    assert second == third
    assert third != fourth


@pytest.mark.distributed
@pytest.mark.parametrize(
    "spread",
    [
        (),
        ("train.parallel.mode=fsdp", BF16),
    ],
    ids=["ddp", "fsdp, teacher in bf16"],
)
def test_two_ranks_give_the_average_of_one_process(
    spread: tuple[str, ...],
    distilled: Path,
    held_in_bf16: Path,
    debug_shards: Path,
    settings: tuple[str, ...],
    tmp_path: Path,
) -> None:
    alone = held_in_bf16 if BF16 in spread else distilled
    ranks = on_ranks(2, witness, tmp_path / "run", debug_shards, "--option", "distill", *settings, *spread)
    assert_equal_runs(tmp_path / "run", alone)
    whole = _numbers(exported(alone))
    assert sum(rank.held for rank in ranks) == (whole if spread else 2 * whole)


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_a_run_with_a_teacher_in_bf16_follows_one_in_fp32(distilled: Path, held_in_bf16: Path) -> None:
    assert losses(held_in_bf16) == pytest.approx(losses(distilled), rel=5e-4)  # measured: 8e-5
    assert losses(held_in_bf16) != losses(distilled)
    reader = FileSystemReader(checkpoint.checkpoint_path(held_in_bf16 / "checkpoints", 20) / "dcp")
    entries = reader.read_metadata().state_dict_metadata.items()
    dtypes = {name: entry.properties.dtype for name, entry in entries if isinstance(entry, TensorStorageMetadata)}
    of_teacher = {dtype for name, dtype in dtypes.items() if name.startswith("model.target.")}
    others = {dtype for name, dtype in dtypes.items() if name.startswith("model.") and ".target." not in name}
    assert (of_teacher, others) == ({torch.bfloat16}, {torch.float32})
