"""A plan says what a recipe needs, what would fit, and refuses what cannot."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launch.config import load_config
from launch.plan import describe_plan, plan, refuse_if_too_large
from launch.planner import Device, Planner, find_device, sold
from launch.submit import main as submit
from launch.train import check_memory
from vjepa.config import ConfigError
from vjepa.train.distributed import World
from vjepa.train.memory_trace import ViewSize, fake_micro_batch

SMALL = ["run_dir=unused", "train.device=auto"]


@pytest.fixture(scope="module")
def gigantic() -> Planner:
    return Planner(load_config("vit_gigantic", "primary", ["run_dir=unused"]))


def test_a_clip_of_vit_gigantic_costs_what_the_reference_counted(gigantic: Planner) -> None:
    """Reference 2.4: 17.5 TFLOP a video clip at truncated masks, the teacher counted."""
    assert gigantic.flops_per_clip["video"] == pytest.approx(17.5e12, rel=0.03)


def test_a_plan_knows_views_kept_tokens_and_shared_contexts() -> None:
    targets = "{kind: multiblock, num_blocks: 4, spatial_scale: 0.15, spatial_scale_max: 0.2}"
    options = ["mask.views.keep=0.5", f"mask.image={{image: null, targets: {targets}}}", "data.video.clip.views=2"]
    options.append("data.video.clip.local={views: 3, size: 32, frames: 2}")
    planner = Planner(load_config("debug", "primary", [*SMALL, *options]))
    image, video = planner.clips["image"][0], planner.clips["video"][0]
    assert image.context_of == (None, 0, 0, 0)
    assert len({context for context, _ in image.masks}) == 1
    assert video.views == (ViewSize(4, 64, 16),) * 2 + (ViewSize(2, 32, 2),) * 3
    batch = fake_micro_batch({"video": video, "image": image}, planner.encoder)
    assert (batch["video"].num_global, len(batch["video"].views)) == (2, 5)
    kept = [context.shape[1] for context in batch["video"].view_contexts if context is not None]
    assert kept == [16, 16, 2, 2, 2]
    assert [mask.context_of for mask in batch["image"].masks] == [None, 0, 0, 0]


def test_days_follow_from_operations(gigantic: Planner) -> None:
    steps = gigantic.config.train.steps
    expected = steps * gigantic.flops_per_step / (64 * 989e12 * 0.5) / 86400
    assert gigantic.days(64, 989e12, 0.5) == pytest.approx(expected)
    assert gigantic.days(128, 989e12, 0.5) == pytest.approx(expected / 2)


def test_every_suggestion_is_accepted_by_the_recipe_and_fits(gigantic: Planner) -> None:
    for gigabytes in (16, 24, 80, 141):
        device = sold(gigabytes)
        setting = gigantic.suggest(device, 8)
        assert setting is not None
        config = load_config("vit_gigantic", "primary", ["run_dir=unused", *setting.overrides.split()])
        assert config.check(8, needs_sources=False) == setting.num_micro_batches
        again = Planner(config)
        again._memories = gigantic._memories
        assert again.configured(8).need.total == setting.need.total <= device.usable


def test_a_larger_card_never_needs_more_recomputation(gigantic: Planner) -> None:
    order = ["keep", "selective", "recompute"]
    found = [gigantic.suggest(sold(gigabytes), 8) for gigabytes in (16, 24, 48, 80, 141)]
    ranked = [order.index(setting.parallel.activations) for setting in found if setting]
    assert ranked == sorted(ranked, reverse=True)


def test_what_fits_nowhere_says_how_many_ranks_it_takes(gigantic: Planner) -> None:
    assert gigantic.suggest(sold(16), 1) is None
    ranks = gigantic.ranks_that_fit(sold(16), 1)
    assert ranks is not None
    assert gigantic.suggest(sold(16), ranks) is not None
    assert gigantic.suggest(sold(16), ranks // 2) is None
    assert "16 GB: does not fit; fits on" in describe_plan(gigantic, sold(80), 1, 0.4)


def test_the_start_of_a_run_refuses_what_cannot_fit() -> None:
    config = load_config("vit_large", "primary", ["run_dir=unused"])
    with pytest.raises(ConfigError) as caught:
        refuse_if_too_large(config, 8, 24 * 2**30)
    told = str(caught.value)
    assert re.search(r"recipe vit_large, stage primary, needs \d+\.\d GiB on each of 8 rank", told)
    assert "predictor activations" in told
    assert "train.micro_batch.video=" in told
    refuse_if_too_large(config, 8, 139 * 2**30)


@pytest.mark.parametrize(
    ("device", "asked", "is_refused"), [("cuda", "true", 1), ("cuda", "false", 0), ("cpu", "true", 0)]
)
def test_a_run_asks_the_planner_on_a_gpu_unless_told_not_to(
    device: str, asked: str, is_refused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(total_memory=24 * 2**30)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: card)
    config = load_config("vit_large", "primary", ["run_dir=unused", f"check_memory={asked}"])
    told = pytest.raises(ConfigError, match="check_memory=false") if is_refused else nullcontext()
    with told:
        check_memory(config, World(0, 8, torch.device(device)))


def test_a_dry_run_refuses_a_device_shape_that_is_too_small(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shape = ["--dry-run", "--gpus", "8", "--card", "rtx 4090", f"run_dir={tmp_path / 'run'}"]
    assert submit(["--recipe", "vit_large", *shape]) == 2
    out, error = capfd.readouterr()
    assert (
        out.index("steps: 135000") < out.index("encoder: 304,680,960") < out.index("memory of one rank on 8 x RTX 4090")
    )
    assert "days:" in out
    assert "recipe vit_large, stage primary, needs" in error
    assert not (tmp_path / "run").exists()


def test_a_recipe_on_a_cpu_is_planned_and_never_refused() -> None:
    text, refusal = plan(load_config("debug", "primary", SMALL[:1]), gpus=None, card=None, gpu_memory=None)
    assert refusal is None
    assert "1 CPU process(es)" in text
    assert "days" not in text


def test_a_small_model_fits_on_every_card() -> None:
    text, refusal = plan(load_config("debug", "primary", SMALL), gpus=2, card="L4", gpu_memory=None)
    assert refusal is None
    assert "does not fit" not in text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"card": "H1000"}, ["--card 'H1000' is unknown", "H100", "--gpu-memory"]),
        ({"gpu_memory": 0.0}, ["--gpu-memory 0 must be positive"]),
        ({"mfu": 1.5}, ["--mfu 1.5", "at most 1"]),
        ({"gpus": 0}, ["--gpus 0 must be at least 1"]),
        ({"gpus": 5}, ["train.batch.video=12", "5 ranks"]),
    ],
)
def test_a_mistake_in_the_device_shape_is_named(arguments: dict[str, object], told: list[str]) -> None:
    wanted = {"gpus": None, "card": None, "gpu_memory": None, **arguments}
    with pytest.raises(ConfigError) as caught:
        plan(load_config("debug", "primary", SMALL), **wanted)  # pyright: ignore[reportArgumentType]
    for text in told:
        assert text in str(caught.value)


def test_cards_are_known_by_name_and_keep_a_reserve() -> None:
    card = find_device("h200", None)
    assert (card.name, card.peak) == ("H200", 989e12)
    assert 125e9 < card.usable < 141 * 2**30
    assert find_device("A100", 40).memory < 40 * 2**30
    assert Device("this GPU", 2**30).usable < 0
