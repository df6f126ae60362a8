"""Objectives that compare views of a clip: nothing is predicted, and there is no teacher."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.config import load_config
from tests.objectives.every_objective import LOCAL, build, configure, make_batch
from vjepa.config import ModelConfig, PredictorSettings
from vjepa.objectives import ObjectiveConfig, build_objective
from vjepa.objectives.embeddings import EmbeddingConfig
from vjepa.objectives.jepa import JEPA
from vjepa.objectives.vicreg import invariance, view_spread

TERMS: dict[str, Any] = {"masked_prediction": None, "context_prediction": None}


def test_view_spread_by_hand() -> None:
    views = [torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 4.0]])]
    # The mean of the two global views is (1, 0): squared distances 1, 1 and 16.
    assert view_spread(views, 2, reduce="sum").item() == pytest.approx(6.0)
    assert view_spread(views, 2).item() == pytest.approx(3.0)


def test_with_two_global_views_it_is_a_quarter_of_vicregs_invariance() -> None:
    first, second = torch.randn(2, 8, 5)
    assert view_spread([first, second], 2).item() == pytest.approx(invariance(first, second).item() / 4)


@pytest.mark.parametrize("num_global", [0, 3])
def test_a_mean_of_no_views_is_refused(num_global: int) -> None:
    with pytest.raises(ValueError, match=f"num_global={num_global}"):
        view_spread([torch.zeros(2, 3), torch.zeros(2, 3)], num_global)


def test_lejepa_is_the_weighted_sum_of_invariance_and_sigreg_over_one_projection(tmp_path: Path) -> None:
    config = configure("lejepa", tmp_path)
    objective = build(config)
    assert objective.predictor is None
    assert objective.target is None
    found = objective(make_batch(config, range(8)), 0).metrics
    both = 0.95 * found["loss/invariance"] + 0.05 * found["loss/sigreg"]
    assert found["loss"].item() == pytest.approx(both.item())
    assert set(objective.heads) == {"invariance", "sigreg", "views"}
    assert not list(objective.heads["sigreg"].parameters()), "the projector is shared"


def test_the_log_says_what_the_weight_comes_to(tmp_path: Path) -> None:
    config = configure("lejepa", tmp_path)
    found = build(config)(make_batch(config, range(8)), 0).metrics
    assert found["effective_weight/sigreg/video"].item() == pytest.approx(0.05 * 8)


def test_every_view_reaches_the_loss_and_only_the_kept_tokens_do(tmp_path: Path) -> None:
    config = configure("levjepa", tmp_path)
    objective = build(config)
    outputs = objective(make_batch(config, range(8)), 0).outputs["video"]
    assert [view.shape[1] for view in outputs.views] == [3] + [1] * 10  # 5 % of 4 x 16 and of 4 x 4 tokens
    assert outputs.num_global == 1
    assert not outputs.masks


def test_operations_are_those_of_the_views(tmp_path: Path) -> None:
    config = load_config("debug", "primary", ["run_dir=unused", *LOCAL], options=["lejepa"])
    objective, batch = build(config), make_batch(config, range(8))
    one = load_config("debug", "primary", ["run_dir=unused", *LOCAL, "data.video.clip.views=1"], options=["lejepa"])
    fewer = objective.flops(make_batch(one, range(8)))
    assert 0.5 < fewer / objective.flops(batch) < 0.9  # a global view less of two


def test_one_view_alone_is_refused_by_name(tmp_path: Path) -> None:
    none = ("data.video.clip.views=1", "data.video.clip.local.views=0", "train.batch.image=0")
    config = load_config("debug", "primary", ["run_dir=unused", *LOCAL, *none], options=["lejepa"])
    with pytest.raises(ValueError, match=r"objective\.terms\.invariance compares views.*data\.video\.clip\.views"):
        build(config)(make_batch(config, range(8)), 0)


def small(**options: Any) -> JEPA:
    settings = PredictorSettings(embed_dim=48, depth=1, num_heads=3)
    return build_objective(ObjectiveConfig(**options), ModelConfig(name="vit_debug"), settings, seed=0)


def test_two_terms_of_a_kind_have_names_and_directions_of_their_own() -> None:
    terms = {
        "masked_prediction": {},
        "deep": {"term": "sigreg", "embedding": {"levels": [1]}},
        "last": {"term": "sigreg", "weight": 0.5, "embedding": {"levels": [4]}},
        "last_level_again": {"term": "masked_prediction", "levels": [4], "weight": 0.0},
    }
    objective = small(terms=terms)
    assert objective.weights_at(0, ["video"]) == {
        "weight/masked_prediction/video": 1.0,
        "weight/deep/video": 0.1,
        "weight/last/video": 0.5,
        "weight/last_level_again/video": 0.0,
    }
    with pytest.raises(ValueError, match=r"objective\.terms\.sigrag is unknown"):
        small(terms={"sigrag": {}})
    with pytest.raises(ValueError, match="letters, digits and _"):
        small(terms={"deep.one": {"term": "sigreg"}})


def test_a_shared_embedding_is_computed_once(tmp_path: Path) -> None:
    config = configure("lejepa", tmp_path)
    objective, calls = build(config), []
    objective.heads["views"].register_forward_hook(lambda *_: calls.append(1))
    objective(make_batch(config, range(8)), 0)
    assert len(calls) == 2  # one for each modality


def test_visreg_without_a_projector_says_that_it_may_collapse(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        small(target="online", terms={"masked_prediction": {}, "visreg": {"embedding": {"projector": 8}}})
        assert not caplog.records
        small(target="online", terms={"masked_prediction": {}, "visreg": {}})
    assert "objective.terms.visreg.embedding.projector" in caplog.text


def test_crops_fill_no_common_grid() -> None:
    with pytest.raises(ValueError, match="crops differ in their grids"):
        EmbeddingConfig(of="views", pool="place")
