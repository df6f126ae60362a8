"""The stages after the first, really trained: whose teacher is whose and never changes, and who starts from whom."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import vjepa
from launch.chain import Chain, ChainRequest, plan_chain
from launch.train import train
from vjepa.train.checkpoint import committed, load_module
from vjepa.train.run_dir import RunDir
from vjepa.train.signals import StopFlag

STAGES = ("primary", "cooldown", "distill", "distill_cooldown")
STEPS = {"primary": 2, "cooldown": 2, "distill": 2, "distill_cooldown": 1}


def trained(root: Path, stages: tuple[str, ...], steps: dict[str, int], *more: str) -> Chain:
    """A chain of debug stages, each trained in this process."""
    shards = [f"data.{modality}.sources.debug.path={root.parent / 'data'}" for modality in ("video", "image")]
    lengths = [f"{stage}.train.steps={steps[stage]}" for stage in stages]
    small = ["data.workers=0", "train.batch={video: 4, image: 4}", "mask.group={video: 4, image: 4}"]
    request = ChainRequest("debug", stages, overrides=(f"run_dir={root}", *shards, *lengths, *small, *more))
    chain = plan_chain(request, resume=False)
    for config in chain.configs.values():
        train(config, resume=False, stop=StopFlag())
    return chain


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return trained(tmp_path_factory.mktemp("stages") / "run", STAGES, STEPS)


def export(chain: Chain, stage: str) -> Path:
    return Path(chain.configs[stage].run_dir) / "exports" / stage


def weights(path: Path) -> dict[str, Tensor]:
    return vjepa.from_pretrained(path).state_dict()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("stage", "teacher"), [("cooldown", "primary"), ("distill", "primary"), ("distill_cooldown", "cooldown")]
)
def test_a_frozen_teacher_is_after_the_training_what_its_stage_exported(chain: Chain, stage: str, teacher: str) -> None:
    (_, path) = committed(RunDir(chain.configs[stage].run_dir).checkpoints)[-1]
    kept = vjepa.from_pretrained(export(chain, teacher))
    for parameter in kept.parameters():
        parameter.data.zero_()
    load_module(path, kept, "target.encoder")
    assert equal(kept.state_dict(), weights(export(chain, teacher)))
    assert not equal(weights(export(chain, stage)), weights(export(chain, teacher))), "the student did learn"


def test_what_is_exported_of_a_distillation_is_the_average(chain: Chain) -> None:
    (_, path) = committed(RunDir(chain.configs["distill"].run_dir).checkpoints)[-1]
    found = {}
    for name in ("average", "encoder"):
        encoder = vjepa.from_pretrained(export(chain, "distill"))
        load_module(path, encoder, name)
        found[name] = encoder.state_dict()
    assert equal(found["average"], weights(export(chain, "distill")))
    assert not equal(found["encoder"], found["average"])


@pytest.mark.parametrize(("stage", "start"), [("cooldown", "primary"), ("distill_cooldown", "distill")])
def test_a_student_starts_with_the_exported_weights_of_the_stage_it_follows(
    chain: Chain, stage: str, start: str, tmp_path: Path
) -> None:
    """Of no step, a stage exports what it starts from."""
    teacher = chain.configs[stage].objective.teacher.path
    given = (f"init_from={export(chain, start)}", f"objective.teacher.path={teacher}")
    alone = trained(tmp_path / "run", (stage,), {stage: 0}, *given)
    assert equal(weights(export(alone, stage)), weights(export(chain, start)))


def test_a_chain_tells_where_every_stage_comes_from(chain: Chain) -> None:
    text = "\n".join(chain.describe())
    assert f"distill: 2 steps in {chain.root / 'distill'}, frozen teacher {export(chain, 'primary')}" in text
    assert f"starts from {export(chain, 'distill')}, frozen teacher {export(chain, 'cooldown')}" in text
    assert f"starts from {export(chain, 'primary')}, its frozen teacher" in text
