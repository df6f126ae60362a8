"""Every stage of every recipe can start, has the paper's clips, and ends at the learning rate that it says."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vjepa
from launch import plan, planner
from launch.chain import Chain, ChainRequest, plan_chain
from launch.config import RECIPES, RunConfig, list_recipes, load_config
from launch.init_from import check_exported
from launch.submit import main as submit
from launch.train import train
from tests.benchmarks import cooldown_grid
from vjepa.config import ConfigError, build_models
from vjepa.hub import WeightsError, save_config
from vjepa.nn.encoder import Encoder
from vjepa.nn.predictor import PredictorConfig
from vjepa.nn.rope import grid_positions
from vjepa.objectives import build_objective
from vjepa.objectives.checks import freeze_unused
from vjepa.objectives.terms import ContextPrediction, build_terms
from vjepa.registry import model_config
from vjepa.train.signals import StopFlag

ORDER = ("primary", "cooldown", "distill", "distill_cooldown")
BIG = ("vit_base", "vit_large", "vit_giant", "vit_gigantic")
DISTILLED = ("vit_base", "vit_large")
SOURCES = ("data.video.sources.mine.path=/shards/video", "data.image.sources.mine.path=/shards/image")


def stages(recipe: str) -> tuple[str, ...]:
    return tuple(sorted((path.stem for path in (RECIPES / recipe).glob("*.yaml")), key=ORDER.index))


def chain(recipe: str, *overrides: str, of: tuple[str, ...] | None = None, options: tuple[str, ...] = ()) -> Chain:
    """Stages of a recipe, planned as one chain for 128 GPUs, one process for the small: all are checked on meta."""
    asked = ChainRequest(recipe, of or stages(recipe), options=options, overrides=("run_dir=unused", *overrides))
    return plan_chain(asked, resume=False, world=lambda _: 128 if recipe in BIG else 1)


@pytest.fixture(scope="module")
def chains() -> dict[str, Chain]:
    return {
        recipe: chain(recipe, *(SOURCES if recipe in (*BIG, "vit_small", "vit_small_cpu") else ()))
        for recipe in list_recipes()
    }


@pytest.fixture(scope="module")
def gigantic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an exported ViT-G and its predictor say of themselves; weights are not needed to check a recipe."""
    return export(tmp_path_factory.mktemp("gigantic"), load_config("vit_gigantic", "primary"))


def export(folder: Path, config: RunConfig) -> Path:
    encoder = config.model.encoder_config()
    save_config(encoder, folder, extra={"predictor": asdict(config.predictor.predictor_config(encoder))})
    return folder


def tokens(config: RunConfig) -> tuple[int, int]:
    """Of a video clip and of an image, as the tokenizers cut them."""
    encoder = build_models(config.model, config.predictor, seed=0, device="meta")[0]
    counts = []
    for clip in (config.data.video.clip, config.data.image.clip):
        cut = encoder.tokenizer(torch.empty(1, 3, clip.frames, clip.size, clip.size, device="meta"))
        counts.append(cut.shape[1])
    return counts[0], counts[1]


# ------------------------------------------------------------------------------------------------------- all recipes


@pytest.mark.parametrize("recipe", list_recipes())
def test_every_stage_of_a_recipe_passes_all_checks_as_one_chain(recipe: str, chains: dict[str, Chain]) -> None:
    assert tuple(chains[recipe].configs) == stages(recipe)
    assert recipe not in BIG or {"primary", "cooldown"} <= set(stages(recipe))
    assert recipe not in DISTILLED or stages(recipe) == ORDER


def test_the_last_step_of_every_stage_has_the_learning_rate_that_the_recipe_ends_at(chains: dict[str, Chain]) -> None:
    found = 0
    for planned in chains.values():
        for config in planned.configs.values():
            lr, steps = config.train.optim.lr, config.train.steps
            assert lr.at(steps - 1, steps) == pytest.approx(lr.final, rel=1e-9), (config.recipe, config.stage)
            found += lr.decay != "constant"
    assert found >= 9


