"""Linear segmentation and depth on tiny rendered scenes: fitted, chosen, scored, cached, resumed, shared by ranks."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

import vjepa
from evals import floors
from evals.cache import GIB, LiveFeatures, Request
from evals.dense_config import DepthConfig, SegmentationConfig, load_depth, load_segmentation
from evals.dense_features import LevelFeatures, RgbPosition
from evals.dense_images import Ahead, Images
from evals.dense_sets import DenseSetError, open_segmentation
from evals.features import FeatureSource
from evals.grid import GridStateError, Setting
from evals.metrics import ConfusionMatrix
from evals.protocol import IGNORE, Score
from evals.references import RgbPatches
from evals.tasks import linear_depth, linear_segmentation
from tests.evals.dense_scenes import HEIGHT, WIDTH, Colours, scene, write, write_camvid, write_rgbd
from tests.train.ranks import on_ranks
from vjepa.config import ConfigError
from vjepa.train.distributed import ALONE, World, init_world

SMALL = ["fit.steps=60", "fit.batch_size=4", "fit.warmup_steps=5", "fit.lrs=[0.05]", "fit.weight_decays=[0]"]


@pytest.fixture(scope="module")
def camvid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_camvid(tmp_path_factory.mktemp("camvid"), {"train": 8, "test": 3})


@pytest.fixture(scope="module")
def rgbd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rgbd(tmp_path_factory.mktemp("rgbd"), 11)


def segmentation(root: Path, *changes: str) -> SegmentationConfig:
    return load_segmentation("camvid", [f"data.root={root}", "label_stride=1", *SMALL, *changes])


def depth(root: Path, *changes: str) -> DepthConfig:
    splits = ["data.train_split='0:8'", "data.test_split='8:'"]
    return load_depth("rgbd", [f"data.root={root}", "label_stride=1", *splits, *SMALL, *changes])


def values(scores: list[Score]) -> dict[str, float]:
    return {score.task: score.value for score in scores}


def headline(scores: list[Score]) -> float:
    return scores[0].value


# ------------------------------------------------------------------------------------------------------ the metric


@pytest.mark.parametrize("seed", range(3))
def test_miou_is_that_of_torchmetrics(seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    predicted, labels = torch.randint(0, 6, (2, 4, 20, 30), generator=drawn)
    labels[torch.rand(labels.shape, generator=drawn) < 0.2] = IGNORE
    predicted[predicted == 5], labels[labels == 5] = 4, 3  # a class that is nowhere
    oracle = MulticlassJaccardIndex(num_classes=6, ignore_index=IGNORE, average="macro")
    counts = ConfusionMatrix(6)
    for guess, truth in zip(predicted, labels, strict=True):
        oracle.update(guess, truth)
        counts.update(guess, truth)
    assert counts.miou() == pytest.approx(oracle.compute().item(), abs=1e-6)


# ---------------------------------------------------------------------------------------------------- segmentation


def test_classes_that_colours_tell_apart_are_learnt(camvid: Path) -> None:
    result = linear_segmentation.run(Colours(), segmentation(camvid, "per_class=true"))
    scores = result.meter.scores()
    assert scores["mIoU"] > 0.75  # borders between blocks of 16 pixels are blurred by the bilinear step
    assert scores["accuracy"] > 0.85
    assert [name for name in scores if name.startswith("IoU")] == ["IoU_sky", "IoU_building", "IoU_pole"]
    assert int(result.meter.counts.sum()) == 3 * (HEIGHT - 2) * WIDTH  # void rows count nowhere
    predicted, truth = linear_segmentation.predicted_classes(result, 1)
    assert predicted.shape == truth.shape == (HEIGHT, WIDTH)
    assert (predicted == truth)[2:].float().mean() > 0.8


def test_names_of_scores_and_the_maximum_over_heads(camvid: Path) -> None:
    config = segmentation(camvid, "fit.lrs=[1e-6,0.05]", "fit.held_out=0.25")
    scores = linear_segmentation.evaluate(Colours(), config)
    names = [
        "linear_segmentation_camvid",
        "linear_segmentation_camvid_accuracy",
        "linear_segmentation_camvid_max_over_heads",
    ]
    assert [score.task for score in scores] == names
    assert [score.metric for score in scores] == ["mIoU", "accuracy", "mIoU"]
    result = linear_segmentation.run(Colours(), config)
    assert result.grid.settings[result.choice.index] == Setting(0.05, 0.0)
    assert scores[0].value == result.choice.value <= result.choice.max_over_heads == scores[2].value


def test_steps_that_end_within_the_warm_up_are_warned_of(camvid: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`fit.steps=5` for a try leaves the recipe's warm-up of 83."""
    linear_segmentation.run(Colours(), segmentation(camvid, "fit.steps=5"))
    assert "linear_segmentation_camvid: fit.steps=5 end within fit.warmup_steps=5: no head reaches" in caplog.text
    caplog.clear()
    linear_segmentation.run(Colours(), segmentation(camvid, "fit.steps=6"))
    assert not caplog.text


