"""The collapse demo: what it draws, what it trains, and that its verdicts come from its measures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from vjepa.demo.__main__ import COLUMNS, main
from vjepa.demo.collapse import Outcome, judge, normalised_std, position_r2, run
from vjepa.demo.glyphs import FRAMES, NOISE, SIZE, draw_glyphs
from vjepa.demo.objectives import OBJECTIVES, Learner

HEALTHY = {
    "feature_std": 0.9,
    "normalised_std": 0.9,
    "mean_cosine": 0.0,
    "rankme": 10.0,
    "cross_sample_gap": 0.5,
    "nmse": 0.2,
}


@pytest.fixture(scope="module")
def unprotected() -> Outcome:
    return run("none", steps=200, seed=0)


@pytest.fixture(scope="module")
def regularised() -> Outcome:
    return run("sigreg", steps=100, seed=0)


def test_without_prevention_the_embeddings_collapse(unprotected: Outcome) -> None:
    assert unprotected.measures["feature_std"] < 0.01
    assert unprotected.measures["mean_cosine"] > 0.99
    assert unprotected.is_collapsed
    assert "mean_cosine" in unprotected.verdict


def test_sigreg_keeps_them_alive(regularised: Outcome) -> None:
    assert 0.7 < regularised.measures["feature_std"] < 1.2
    assert regularised.measures["mean_cosine"] < 0.1
    assert regularised.measures["rankme"] > 4
    assert regularised.measures["nmse"] < 0.3
    assert regularised.measures["position_r2"] > 0.9
    assert regularised.verdict == "healthy"


def test_the_loss_is_lower_where_all_has_collapsed(unprotected: Outcome, regularised: Outcome) -> None:
    assert unprotected.measures["prediction_loss"] < 1e-3 * regularised.measures["prediction_loss"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mean_cosine", 0.96),
        ("rankme", 2.9),
        ("cross_sample_gap", 0.01),
        ("feature_std", 0.009),
        ("normalised_std", 0.2),
        ("nmse", 1.1),
        ("nmse", math.nan),
    ],
)
def test_each_rule_alone_is_a_collapse(name: str, value: float) -> None:
    untrained = {"feature_std": 0.1}
    assert judge(HEALTHY, untrained) == []
    (alarm,) = judge(HEALTHY | {name: value}, untrained)
    assert alarm.startswith(f"{name} ")


def test_a_digit_is_where_its_position_says() -> None:
    glyphs = draw_glyphs(64, seed=1, stream="train")
    assert glyphs.clips.shape == (64, FRAMES, 1, SIZE, SIZE)
    ink = glyphs.clips[:, :, 0] > 10 * NOISE  # [B, T, H, W]
    tops, lefts = ink.any(dim=3).int().argmax(dim=2), ink.any(dim=2).int().argmax(dim=2)
    torch.testing.assert_close(torch.stack([tops, lefts], dim=-1).float(), glyphs.positions)
    assert (glyphs.positions[:, 1:] != glyphs.positions[:, :-1]).any(dim=-1).float().mean() > 0.9


def test_batches_are_functions_of_seed_stream_and_ordinal() -> None:
    first = draw_glyphs(4, seed=0, stream="train", ordinal=3).clips
    assert torch.equal(first, draw_glyphs(4, seed=0, stream="train", ordinal=3).clips)
    for seed, stream, ordinal in ((1, "train", 3), (0, "eval", 3), (0, "train", 4)):
        assert not torch.equal(first, draw_glyphs(4, seed=seed, stream=stream, ordinal=ordinal).clips)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_targets_of_its_own_carry_gradient(name: str) -> None:
    learner = Learner(OBJECTIVES[name], seed=0)
    _, _, target = learner.embed(draw_glyphs(4, seed=0, stream="train").clips)
    assert target.requires_grad == (name in ("none", "sigreg", "vicreg"))
    assert learner.target_encoder is None or not any(p.requires_grad for p in learner.target_encoder.parameters())


def test_the_ema_target_follows_and_the_frozen_one_stays() -> None:
    for name, share in (("ema", 0.01), ("frozen", 0.0)):
        learner = Learner(OBJECTIVES[name], seed=0)
        assert learner.target_encoder is not None
        target, own = next(learner.target_encoder.parameters()), next(learner.encoder.parameters())
        before = target.clone()
        own.data += 1
        learner.update_target()
        torch.testing.assert_close(target, before + share * (own - before))


def test_place_is_read_from_features_that_hold_it_and_from_no_others() -> None:
    positions = draw_glyphs(256, seed=0, stream="eval").positions.transpose(0, 1)
    noise = torch.randn(FRAMES, 256, 8, generator=torch.Generator().manual_seed(0))
    assert position_r2(torch.cat([1e-3 * positions + 5, 1e-6 * noise], dim=-1), positions) > 0.99
    assert position_r2(noise, positions) < 0.05


def test_the_normalised_std_does_not_see_scale() -> None:
    z = torch.randn(512, 32, generator=torch.Generator().manual_seed(0))
    assert 0.95 < normalised_std(1e-3 * z) < 1.0
    assert normalised_std(z + 100) < 0.05


def test_the_command_prints_a_row_and_a_verdict_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "collapse.json"
    assert main(["collapse", "--objective", "none", "vicreg", "--steps", "2", "--seed", "3", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    first, *rest = out.splitlines()
    assert all(heading in first for heading in COLUMNS.values())
    assert [line.split()[:2] for line in rest[:3]] == [["untrained", "3"], ["none", "3"], ["vicreg", "3"]]
    records = json.loads(file.read_text())
    assert [record["objective"] for record in records] == ["none", "vicreg"]
    for record in records:
        assert record["is_collapsed"] == bool(record["alarms"])
        assert record["verdict"] in out


def test_a_file_that_cannot_be_written_is_refused_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["collapse", "--json", "no/such/folder/collapse.json"])
    assert "there is no folder no/such/folder" in capsys.readouterr().err


def test_an_unknown_objective_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="must be one of none, sg, ema, sigreg, vicreg, frozen"):
        run("byol", steps=1, seed=0)


def test_a_training_is_a_function_of_its_arguments() -> None:
    first, second = (run("frozen", steps=2, seed=5) for _ in range(2))
    assert first.measures == second.measures