@pytest.mark.parametrize("recipe", BIG)
def test_a_cooldown_has_the_papers_schedule_and_the_public_batch(recipe: str, chains: dict[str, Chain]) -> None:
    for stage in {"cooldown", "distill_cooldown"} & set(stages(recipe)):
        config = chains[recipe].configs[stage]
        lr = config.train.optim.lr
        assert (lr.at(0, 12000), lr.at(11999, 12000)) == pytest.approx((6e-4, 1e-6))
        assert (config.train.steps, config.train.batch.as_dict()) == (12000, {"video": 3072, "image": 9216})
        assert (config.train.optim.weight_decay, config.train.optim.weight_decay_end) == (0.04, None)
        context = build_terms(config.objective.terms)["context_prediction"]
        assert [context.weight_at("video", step) for step in (0, 6000, 11999)] == [0.5] * 3
        assert [context.weight_at("image", step) for step in (0, 6000, 11999)] == [0.7] * 3
        assert isinstance(context, ContextPrediction)
        assert not context.distance_weighted


@pytest.mark.parametrize("recipe", BIG)
def test_clips_have_the_papers_token_counts(recipe: str, chains: dict[str, Chain]) -> None:
    expected = {"primary": (8 * 16 * 16, 16 * 16), "cooldown": (32 * 24 * 24, 32 * 32)}
    expected |= {"distill": expected["primary"], "distill_cooldown": expected["cooldown"]}
    assert {stage: tokens(config) for stage, config in chains[recipe].configs.items()} == {
        stage: expected[stage] for stage in stages(recipe)
    }
    small = chain(recipe, *SOURCES, of=("primary", "cooldown"), options=("cooldown_256",)).configs
    assert {stage: tokens(config) for stage, config in small.items()} == {
        "primary": expected["primary"],
        "cooldown": (32 * 16 * 16, 16 * 16),
    }


def test_the_benchmark_of_one_step_has_a_cooldowns_tokens() -> None:
    assert cooldown_grid.count_tokens([]) == (18432, 1024)


# -------------------------------------------------------------------------------------------------------- who teaches


def test_a_cooldown_starts_from_the_encoder_that_teaches_it_or_goes_on_as_ema() -> None:
    cooldown = chain("vit_gigantic", *SOURCES).configs["cooldown"]
    exported = "unused/primary/exports/primary"
    assert (cooldown.init_from, cooldown.objective.teacher.path, cooldown.init_predictor) == (exported, exported, True)
    keys = ("objective.target=ema", "init_predictor=false", "init_optimizer=carry")
    by_keys = chain("vit_gigantic", *SOURCES, *(f"cooldown.{key}" for key in keys)).configs["cooldown"]
    alone = load_config("vit_gigantic", "cooldown", ["init_from=unused/primary"], options=["ema_cooldown"])
    for config in (by_keys, alone):
        objective = config.objective
        assert (objective.target, objective.momentum, objective.momentum_end) == ("ema", 0.99925, None)
        assert (config.init_from, config.init_predictor, config.carries) == ("unused/primary", False, True)


@pytest.mark.parametrize("recipe", DISTILLED)
def test_distillation_reads_two_teachers_and_its_second_stage_starts_from_the_first(
    recipe: str, gigantic: Path
) -> None:
    cooled = gigantic.parent / "cooled"
    teachers = (f"distill.objective.teacher.path={gigantic}", f"distill_cooldown.objective.teacher.path={cooled}")
    export(cooled, load_config("vit_gigantic", "primary"))
    found = chain(recipe, *SOURCES, *teachers, of=("distill", "distill_cooldown")).configs
    first, second = found["distill"], found["distill_cooldown"]
    assert (first.init_from, second.init_from) == (None, "unused/distill/exports/distill")
    for config in (first, second):
        objective = build_objective(config.objective, config.model, config.predictor, seed=0, device="meta")
        assert objective.predictor is not None
        assert objective.predictor.config.target_dim == 1664
        assert (objective.predictor.config.num_levels, objective.predictor.config.depth) == (1, 12)
        assert (config.objective.average, config.objective.teacher.precision) == (0.99925, "bf16")


@pytest.mark.parametrize("recipe", ["debug", *DISTILLED])
def test_in_a_whole_chain_each_stage_of_distillation_has_the_teacher_of_its_age(
    recipe: str, chains: dict[str, Chain]
) -> None:
    found = chains[recipe].configs
    assert found["distill"].objective.teacher.path == "unused/primary/exports/primary"
    assert found["distill_cooldown"].objective.teacher.path == "unused/cooldown/exports/cooldown"
    assert found["distill"].init_from is None
    assert found["distill_cooldown"].init_from == "unused/distill/exports/distill"


def test_the_debug_student_differs_from_its_teacher_in_width_and_depth(chains: dict[str, Chain]) -> None:
    teacher, student = (chains["debug"].configs[stage].model.encoder_config() for stage in ("primary", "distill"))
    assert student.embed_dim < teacher.embed_dim
    assert student.depth < teacher.depth