def test_held_out_images_are_not_fitted(camvid: Path) -> None:
    config = segmentation(camvid, "fit.lrs=[0.01,0.05]", "fit.held_out=0.25")
    train, _ = linear_segmentation.open_splits(config)
    fitted, held_out = linear_segmentation_split(config)
    assert held_out is not None
    assert sorted([*fitted, *held_out]) == sorted(item.key for item in train.items)
    assert len(held_out) == 2


def linear_segmentation_split(config: SegmentationConfig) -> tuple[list[str], list[str] | None]:
    from evals.dense_fit import split_held_out

    fitted, held_out = split_held_out(linear_segmentation.open_splits(config)[0], config)
    return [item.key for item in fitted.items], None if held_out is None else [item.key for item in held_out.items]


def test_sliding_windows_score_what_the_whole_image_scores(camvid: Path) -> None:
    """A head that looks at one token at a time sees the same in windows, but for the blur at their edges."""
    whole = headline(linear_segmentation.evaluate(Colours(), segmentation(camvid)))
    slide = segmentation(camvid, "view.edges=resize", "view.short_side=48", "view.crop=[32,32]", "view.stride=16")
    assert headline(linear_segmentation.evaluate(Colours(), slide)) == pytest.approx(whole, abs=0.08)


def test_cached_features_give_the_same_numbers_without_the_source(camvid: Path, tmp_path: Path) -> None:
    class Once(Colours):
        asked = 0

        def tokens(self, clips: Tensor) -> Tensor:
            self.asked += len(clips)
            return super().tokens(clips)

    expected = linear_segmentation.evaluate(Colours(), segmentation(camvid))
    config = segmentation(camvid, f"cache.folder={tmp_path}")
    first, second = Once(), Once()
    assert linear_segmentation.evaluate(first, config) == expected
    assert linear_segmentation.evaluate(second, config) == expected
    assert (first.asked, second.asked) == (11, 0)


def test_training_images_that_stay_the_same_are_encoded_once(camvid: Path) -> None:
    class Counted(Colours):
        asked = 0

        def tokens(self, clips: Tensor) -> Tensor:
            self.asked += len(clips)
            return super().tokens(clips)

    def measure(*overrides: str) -> tuple[int, list[Score]]:
        source = Counted()
        scores = linear_segmentation.evaluate(source, segmentation(camvid, *overrides))
        return source.asked, scores

    (held, scores), (anew, expected) = measure(), measure("cache.memory_gib=0")
    assert scores == expected
    assert held == 11
    assert anew > 3 * held
    half = measure(f"cache.memory_gib={3 * 4 * 6 * 3 * 4 / GIB}")
    assert half[1] == expected
    assert held < half[0] < anew
    assert measure("augment.flip=0.5")[0] <= 2 * 11, "an image and its mirror image"
    with pytest.raises(ValueError, match=r"cache\.memory_gib=-1"):
        segmentation(camvid, "cache.memory_gib=-1")


