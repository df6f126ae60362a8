"""Every objective has on two ranks the loss and the gradient of one process, whatever is built first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.config import RECIPES
from tests.objectives.every_objective import OBJECTIVES, Case, Found, Mode, alone, save_teacher, together
from tests.train.ranks import on_ranks

WAYS: tuple[tuple[Mode, bool], ...] = (("ddp", False), ("ddp", True), ("fsdp", False))
CASES = [Case(name, mode, early) for name in OBJECTIVES for mode, early in WAYS]
NOT_OBJECTIVES = {
    "paper_batch",
    "prefix_masks",
    "real_clips",
    "videomix22m",
    "visionmix",
    # of the stages after the first
    "continue",
    "cooldown_256",
    "ema_cooldown",
    "vjepa2_weights",
}  # options over data and masks


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def of_one_process(teacher: Path) -> dict[str, Found]:
    return {name: alone(name, teacher) for name in OBJECTIVES}


@pytest.fixture(scope="module")
def of_two_ranks(teacher: Path) -> dict[Case, Found]:
    [first, second] = on_ranks(2, together, CASES, teacher)
    for mine, theirs in zip(first, second, strict=True):
        assert mine.loss == theirs.loss
        assert torch.equal(mine.gradient, theirs.gradient)
    return dict(zip(CASES, first, strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_have_the_loss_and_the_gradient_of_one_process(
    case: Case, of_one_process: dict[str, Found], of_two_ranks: dict[Case, Found]
) -> None:
    found, wanted = of_two_ranks[case], of_one_process[case.objective]
    assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
    assert (found.gradient.norm() / wanted.gradient.norm()).item() == pytest.approx(1, abs=1e-5)
    cosine = torch.nn.functional.cosine_similarity(found.gradient.double(), wanted.gradient.double(), dim=0)
    assert cosine.item() == pytest.approx(1, abs=1e-8)


def test_every_option_that_is_an_objective_is_listed() -> None:
    names = {path.stem for path in (RECIPES / "options").glob("*.yaml")}
    assert names - NOT_OBJECTIVES == set(OBJECTIVES) - {"v-jepa-2.1"}
