"""Configuration mistakes end a command before anything starts, in one line that names field, value and remedy."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launch import prepare
from launch.config import MAKERS, load_config, load_for_resume, numbers_hash
from launch.submit import main as submit
from launch.train import main as train
from tests.benchmarks.ablations import Variant, variants
from vjepa.config import ConfigError, to_yaml

SOURCES = ["data.video.sources.mine.path=/shards/video", "data.image.sources.mine.path=/shards/image"]


@pytest.mark.parametrize("main", [submit, train], ids=["submit", "train"])
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--recipe", "debgu"], ["there is no recipe 'debgu'", "Did you mean 'debug'?", "vit_gigantic"]),
        (["--recipe", "debug", "--stage", "primry"], ["no stage 'primry'", "Stages: cooldown, distill"]),
        (["--recipe", "debug", "--stage", "destil"], ["no stage 'destil'", "Stages: cooldown, distill"]),
        (["--recipe", "debug", "--option", "paper"], ["no option 'paper'", "paper_batch"]),
        (["--recipe", "debug", "train.stpes=3"], ["stpes", "steps"]),
        (["--recipe", "debug", "trian.steps=3"], ["trian", "train"]),
        (["--recipe", "debug", "train.steps=many"], ["train.steps", "many"]),
        (["--recipe", "debug", "train.steps=-1"], ["train.steps=-1", "at least 0"]),
        (["--recipe", "debug", "prepare.debug=shapes"], ["prepare.debug=shapes is unknown", "digits"]),
        (["--recipe", "debug", "evals.movement.data=x"], ["evals.movement is unknown", "motion"]),
        (["--recipe", "demo", "evals.motion.seeds=0"], ["seeds=0 must be at least 1"]),
        (["--recipe", "debug", "train.precision=fp8"], ["train.precision", "fp8"]),
        (["--recipe", "debug", "train.steps"], ["'train.steps' is no override", "key=value"]),
        (["--recipe", "debug", "=3"], ["'=3' is no override"]),
        (["--recipe", "debug", "model.levels=[0,1]"], ["model.levels=[0, 1]", "from 1"]),
        (["--recipe", "debug", "model.name=vit_debgu"], ["vit_debgu", "vit_debug"]),
        (["--recipe", "debug", "objective.target=teacher"], ["objective.target", "teacher"]),
        (
            ["--recipe", "debug", "data.video.clip.size=60"],
            ["data.video.clip.size=60", "multiple of model.patch_size=16"],
        ),
        (["--recipe", "debug", "data.video.clip.frames=5"], ["clip.frames=5", "model.tubelet_size=2"]),
        (
            ["--recipe", "debug", "data.image.clip.local={views: 2, size: 40}"],
            ["data.image.clip.local.size=40", "multiple of model.patch_size=16"],
        ),
        (
            ["--recipe", "debug", "data.video.clip.local={views: 2, size: 32, frames: 3}"],
            ["data.video.clip.local.frames=3", "model.tubelet_size=2"],
        ),
        (["--recipe", "debug", "objective.terms.sigrge={}"], ["objective.terms.sigrge is unknown"]),
        (["--recipe", "debug", "objective.terms.masked_prediction.wieght=2"], ["masked_prediction", "wieght"]),
        (["--recipe", "debug", "train.batch={video: 0, image: 0}"], ["video=0", "not both 0"]),
        (["--recipe", "debug", "train.micro_batch.video=5"], ["micro_batch.video=5", "divide", "12"]),
        (["--recipe", "debug", "mask.group.video=5"], ["mask.group.video=5", "divide", "12"]),
        (["--recipe", "vit_large"], ["train.batch.video=3072", "data.video.sources.NAME.path=SHARDS"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_is_named_with_its_remedy(
    main: Callable[[list[str]], int],
    arguments: list[str],
    told: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    status = main([*arguments, f"run_dir={tmp_path / 'run'}"])
    error = capfd.readouterr().err
    assert status in (1, 2)
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1, error
    for words in told:
        assert words in error
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(load_config("debug", "primary", ["train.steps=20"])))
    return path


@pytest.mark.parametrize(
    "change",
    [
        "train.steps=21",
        "train.seed=1",
        "train.batch.video=24",
        "train.optim.lr.peak=0.1",
        "objective.momentum=0.5",
        "objective.terms.masked_prediction.weight=2",
        "mask.truncate=prefix",
        "data.video.clip.size=32",
        "data.video.sources.debug.clip.fps=2.0",
        "data.video.order=replacement",
        "model.depth=3",
    ],
)
def test_a_resume_that_changes_numbers_is_refused_by_key_and_values(stored: Path, change: str) -> None:
    key, value = change.split("=")
    with pytest.raises(ConfigError, match=r"changes what decides its numbers") as refused:
        load_for_resume(stored, [change])
    line = next(line for line in str(refused.value).splitlines() if key in line)
    assert line.rstrip("'").endswith(value)
    assert "another run_dir" in str(refused.value)


def test_a_resume_may_not_add_a_source(stored: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.video\.sources\.other\."):
        load_for_resume(stored, ["data.video.sources.other.path=/elsewhere"])


def test_a_resume_may_find_its_shards_elsewhere(stored: Path) -> None:
    config = load_for_resume(stored, ["data.video.sources.debug.path=/moved"])
    assert config.data.video.sources["debug"].path == "/moved"
    assert numbers_hash(config) == numbers_hash(load_for_resume(stored, []))


def test_a_resume_may_change_what_alters_no_number(stored: Path) -> None:
    changes = ["data.workers=3", "train.micro_batch.video=4", "train.checkpoint.keep=9", "train.log_every=7"]
    config = load_for_resume(stored, [*changes, "train.steps=20"])  # said again, not changed
    assert (config.data.workers, config.train.checkpoint.keep, config.train.steps) == (3, 9, 20)
    assert numbers_hash(config) == numbers_hash(load_for_resume(stored, []))
    assert numbers_hash(config) != numbers_hash(load_config("debug", "primary"))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"recipe": "vit_large"}, "recipe"),
        ({"stage": "cooldown"}, "stage"),
        ({"options": ["prefix_masks"]}, "mask.truncate"),
    ],
)
def test_another_recipe_stage_or_option_is_not_silently_ignored_on_resume(
    stored: Path, asked: dict[str, str], told: str
) -> None:
    with pytest.raises(ConfigError, match=rf"\n  {told}: "):
        load_for_resume(stored, [], **asked)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "content", ["", "- a\n- b\n", "a: [", "train: {steps: 3}\n", "\0\1", "recipe: debug\nno_such: 1\n"]
)
def test_a_damaged_stored_configuration_is_named(stored: Path, content: str) -> None:
    stored.write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml|no_such"):
        load_for_resume(stored, [])


def test_options_and_overrides_are_laid_over_the_recipe_in_that_order() -> None:
    config = load_config("vit_large", "primary", [*SOURCES, "train.batch.video=64"], options=["paper_batch"])
    assert (config.train.batch.video, config.train.batch.image) == (64, 2304)
    assert config.mask.group.video == 16


def test_a_small_batch_that_cannot_cover_the_ranks_is_refused() -> None:
    config = load_config("vit_large", "primary", SOURCES, options=["paper_batch"])
    assert config.check(world=8) >= 1
    with pytest.raises(
        ConfigError, match=r"train\.batch\.video=128 is the global batch and must divide by the 256 ranks"
    ):
        config.check(world=256)


@pytest.mark.parametrize("recipe", ["vit_large", "vit_giant", "vit_gigantic"])
def test_the_big_recipes_can_start_on_8_and_on_128_gpus(recipe: str) -> None:
    config = load_config(recipe, "primary", SOURCES)
    for world in (8, 128):
        assert config.check(world) * world * 36 >= 4608


MIXTURES = {
    "visionmix": {"ssv2": 0.17, "kinetics": 0.01, "howto100m": 0.1, "yt_temporal_1b": 0.72},
    "videomix22m": {"ssv2": 0.056, "kinetics": 0.188, "howto100m": 0.318, "yt_temporal_1b": 0.188},
}


@pytest.mark.parametrize(("option", "picture"), [("visionmix", "lvd142m"), ("videomix22m", "imagenet")])
def test_a_papers_mixture_has_its_weights_and_asks_for_every_path_by_key(option: str, picture: str) -> None:
    keys = [f"data.video.sources.{name}.path" for name in MIXTURES[option]]
    keys.append(f"data.image.sources.{picture}.path")
    with pytest.raises(ConfigError, match="no value for") as refused:
        load_config("vit_gigantic", "primary", options=[option])
    assert all(key in str(refused.value) for key in keys)
    with pytest.raises(ConfigError, match=rf"no value for {keys[0]}: set it"):
        load_config("vit_gigantic", "primary", [f"{key}=/there" for key in keys[1:]], options=[option])
    config = load_config("vit_gigantic", "primary", [f"{key}=/there" for key in keys], options=[option])
    assert {name: source.weight for name, source in config.data.video.sources.items()} == MIXTURES[option]
    assert list(config.data.image.sources) == [picture]
    assert all(config.check(world) >= 1 for world in (8, 128))
    batch = config.train.batch
    assert option == "visionmix" or batch.image / (batch.image + batch.video) == 0.25


@pytest.mark.parametrize("key", ["frames=8", "size=32", "views=2", "local={views: 1}", "view_times=own"])
def test_a_source_may_not_have_clips_of_another_shape(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key.partition('=')[0]}.*SourceClipConfig"):
        load_config("debug", "primary", [f"data.video.sources.debug.clip.{key}"])


def test_a_sources_own_clip_settings_are_checked_with_the_modalitys() -> None:
    config = load_config("debug", "primary", ["data.video.sources.debug.clip={fps: 2, flip: 0}"])
    assert (config.data.video.clip_of("debug").fps, config.data.video.clip_of("debug").flip) == (2.0, 0.0)
    assert config.data.video.clip_of("debug").size == config.data.video.clip.size
    with pytest.raises(ConfigError, match=r"sources\.debug\.clip\.scale_max=0\.1: must be between scale_min="):
        load_config("debug", "primary", ["data.video.sources.debug.clip.scale_max=0.1"])


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.video\.order.*random"):
        load_config("debug", "primary", ["data.video.order=random"])


@pytest.mark.parametrize(("alias", "recipe"), [("vitg16", "vit_giant"), ("vitG16", "vit_gigantic")])
def test_the_papers_names_are_understood(alias: str, recipe: str) -> None:
    assert load_config(alias, "primary", SOURCES).recipe == recipe


def test_every_maker_of_data_that_a_recipe_may_name_exists() -> None:
    assert {"none", *prepare._MAKE} == set(MAKERS)


def test_data_is_made_for_a_source_that_has_one_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prepare\.nobody=debug makes one shard folder.* called nobody lie in none"):
        prepare.prepare_data(load_config("debug", "primary", [f"run_dir={tmp_path}", "prepare.nobody=debug"]))
    elsewhere = f"data.image.sources.debug.path={tmp_path / 'elsewhere'}"
    with pytest.raises(ConfigError, match="give them one path"):
        prepare.prepare_data(load_config("debug", "primary", [f"run_dir={tmp_path}", elsewhere]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", variants(Path("out")), ids=lambda variant: variant.name)
def test_every_ablation_is_a_configuration_that_differs_from_the_demo(variant: Variant) -> None:
    options = [text.removeprefix("--option=") for text in variant.overrides if text.startswith("--option=")]
    overrides = [text for text in variant.overrides if not text.startswith("--option=")]
    config = load_config("demo", "primary", overrides, options=options)
    config.check()
    assert (config == load_config("demo", "primary")) == (variant.name == "reference")


def test_xformers_is_not_compiled() -> None:
    settings = ["run_dir=r", "model.attention=xformers", "train.parallel.compile=true"]
    with pytest.raises(ConfigError, match=r"xformers cannot be compiled, .*: set model\.attention=auto"):
        load_config("debug", "primary", settings).check()
    load_config("debug", "primary", settings[:2]).check()


def test_masks_are_drawn_where_something_is_predicted_and_there_must_be_some() -> None:
    none = ["run_dir=unused", "mask.video.short=null", "mask.video.long=null"]
    with pytest.raises(ConfigError, match=r"mask\.video is empty but train\.batch\.video=12"):
        load_config("debug", "primary", none).check(needs_sources=False)
    local = ["data.video.clip.local.size=32", "data.image.clip.local.size=32"]
    config = load_config("debug", "primary", [*none, *local, "train.micro_batch.video=4"], options=["lejepa"])
    assert config.check(needs_sources=False) == 3
    assert not config.masks.video
