"""Each measure appears under its modality, level and criterion, and says of a collapsed level what it is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.objectives.test_losses import micro_batch, objective
from tests.train.ranks import on_ranks
from vjepa.batch import Mask
from vjepa.objectives.terms import Outputs
from vjepa.train import diagnostics, levels, representation
from vjepa.train.distributed import ALONE, init_world
from vjepa.train.levels import diagnose, level_diagnostics
from vjepa.train.representation import INFORMATION, information, lidar

GRID, DIM, CLIPS = (2, 3, 3), 12, 6
TOKENS = math.prod(GRID)
LEVELS = (1, 3)  # blocks 2 and 4
PREDICTABILITY = {"target_prediction_cosine", "nmse", "cross_sample_gap", "position_decodability"}
CONTEXT = {f"context_{name}" for name in INFORMATION}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outputs(*, dim: int = DIM, kept: int = 7, clips: int = CLIPS, seed: int = 0, **changed: Any) -> Outputs:
    """Features without any structure of two levels."""
    indices = torch.arange(TOKENS).expand(clips, -1)
    mask = Mask(indices[:, :kept], indices[:, kept:])
    given: dict[str, Any] = {
        "modality": "video",
        "grid": GRID,
        "num_levels": 2,
        "masks": (mask,),
        "context": [random(clips, kept, 2 * dim, seed=seed + 1)],
        "predicted": [random(clips, TOKENS - kept, 2 * dim, seed=seed + 2)],
        "visible": [None],
        "target": random(clips, TOKENS, 2 * dim, seed=seed + 3),
    }
    return Outputs(**given | changed)


def keys(level: int, *names: str) -> set[str]:
    return {f"diag/video/level{level}/{name}" for name in names}


def test_every_measure_has_its_key_at_every_level() -> None:
    found = level_diagnostics({"video": outputs()}, LEVELS, ALONE)
    names = {*INFORMATION, *CONTEXT, *PREDICTABILITY}
    assert set(found) == keys(2, *names) | keys(4, *names)
    assert all(value.shape == () and value.isfinite() for value in found.values())


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"target": None, "predicted": [], "visible": [], "masks": ()}, CONTEXT),
        ({"predicted": [], "visible": []}, {*INFORMATION, *CONTEXT, "position_decodability"}),
        ({"context": []}, {*INFORMATION, *PREDICTABILITY}),
        ({"context": [], "views": [random(CLIPS, 5, 2 * DIM)]}, {*INFORMATION, *CONTEXT, *PREDICTABILITY}),
        ({"clips": 1}, {*INFORMATION, *CONTEXT, "target_prediction_cosine", "nmse"}),
        ({"views": [random(CLIPS, 4, 2 * DIM)] * 2}, {*INFORMATION, *CONTEXT, *PREDICTABILITY, "lidar"}),
    ],
    ids=["no target", "no predictor", "no context", "crops alone", "one clip", "several views"],
)
def test_what_an_objective_does_not_have_is_left_out(changed: dict[str, Any], names: set[str]) -> None:
    found = level_diagnostics({"video": outputs(**changed)}, LEVELS, ALONE)
    assert set(found) == keys(2, *names) | keys(4, *names)


def test_a_teacher_with_other_levels_and_widths_bears_its_own_numbers() -> None:
    given = outputs(target=random(CLIPS, TOKENS, 5 * 8), target_levels=(0, 5, 11, 17, 23), predicted=[], visible=[])
    found = level_diagnostics({"video": given}, LEVELS, ALONE)
    assert {key for key in found if "context_" not in key} == {
        key for level in (1, 6, 12, 18, 24) for key in keys(level, *INFORMATION, "position_decodability")
    }
    assert {key for key in found if "context_" in key} == keys(2, *CONTEXT) | keys(4, *CONTEXT)
    assert given.target is not None
    assert found["diag/video/level24/rankme"] == pytest.approx(
        representation.information(given.target[..., -8:].flatten(0, 1))["rankme"].item()
    )


def test_levels_are_measured_apart_and_the_encoder_apart_from_its_target() -> None:
    given = outputs()
    assert given.target is not None
    given.target[..., :DIM] = random(DIM, seed=9)  # level 2 of the target is a constant
    given.context[0][..., DIM:] *= 1e-3  # level 4 of the encoder has all but vanished
    found = {key.removeprefix("diag/video/"): value.item() for key, value in _of(given).items()}
    assert found["level2/mean_cosine"] == pytest.approx(1)
    assert found["level2/rankme"] == pytest.approx(1, abs=1e-3)
    assert (found["level2/feature_std"], found["level2/covariance_rank"]) == pytest.approx((0, 0), abs=1e-6)
    assert (found["level2/dead_share"], found["level2/nmse"], found["level2/cross_sample_gap"]) == (1, 1, 0)
    assert found["level4/context_scale"] == pytest.approx(1e-3, rel=0.1)
    for healthy in ("level4/", "level2/context_"):
        assert abs(found[f"{healthy}mean_cosine"]) < 0.1
        assert found[f"{healthy}covariance_rank"] > 8
        assert found[f"{healthy}dead_share"] == 0
        assert found[f"{healthy}scale"] == pytest.approx(1, rel=0.1)


def test_whole_clips_are_taken_where_the_encoder_saw_them() -> None:
    whole = random(CLIPS, TOKENS, 2 * DIM, seed=5) + 4
    found = _of(outputs(whole=whole))
    expected = information(whole[..., DIM:].flatten(0, 1))
    for name in INFORMATION:
        assert found[f"diag/video/level4/context_{name}"].item() == pytest.approx(expected[name].item()), name


def test_one_call_gives_what_the_measures_give_one_by_one() -> None:
    for z in (random(200, 24) * torch.linspace(0.01, 2, 24) + 0.3, random(10, 24)):
        found = information(z)
        assert set(found) == set(INFORMATION)
        spectral = representation.spectral_measures(z)
        for name, value in spectral.items():
            assert found[name].item() == pytest.approx(value.item(), rel=1e-9), name
        assert found["rankme"].item() == pytest.approx(diagnostics.rankme(z).item(), rel=1e-6)
        assert found["scale"].item() == pytest.approx(z.square().mean().sqrt().item(), rel=1e-6)
    assert all(value.isnan() for value in information(torch.full((9, 4), torch.nan)).values())


def test_lidar_is_that_of_the_clips_mean_tokens_over_their_views() -> None:
    given = outputs(views=[random(CLIPS, 4, 2 * DIM, seed=7), random(CLIPS, 9, 2 * DIM, seed=8)])
    means = torch.stack([tokens.mean(dim=1) for tokens in given.views], dim=1)
    for level, part in zip((2, 4), means.chunk(2, dim=-1), strict=True):
        assert _of(given)[f"diag/video/level{level}/lidar"].item() == pytest.approx(lidar(part).item(), rel=1e-6)


def test_the_distance_of_the_target_is_told_once_and_where_one_follows() -> None:
    model, batch = objective(momentum=0.5), micro_batch("video")
    result = model(batch, 0)
    assert diagnose(model, result.outputs, ALONE)["diag/ema_distance"] == 0
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(1.25)  # |1.25 p - p| / |1.25 p|
    found = diagnose(model, result.outputs, ALONE)
    assert [key for key in found if "level" not in key] == ["diag/ema_distance"]
    assert found["diag/ema_distance"].item() == pytest.approx(0.2)
    assert levels.ema_distance(objective(target="online", terms={"vicreg": {}, "masked_prediction": {}})) == {}


def figures_of_a_rank(clips: int, kept: list[int]) -> dict[str, float]:
    """The diagnostics on a rank that holds every other clip, and masks of its own size."""
    with init_world("cpu") as world:
        mine = slice(world.rank, None, world.size)
        full = outputs(clips=clips)
        context = random(clips, kept[world.rank], 2 * DIM, seed=1)
        assert full.target is not None
        given = outputs(clips=clips // world.size, target=full.target[mine], context=[context[mine]], predicted=[])
        found = level_diagnostics({"video": given}, LEVELS, world)
    return {key: value.item() for key, value in found.items()}


@pytest.mark.distributed
def test_the_statistics_of_two_ranks_are_those_of_all_their_clips() -> None:
    first, second = on_ranks(2, figures_of_a_rank, CLIPS, [7, 5])
    local = {key for key in first if key.endswith("position_decodability")}
    assert {key: first[key] for key in first.keys() - local} == {key: second[key] for key in second.keys() - local}
    alone = _of(outputs())
    for name in INFORMATION:
        found, wanted = first[f"diag/video/level4/{name}"], alone[f"diag/video/level4/{name}"].item()
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6), name


def _of(given: Outputs) -> dict[str, Tensor]:
    return level_diagnostics({"video": given}, LEVELS, ALONE)