# --------------------------------------------------------------------------------------------------------- training on


@dataclass(frozen=True)
class Released:
    """A released file as its layout describes it, and how launch/README.md trains on from it."""

    recipe: str
    size: str
    options: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    levels: tuple[int, ...] = ()
    predictor_levels: int = 4
    is_new: bool = True  # V-JEPA 2.1

    def write(self, folder: Path) -> Path:
        kinds = {"rope": "tiled", "interpolate_rope": False, "image_tokenizer": False, "modality_embed": False}
        encoder = model_config(self.size, levels=self.levels or None, **({} if self.is_new else kinds))  # pyright: ignore[reportArgumentType]
        is_distilled = self.is_new and self.predictor_levels == 1
        predictor = PredictorConfig(
            encoder_dim=encoder.embed_dim,
            num_levels=self.predictor_levels,
            target_dim=1664 if is_distilled else encoder.embed_dim * self.predictor_levels,
            embed_dim=384,
            depth=24 if self.predictor_levels == 4 else 12,
            num_heads=12,
            rope=encoder.rope,
            interpolate_rope=encoder.interpolate_rope,
            modality_embed=encoder.modality_embed,
            context_head=self.is_new,
        )
        save_config(encoder, folder, extra={"predictor": asdict(predictor)})
        return folder

    def check(self, folder: Path, *overrides: str) -> None:
        """As a run does before its first step, but for the values of the weights."""
        path = self.write(folder)
        asked = ["run_dir=unused", f"init_from={path}", *self.overrides, *overrides]
        config = load_config(self.recipe, "cooldown", asked, options=["continue", *self.options])
        assert config.objective.teacher.path == str(path)
        assert config.check(8, needs_sources=False) == 1
        objective = build_objective(config.objective, config.model, config.predictor, seed=0, device="meta")
        freeze_unused(objective, list(config.train.batch.as_dict()))
        check_exported(objective, path, predictor=config.init_predictor)


FRESH = ("init_predictor=false", "predictor.depth=12")
V2 = ("vjepa2_weights",)
RELEASED = {
    "2.1 B": Released("vit_base", "vit_base", (), FRESH, predictor_levels=1),
    "2.1 L": Released("vit_large", "vit_large", (), FRESH, predictor_levels=1),
    "2.1 g": Released("vit_giant", "vit_giant"),
    "2.1 G": Released("vit_gigantic", "vit_gigantic", (), ("model.levels=[12,24,38,48]",), (11, 23, 37, 47)),
    "2 L": Released("vit_large", "vit_large", V2, (), (23,), 1, is_new=False),
    "2 H": Released("vit_large", "vit_huge", V2, ("model.name=vit_huge",), (31,), 1, is_new=False),
    "2 g": Released("vit_giant", "vit_giant", V2, (), (39,), 1, is_new=False),
}


@pytest.mark.parametrize("name", list(RELEASED))
def test_training_on_fits_every_released_model_as_the_readme_says(name: str, tmp_path: Path) -> None:
    RELEASED[name].check(tmp_path)


@pytest.mark.parametrize(
    ("name", "overrides", "told"),
    [
        ("2.1 G", ["model.levels=[12,24,36,48]"], r"model\.levels=\[12, 24, 36, 48\] here, \[12, 24, 38, 48\] there"),
        ("2.1 L", ["init_predictor=true"], "target_dim=4096 here, 1664 there.*init_predictor=false"),
        ("2 L", ["model.rope=interleaved"], "model.rope=interleaved here, tiled there"),
        ("2 L", ["objective.terms.context_prediction={}"], "has no head for visible tokens"),
    ],
)
def test_weights_of_another_model_are_refused(name: str, overrides: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=told):
        RELEASED[name].check(tmp_path, *overrides)


def test_training_on_without_weights_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"objective\.target=frozen needs objective\.teacher\.path"):
        load_config("vit_large", "cooldown", options=["continue"])