def test_augmentation_trains_on_views_drawn_by_seed_and_ordinal(camvid: Path) -> None:
    drawn = segmentation(
        camvid, "augment.scale_min=0.75", "augment.scale_max=1.5", "augment.crop=[32,48]", "augment.flip=0.5",
        "augment.max_ratio=0.75", "augment.colours=true", "view.edges=resize", "view.short_side=48", "dropout=0.1",
    )  # fmt: skip
    first = linear_segmentation.evaluate(Colours(), drawn)
    assert first == linear_segmentation.evaluate(Colours(), drawn)
    ahead = replace(drawn, workers=2)
    assert first == linear_segmentation.evaluate(Colours(), ahead), "whoever reads them"
    assert ahead.numbers() == drawn.numbers()
    assert headline(first) > 0.5
    with pytest.raises(ValueError, match=r"nothing would be found again"):
        replace(drawn, cache=replace(drawn.cache, folder="somewhere"))


def test_threads_read_the_images_of_the_next_steps_and_no_others() -> None:
    made: list[tuple[int, bool]] = []
    here = threading.current_thread()

    def view(ordinal: int) -> tuple[Request, Tensor]:
        made.append((ordinal, threading.current_thread() is here))
        return Request("content", str(ordinal), Tensor), torch.zeros(1)

    def views_of(workers: int) -> Ahead:
        return Ahead(view, lambda step: range(2 * step, 2 * step + 2), 5, workers)

    def asked(ahead: Ahead, step: int) -> list[str]:
        return [request.view for request, _ in ahead(step)]

    plain, ahead = views_of(0), views_of(1)  # one thread: what is submitted first is made first
    assert asked(plain, 1) == ["2", "3"]
    assert made == [(2, True), (3, True)]
    made.clear()
    assert [asked(ahead, step) for step in (1, 2, 3, 4)] == [["2", "3"], ["4", "5"], ["6", "7"], ["8", "9"]]
    assert sorted(made) == [(ordinal, False) for ordinal in range(2, 10)], "each once, none behind the last step"


def test_an_image_is_decoded_once_for_all_of_its_windows(camvid: Path) -> None:
    config = segmentation(camvid, "view.crop=[16,32]", "view.stride=16", "view.short_side=48")
    data = open_segmentation("camvid", camvid, "test")
    decoded: list[int] = []

    class Item:
        key, content, truth = data.items[0].key, data.items[0].content, data.items[0].truth

        def image(self) -> Tensor:
            decoded.append(1)
            return data.items[0].image()

    counted = replace(data, items=(Item(),))  # pyright: ignore[reportArgumentType]
    tokens, plan = Images(counted, LiveFeatures(Colours()), 16, IGNORE).one(0, config.view, mirrored=True)[0]
    assert len(tokens) == 2 * len(plan.windows) > 8
    assert len(decoded) == 1


def test_mirrored_training_views_keep_image_and_truth_together(camvid: Path) -> None:
    mirrored = linear_segmentation.evaluate(Colours(), segmentation(camvid, "augment.flip=1.0"))
    assert headline(mirrored) > 0.75


@pytest.mark.parametrize("tokenizer", ["image", "video"])
def test_an_encoder_gives_its_levels_side_by_side(camvid: Path, tokenizer: str) -> None:
    encoder = vjepa.create_model("vit_debug", patch_size=16)
    last = LevelFeatures("untrained", encoder, (), tokenizer)  # pyright: ignore[reportArgumentType]
    both = LevelFeatures("untrained", encoder, encoder.levels[-2:], tokenizer)  # pyright: ignore[reportArgumentType]
    clips = torch.from_numpy(scene(0)[0]).permute(2, 0, 1)[None, :, None]
    assert last.tokens(clips).shape == (1, 1, 3, 4, encoder.embed_dim)
    assert torch.equal(both.tokens(clips)[..., encoder.embed_dim :], last.tokens(clips))
    assert last.identity != both.identity
    scores = values(linear_segmentation.evaluate(both, segmentation(camvid, "fit.steps=2")))
    assert 0 <= scores["linear_segmentation_camvid"] <= 1
    with pytest.raises(ValueError, match="no level norm"):
        LevelFeatures("untrained", encoder, (99,))


def test_the_tokenizers_differ() -> None:
    encoder = vjepa.create_model("vit_debug", patch_size=16)
    clips = torch.from_numpy(scene(0)[0]).permute(2, 0, 1)[None, :, None]
    image, video = (LevelFeatures("untrained", encoder, (), name).tokens(clips) for name in ("image", "video"))  # pyright: ignore[reportArgumentType]
    assert not torch.allclose(image, video)
    torch.testing.assert_close(video, LevelFeatures("u", encoder).tokens(clips.expand(-1, -1, 2, -1, -1)))


