"""Losses over a batch that lies on two ranks are those of one process, in value and in averaged gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.objectives.two_ranks import LOSSES, UNEVEN, Case, Found, alone, together
from tests.train.ranks import on_ranks

pytestmark = pytest.mark.distributed

PROJECTED = [Case(loss, projector=True) for loss in ("sigreg", "visreg", "share_of_sum", "different_on_each_rank")]
PLAIN = [Case(loss) for loss in LOSSES]
CASES = [
    *PLAIN,
    *PROJECTED,
    *(replace(case, mode="fsdp") for case in [*PLAIN, *PROJECTED]),
    *(Case(loss, rows=UNEVEN) for loss in ("sigreg", "sigreg_none", "epps_pulley", "share_of_sum")),
    *(Case(loss, rows=UNEVEN, projector=True) for loss in ("sigreg", "share_of_sum")),
    *(Case(loss, built_before_the_group=True, projector=True) for loss in ("sigreg", "visreg")),
]


@pytest.fixture(scope="module")
def ranks() -> list[list[Found]]:
    """Of each of two ranks, what it found for every case; one launch for all."""
    return on_ranks(2, together, CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_are_one_process(ranks: list[list[Found]], case: Case) -> None:
    expected = alone(case)
    for found in (rank[CASES.index(case)] for rank in ranks):
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        ratio = found.gradient.norm() / expected.gradient.norm()
        cosine = torch.cosine_similarity(found.gradient, expected.gradient, dim=0)
        assert ratio.item() == pytest.approx(1.0, abs=1e-5)
        assert cosine.item() == pytest.approx(1.0, abs=1e-6)
        torch.testing.assert_close(found.running, expected.running, rtol=1e-5, atol=1e-6)


def test_running_statistics_are_the_same_on_both_ranks(ranks: list[list[Found]]) -> None:
    for first, second in zip(*ranks, strict=True):
        assert torch.equal(first.running, second.running)


def test_the_cases_have_gradients_worth_comparing() -> None:
    assert all(alone(case).gradient.norm() > 1e-2 for case in CASES)