def test_training_on_ends_at_its_last_rate_and_leaves_its_teacher_alone(tmp_path: Path) -> None:
    """A real run: two steps of the debug model from an export, with what the option says of rates."""
    weights = vjepa.hub.save_pretrained(vjepa.create_model("vit_debug", seed=3), tmp_path / "weights")
    tiny = ("data.video.clip={frames: 4, size: 64}", "data.image.clip.size=64", "train.steps=3", "data.workers=0")
    small = ("train.batch={video: 4, image: 4}", "mask.group={video: 4, image: 4}", "train.optim.lr.warmup_steps=1")
    asked = [f"run_dir={tmp_path / 'run'}", f"init_from={weights}", "init_predictor=false", *tiny, *small]
    train(load_config("debug", "cooldown", asked, options=["continue"]), resume=False, stop=StopFlag())
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows]
    assert rates == pytest.approx([1e-6, 5e-5, 1e-6])
    before, after = (vjepa.from_pretrained(path) for path in (weights, tmp_path / "run/exports/cooldown"))
    moved = [float((a - b).detach().abs().max()) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert 0 < max(moved) < 1e-3, "it went on from these weights, and not far"


# --------------------------------------------------------------------------------------------------- memory, positions


def test_a_dry_run_says_what_the_cooldown_of_vit_gigantic_needs_on_64_times_8(
    gigantic: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The command itself, on fewer sampled masks and without the list of settings for other cards: both take long."""
    monkeypatch.setattr(planner, "SAMPLED_GROUPS", 1)
    monkeypatch.setattr(plan, "_suggestion_lines", lambda *_: [])
    weights = [f"init_from={gigantic}", f"objective.teacher.path={gigantic}"]
    shape = ["--dry-run", "--gpus", "512", "--card", "H100", "run_dir=unused"]
    assert submit(["--recipe", "vit_gigantic", "--stage", "cooldown", *shape, *weights]) == 0
    told = capfd.readouterr().out
    assert "memory of one rank on 512 x H100, fsdp over all ranks" in told
    total, there = (float(line.split()[n]) for n, line in zip((1, 2), lines(told, "total", "there is"), strict=True))
    assert 30 < total < there
    assert "for 12,000 steps on 512 x H100" in told


def lines(text: str, *starts: str) -> list[str]:
    return [next(line for line in text.splitlines() if line.strip().startswith(start)) for start in starts]


@pytest.mark.parametrize("recipe", BIG)
def test_positions_of_a_cooldowns_clip_are_finer_in_space_and_go_on_in_time(
    recipe: str, chains: dict[str, Chain]
) -> None:
    """Reference 1.3: rows and columns scaled by 15/23 to 0..15, tubelets 0..31 as they are; of the predictor too."""
    config = chains[recipe].configs["cooldown"]
    encoder, predictor = build_models(config.model, config.predictor, seed=0, device="meta")
    for part in (encoder.config, predictor.config):
        assert (part.rope, part.interpolate_rope, part.rope_base) == ("interleaved", True, 10000.0)
        positions = grid_positions((32, 24, 24), interpolate=part.interpolate_rope).unflatten(0, (32, 24, 24))
        scaled = torch.arange(24) * 15 / 23
        torch.testing.assert_close(positions[5, :, 7, 1], scaled)
        torch.testing.assert_close(positions[5, 7, :, 2], scaled)
        assert torch.equal(positions[:, 3, 4, 0], torch.arange(32.0))


def test_the_encoder_sees_corners_and_time_steps_of_a_cooldowns_clip_where_the_primary_stage_had_them() -> None:
    """The same patches in the corners of two time steps: 24 x 24 ends where 16 x 16 does, seven steps are seven."""
    patches = torch.randn(2, 4, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0))  # [step, corner, C, T, H, W]

    def features(frames: int, size: int, steps: tuple[int, int], encoder: Encoder) -> Tensor:
        clip, last, side = torch.zeros(1, 3, frames, size, size), size - 16, size // 16
        for step, found in zip(steps, patches, strict=True):
            for patch, row, column in zip(found, (0, 0, last, last), (0, last, 0, last), strict=True):
                clip[0, :, 2 * step : 2 * step + 2, row : row + 16, column : column + 16] = patch
        corners = torch.tensor([0, side - 1, side * (side - 1), side * side - 1])
        with torch.no_grad():
            return encoder(clip, context=torch.cat([step * side * side + corners for step in steps])[None])

    encoder = vjepa.create_model("vit_debug")
    for parameter in encoder.parameters():
        parameter.data.mul_(5)  # at their initial size attention hardly tells places apart
    primary = features(16, 256, (0, 7), encoder)
    torch.testing.assert_close(features(64, 384, (24, 31), encoder), primary, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(features(64, 384, (0, 31), encoder), primary, atol=0.1), "time goes on, unscaled"
    unscaled = vjepa.create_model("vit_debug", interpolate_rope=False)
    unscaled.load_state_dict(encoder.state_dict())
    assert not torch.allclose(features(64, 384, (24, 31), unscaled), primary, atol=0.1)