def test_the_location_prior_by_hand(tmp_path: Path) -> None:
    """The left half is class 1 in both training images, the right half 0 in one and void in the other."""
    left = scene(0)[1] * 0
    left[:, : WIDTH // 2] = 1
    void = left.copy()
    void[:, WIDTH // 2 :] = 11
    test = left * 0 + 1
    for split, truths in (("train", [left, void]), ("test", [test])):
        for number, truth in enumerate(truths):
            write(tmp_path / "images" / split / f"{number}.png", scene(number)[0])
            write(tmp_path / "labels" / split / f"{number}.png", truth)
    config = segmentation(tmp_path)
    scores = values(floors.location_prior(*linear_segmentation.open_splits(config), config))
    assert scores == {"linear_segmentation_camvid": pytest.approx(0.25), "linear_segmentation_camvid_accuracy": 0.5}


# ----------------------------------------------------------------------------------------------------------- depth


def test_depth_that_colours_tell_is_learnt(rgbd: Path) -> None:
    config = depth(rgbd, "mean_steps=10", "fit.steps=150", "fit.clip_grad=35")
    found = values(linear_depth.evaluate(Colours(), config))
    train, test = linear_depth.open_splits(config)
    constant = values(floors.constant_depth(train, test, config))
    location = values(floors.location_mean(train, test, config))
    assert found["linear_depth_rgbd"] < 0.6 * min(constant["linear_depth_rgbd"], location["linear_depth_rgbd"])
    assert found["linear_depth_rgbd_delta1"] > constant["linear_depth_rgbd_delta1"] + 0.3
    better_high = {score.metric: score.higher_is_better for score in floors.constant_depth(train, test, config)}
    assert (better_high["RMSE"], better_high["delta1"], better_high["AbsRel"]) == (False, True, False)


def test_the_constant_is_the_training_median(rgbd: Path) -> None:
    config = depth(rgbd)
    train, test = linear_depth.open_splits(config)
    known = torch.cat([item.truth()[item.truth() > 0] for item in train.items])
    errors = [(item.truth()[item.truth() > 0] - known.median()).square().mean().sqrt().item() for item in test.items]
    assert headline(floors.constant_depth(train, test, config)) == pytest.approx(sum(errors) / len(errors))


def test_flip_averaging_is_the_mean_with_the_mirrored_prediction(rgbd: Path) -> None:
    """A source that gives every token its column: averaged with its mirror image, depth no longer depends on it."""

    class Column:
        name = "column"
        identity = "column"

        def tokens(self, clips: Tensor) -> Tensor:
            height, width = clips.shape[-2] // 16, clips.shape[-1] // 16
            return torch.arange(width).float().expand(len(clips), 1, height, width)[..., None]

    plain = linear_depth.run(Column(), depth(rgbd, "fit.lrs=[0.5]")).predict(0)[0][0]
    averaged = linear_depth.run(Column(), depth(rgbd, "fit.lrs=[0.5]", "flip_average=true")).predict(0)[0][0]
    assert plain[20].std() > 1e-3
    torch.testing.assert_close(averaged, (plain + plain.flip(-1)) / 2)


def test_depth_is_augmented_as_in_nyuv2(rgbd: Path) -> None:
    drawn = depth(
        rgbd, "augment.border=[2,46,3,63]", "augment.rotate=2.5", "augment.crop=[32,48]", "augment.flip=0.5",
        "augment.brightness=0.25", "mean_steps=10",
    )  # fmt: skip
    first = linear_depth.evaluate(Colours(), drawn)
    assert first == linear_depth.evaluate(Colours(), drawn)
    train, test = linear_depth.open_splits(drawn)
    assert headline(first) < headline(floors.constant_depth(train, test, drawn))


# ------------------------------------------------------------------------------------------------------- real data


def test_the_location_prior_of_camvid_is_that_of_the_reference(shared: Path) -> None:
    if not (shared / "data" / "camvid").is_dir():
        pytest.skip("shared/data/camvid is not there")
    config = load_segmentation("camvid", [f"data.root={shared / 'data' / 'camvid'}"])
    scores = floors.location_prior(*linear_segmentation.open_splits(config), config)
    assert headline(scores) == pytest.approx(0.170, abs=0.005)  # reference evaluation.md 5.1


def test_constant_and_location_of_7scenes_are_those_of_the_reference(shared: Path) -> None:
    if not (shared / "data" / "rgbd_7scenes").is_dir():
        pytest.skip("shared/data/rgbd_7scenes is not there")
    config = load_depth("rgbd", [f"data.root={shared / 'data' / 'rgbd_7scenes'}"])
    train, test = linear_depth.open_splits(config)
    assert (len(train), len(test)) == (75, 37)
    assert headline(floors.constant_depth(train, test, config)) == pytest.approx(0.709, abs=0.002)
    assert headline(floors.location_mean(train, test, config)) == pytest.approx(0.525, abs=0.002)


# --------------------------------------------------------------------------------------------- stopping, and ranks


def test_a_stopped_evaluation_goes_on_and_another_is_refused(
    camvid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = segmentation(camvid, f"fit.state={tmp_path}", "fit.save_every=20", "fit.steps=40")
    expected = linear_segmentation.evaluate(Colours(), segmentation(camvid, "fit.steps=40"))
    task = linear_segmentation.segmentation_task
    with monkeypatch.context() as patch:

        def stopping(*arguments: object, step: int) -> Tensor:
            if step == 25:
                raise KeyboardInterrupt
            return linear_segmentation.pixel_loss(*arguments, step=step)  # pyright: ignore[reportArgumentType]

        patch.setattr(linear_segmentation, "segmentation_task", lambda *each: replace(task(*each), loss=stopping))
        with pytest.raises(KeyboardInterrupt):
            linear_segmentation.evaluate(Colours(), config)
    steps: list[int] = []

    def counting(*arguments: object, step: int) -> Tensor:
        steps.append(step)
        return linear_segmentation.pixel_loss(*arguments, step=step)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch:
        patch.setattr(linear_segmentation, "segmentation_task", lambda *each: replace(task(*each), loss=counting))
        assert linear_segmentation.evaluate(Colours(), config) == expected
    assert steps == list(range(20, 40))
    other = segmentation(camvid, f"fit.state={tmp_path}", "fit.steps=40", "augment.flip=0.5")
    with pytest.raises(GridStateError, match="data and features"):
        linear_segmentation.evaluate(Colours(), other)


def both_tasks(camvid: Path, rgbd: Path, world: World) -> list[float]:
    """Numbers of a small grid of each task and how much was scored; voids and unknown depths lie unevenly on ranks."""
    seg = segmentation(camvid, "fit.lrs=[0.01,0.05]", "fit.steps=3", "dropout=0.2", "augment.flip=0.5")
    dep = depth(rgbd, "fit.steps=3", "mean_steps=1", "fit.clip_grad=1", "flip_average=true")
    classes, metres = (
        linear_segmentation.run(Colours(), seg, world=world),
        linear_depth.run(Colours(), dep, world=world),
    )
    counted = [classes.meter.counts.sum().item(), float(metres.meter.images)]
    numbers = [*classes.meter.scores().values(), classes.choice.max_over_heads, *metres.meter.scores().values()]
    return [*counted, *numbers]


def both_on_this_rank(camvid: Path, rgbd: Path) -> list[float]:
    with init_world("cpu") as world:
        return both_tasks(camvid, rgbd, world)


@pytest.mark.distributed
def test_two_ranks_score_what_one_process_scores(camvid: Path, rgbd: Path) -> None:
    expected = both_tasks(camvid, rgbd, ALONE)
    for found in on_ranks(2, both_on_this_rank, camvid, rgbd):
        assert found == pytest.approx(expected, rel=1e-3)


# --------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", ["ade20k", "cityscapes", "voc12", "camvid"])
def test_every_segmentation_recipe_is_valid_and_says_where_its_figures_are_from(name: str) -> None:
    config = load_segmentation(name, ["data.root=/nowhere"])
    assert config.data.dataset == name
    with pytest.raises(DenseSetError, match="Nothing is downloaded"):
        linear_segmentation.open_splits(config)


@pytest.mark.parametrize("name", ["nyuv2", "kitti", "rgbd"])
def test_every_depth_recipe_is_valid(name: str) -> None:
    config = load_depth(name, ["data.root=/nowhere"])
    assert config.data.dataset == name
    with pytest.raises(DenseSetError, match="Nothing is downloaded"):
        linear_depth.open_splits(config)


def test_the_papers_figures_are_the_defaults_of_their_recipes() -> None:
    ade, city = (load_segmentation(name, ["data.root=/"]) for name in ("ade20k", "cityscapes"))
    assert len(ade.fit.settings) == 12
    assert (ade.fit.steps, ade.fit.batch_size, ade.fit.warmup_steps, ade.fit.schedule.at(0, 40_000)) == (
        40_000,
        16,
        1500,
        1e-6,
    )
    assert (ade.view.short_side, ade.view.crop, ade.view.stride, ade.dropout) == (512, [512, 512], 341, 0.1)
    assert (ade.augment.scale_min, ade.augment.scale_max, ade.augment.max_ratio) == (0.5, 2.0, 0.75)
    assert (city.view.short_side, city.fit.settings) == (1024, ade.fit.settings)
    nyu, kitti = (load_depth(name, ["data.root=/"]) for name in ("nyuv2", "kitti"))
    assert len(nyu.fit.settings) == 14
    assert (nyu.num_bins, nyu.min_depth, nyu.max_depth, nyu.mask, nyu.mean_steps) == (256, 1e-3, 10.0, "eigen", 100)
    assert (nyu.fit.steps, nyu.fit.warmup_steps, nyu.fit.beta2, nyu.fit.clip_grad) == (38_400, 12_800, 0.99, 35.0)
    assert (kitti.max_depth, kitti.mask, kitti.flip_average) == (80.0, "garg", True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fit.learning_rate=1", "learning_rate"),
        ("view.crop=[512]", "height and width"),
        ("fit.lrs=[]", "at least one of each"),
        ("levels=[0]", "count blocks from 1"),
        ("dropout=1.5", "dropout"),
        ("augment.flip=2", "flip"),
        ("cache.folder=x", "nothing would be found again"),
        ("fit.held_out=1", "held_out"),
        ("tokenizer=frames", "tokenizer"),
    ],
)
def test_what_a_recipe_cannot_mean_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_segmentation("ade20k", ["data.root=/", override])


@pytest.mark.parametrize("split", ["100:30", "700:", ":9", "0:600", "train"])
def test_splits_are_taken_as_they_are_written(split: str) -> None:
    """On a command line nobody writes quotes; 100:30 was 6030."""
    for value in (split, f"'{split}'"):
        assert load_depth("rgbd", ["data.root=x", f"data.train_split={value}"]).data.train_split == split


def test_a_recipe_without_root_or_of_another_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.root"):
        load_segmentation("ade20k")
    with pytest.raises(ConfigError, match="Recipes: ade20k, camvid, cityscapes, voc12"):
        load_segmentation("ade")


def test_images_that_do_not_fit_each_other_are_named(camvid: Path, tmp_path: Path) -> None:
    write_camvid(tmp_path, {"train": 4, "test": 1})
    write(tmp_path / "images" / "train" / "002.png", scene(2, 64, 64)[0])
    with pytest.raises(DenseSetError, match=r"002: the image is \[64, 64\], its truth \[48, 64\]"):
        linear_segmentation.evaluate(Colours(), segmentation(tmp_path))
    write(tmp_path / "labels" / "train" / "002.png", scene(2, 64, 64)[1])
    with pytest.raises(ValueError, match=r"images of a batch have the sizes .* set augment\.crop"):
        linear_segmentation.evaluate(Colours(), segmentation(tmp_path))


def test_pixels_with_their_place_are_a_source() -> None:
    clips = torch.from_numpy(scene(0)[0]).permute(2, 0, 1)[None, :, None]
    sources: list[FeatureSource] = [RgbPosition(), RgbPatches(cells=2)]
    assert [source.tokens(clips).shape[-1] for source in sources] == [3 * 64 + 24, 12]
    assert [source.name for source in sources] == ["rgb", "rgb_patches"]
