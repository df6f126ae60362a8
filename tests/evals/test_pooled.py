"""Whole clips of one's own files: each number against a truth, one command for all, the same on two ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

import vjepa
from evals.clip_protocol import ClipReader
from evals.features import EncoderFeatures, FeatureSource, PixelFeatures
from evals.media import list_media
from evals.pca import whitened_pca
from evals.pooled import evaluate
from evals.pooled_config import PooledConfig, list_pooled, load_pooled
from evals.pooled_features import AS_IT_IS, BACKWARD, STILL, pool, pooled_table, shuffled
from evals.pooled_probe import Rows, held_out_keys
from evals.protocol import Row
from evals.registry import GROUPS, find
from evals.run import main
from evals.tasks import pooled_motion
from tests.evals.rendered import MOTIONS, moving_square, write_video
from tests.train.ranks import on_ranks
from vjepa import hub
from vjepa.config import ConfigError
from vjepa.train.distributed import ALONE, World, init_world

NOWHERE = Path("nowhere")
IMAGES = ["clips.frames=1", "clips.size=16"]
VIDEOS = ["clips.frames=8", "clips.frame_step=1", "clips.size=32"]
SHORT = ["fit.steps=60", "fit.batch_size=16", "fit.lrs=[0.01,0.1]"]


@dataclass(frozen=True)
class Colour:
    """The mean colour of every frame, of which nothing tells their order."""

    name: str = "colour"

    def tokens(self, clips: Tensor) -> Tensor:
        return clips.float().mean(dim=(3, 4)).transpose(1, 2)[:, :, None, None]  # [B, T, 1, 1, C]


@dataclass(frozen=True)
class Changes:
    """How far a frame lies from the one before it moved 2 pixels in each direction, and how much brighter it is."""

    name: str = "changes"

    def tokens(self, clips: Tensor) -> Tensor:
        grey = clips.float().mean(dim=1)  # [B, T, H, W]
        before, after = grey[:, :-1], grey[:, 1:]
        shifts = [(2 * rows, 2 * columns) for rows, columns in MOTIONS.values()]
        parts = [(after - before.roll(shift, dims=(2, 3))).abs() for shift in shifts] + [after - before]
        return torch.stack([part.mean(dim=(2, 3)) for part in parts], dim=2)[:, :, None, None]  # [B, T - 1, 1, 1, 5]


def settings(name: str, root: Path, *overrides: str) -> PooledConfig:
    return load_pooled(name, [f"data.root={root}", *overrides])


def scores(source: FeatureSource, config: PooledConfig, *, pictures: Path = NOWHERE, world: World = ALONE) -> Any:
    return {each.task: each.value for each in evaluate(source, config, pictures, world=world)}


def paint(path: Path, pixels: Sequence[int] | np.ndarray) -> None:
    """An image of one colour, or of these pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = np.broadcast_to(np.asarray(pixels, dtype=np.uint8), (16, 16, 3)) if np.ndim(pixels) == 1 else pixels
    Image.fromarray(np.ascontiguousarray(picture)).save(path)


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos whose class is the motion: 5 of each to train on, 3 to score."""
    root = tmp_path_factory.mktemp("moving")
    for split, count, first in (("train", 5, 0), ("val", 3, 10_000)):
        for number, motion in enumerate(MOTIONS):
            for i in range(count):
                write_video(root / split / motion / f"{i}.mp4", moving_square(motion, first + 100 * i + number))
    return root


@pytest.fixture(scope="module")
def brightening(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten videos of noise that becomes brighter, each at its own pace, and a copy of one."""
    root = tmp_path_factory.mktemp("brightening")
    drawn = np.random.default_rng(0)
    for number in range(10):
        noise = drawn.integers(0, 60, (1, 32, 32, 3)) + np.arange(8)[:, None, None, None] * drawn.uniform(8, 20)
        write_video(root / f"{number}.mp4", noise.astype(np.uint8))
    shutil.copy(root / "3.mp4", root / "copy.mp4")
    return root


# ------------------------------------------------------------------------------------------------- neighbours


def test_k_nn_is_that_of_sklearn(tmp_path: Path) -> None:
    drawn, labels = np.random.default_rng(0), {"train": [], "val": []}
    for split, count in (("train", 12), ("val", 8)):
        for label, tint in enumerate(((40, 0, 0), (0, 40, 0), (0, 0, 40))):
            for i in range(count):
                pixels = drawn.integers(0, 120, (16, 16, 3)) + drawn.integers(0, 120, 3) + np.array(tint)
                paint(tmp_path / split / f"c{label}" / f"{i:02}.png", pixels.clip(0, 255).astype(np.uint8))
                labels[split].append(label)
    config, source = settings("knn", tmp_path, *IMAGES, "neighbours=[5,20]"), PixelFeatures(8, 1)
    found = scores(source, config)
    features = {}
    for split in labels:
        clips = [
            ClipReader(config.clips).validate(path, ordinal=0)[0, 0] for path in sorted(tmp_path.glob(f"{split}/*/*"))
        ]
        features[split] = source.tokens(torch.stack(clips)).mean(dim=(1, 2, 3)).numpy()
    for k, name in ((20, "pooled_knn"), (5, "pooled_knn_k5")):
        weights: Any = lambda distance: np.exp((1 - distance) / 0.07)  # noqa: E731 (its type is told wrongly)
        oracle = KNeighborsClassifier(k, metric="cosine", weights=weights).fit(features["train"], labels["train"])
        assert found[name] == pytest.approx(oracle.score(features["val"], labels["val"]))
    assert 0.34 < found["pooled_knn_k5"] < 1


def test_rankings_are_scored_as_by_hand(tmp_path: Path) -> None:
    red, orange, green, blue = (250, 0, 0), (250, 100, 0), (0, 250, 0), (20, 60, 250)
    for split, label, name, colour in (
        ("train", "a", "orange", orange), ("train", "a", "green", green), ("train", "b", "red", red),
        ("train", "b", "blue", blue), ("val", "a", "red", red), ("val", "b", "blue", blue),
    ):  # fmt: skip
        paint(tmp_path / split / label / f"{name}.png", colour)
    found = scores(Colour(), settings("retrieval", tmp_path, *IMAGES, "at=[1,2]"))
    reds = (1 / 2 + 2 / 4) / 2  # red, called a, finds red (b), orange (a), blue (b), green (a)
    blues = (1 / 1 + 2 / 4) / 2  # blue, called b, finds blue (b), green (a), orange (a), red (b)
    assert found == pytest.approx({
        "pooled_retrieval": (reds + blues) / 2, "pooled_retrieval_recall@1": 1 / 2, "pooled_retrieval_recall@2": 1,
    })  # fmt: skip
    others = scores(Colour(), settings("retrieval", tmp_path, *IMAGES, "at=[1]", "leave_one_out=true"))
    assert others["pooled_retrieval_recall@1"] == pytest.approx(1 / 4), "green alone finds its own class first, orange"


# ------------------------------------------------------------------------------------------------------ statistics


def test_statistics_are_those_computed_by_hand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (6, 3))
    for number, colour in enumerate(colours):
        paint(tmp_path / "deep" / "er" / f"{number}.png", colour)
    found = scores(Colour(), settings("statistics", tmp_path, *IMAGES))
    rows = colours.astype(np.float64)
    shares = np.linalg.svd(rows, compute_uv=False)
    shares /= shares.sum()
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert found["pooled_statistics"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    assert found["pooled_statistics_clips_rankme"] == pytest.approx(found["pooled_statistics"], rel=1e-5)
    assert found["pooled_statistics_tokens_std"] == pytest.approx(rows.std(axis=0).mean(), rel=1e-5)
    assert found["pooled_statistics_tokens_cosine"] == pytest.approx(((unit @ unit.T).sum() - 6) / 30, rel=1e-4)
    assert found["pooled_statistics_tokens_dead_share"] == 0
    assert "there are 6 tokens, not 25600" in caplog.text
    assert "fewer than" not in caplog.text


def test_as_many_tokens_are_drawn_as_are_asked_for_by_the_seed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(4):
        paint(tmp_path / f"{number}.png", np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    asked = [settings("statistics", tmp_path, *IMAGES, "tokens=10", f"seed={seed}") for seed in (0, 0, 1)]
    first, again, other = (scores(PixelFeatures(4, 1), config) for config in asked)
    assert first == again != other
    assert first["pooled_statistics"] <= 10, "as many rows at most"
    assert "tokens: 10 rows are fewer than 72 channels, which bounds the ranks" in caplog.text
    caplog.clear()
    scores(Colour(), settings("statistics", tmp_path, *IMAGES, "tokens=4"))
    assert not caplog.text
    few = scores(Colour(), settings("statistics", tmp_path, *IMAGES, "max_files=1", "clips.frames=4", "tokens=2"))
    assert not any("clips" in name for name in few), "one clip has no statistics"


# ----------------------------------------------------------------------------------------------------------- motion


def test_what_a_probe_knows_of_motion_is_gone_where_clips_stand_still(moving: Path) -> None:
    config = settings("motion_only", moving, *VIDEOS, *SHORT)
    found = scores(Changes(), config)
    clip, still, mixed = (found[f"pooled_motion_only_{name}"] for name in ("clip", "still", "shuffled"))
    assert clip > 0.9
    assert still <= 0.42, "chance is .25, and 5 of 12 videos are within one of it in twenty"
    assert found["pooled_motion_only"] == pytest.approx(clip - still)
    assert found["pooled_motion_only_order"] == pytest.approx(clip - mixed)
    assert found["pooled_motion_only_chance"] == 0.25


def test_changes_keep_the_frames_they_say() -> None:
    clip = torch.arange(6).view(1, 6, 1, 1).expand(3, 6, 2, 2)
    frames = {change.name: change.apply(clip)[0, :, 0, 0].tolist() for change in (AS_IT_IS, STILL, BACKWARD)}
    assert list(frames.values()) == [[0, 1, 2, 3, 4, 5], [3] * 6, [5, 4, 3, 2, 1, 0]]
    orders = [shuffled(seed).apply(clip)[0, :, 0, 0].tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == [0, 1, 2, 3, 4, 5] != orders[0]
    assert shuffled(0).name != shuffled(1).name, "a cache knows them by their names"
    assert all(shuffled(seed).apply(clip[:, :2])[0, :, 0, 0].tolist() == [1, 0] for seed in range(8))
    with pytest.raises(ValueError, match=r"set clips\.frames"):
        shuffled(0).apply(clip[:, :1])


def test_the_arrow_of_time_is_seen_by_what_knows_order_and_by_nothing_else(brightening: Path) -> None:
    config = settings("arrow_of_time", brightening, *VIDEOS, *SHORT, "clips.segments=1")
    assert scores(Changes(), config)["pooled_arrow_of_time"] == 1
    blind = scores(Colour(), config)
    assert blind["pooled_arrow_of_time"] == 0.5 == blind["pooled_arrow_of_time_chance"], "both ways look the same"


def test_no_video_nor_its_copy_is_on_both_sides(brightening: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[set[float]]] = []

    def recorded(*parts: Rows, **_: object) -> Any:
        rows = [set(part.features[:, 0].tolist()) for part in parts[:3]]
        seen.append(rows)
        return pooled_motion.ProbeHits((0.0,), len(parts[2]), 0)

    monkeypatch.setattr(pooled_motion, "probe", lambda train, held, test, *_, **__: recorded(train, held, test))
    config = settings("arrow_of_time", brightening, *VIDEOS, "clips.segments=1", "folds=3")
    evaluate(Colour(), config, NOWHERE)
    for train, held, test in seen:
        assert not (train | held) & test
        assert not train & held
        assert held
        assert len(train | held | test) == 10, "a mean colour says which video it is; one has a copy"
    assert len(set().union(*(test for _, _, test in seen))) == sum(len(test) for _, _, test in seen) == 10
    with pytest.raises(ValueError, match=r"1 different folders do not divide into folds=3"):
        evaluate(Colour(), replace(config, group_by_folder=True), NOWHERE)  # pyright: ignore[reportCallIssue]


def test_held_out_files_are_some_and_not_all() -> None:
    keys = [str(number) for number in range(40)]
    held = held_out_keys(keys, 0.1, seed=0)
    assert len(held) == 4
    assert held == held_out_keys(keys[::-1], 0.1, seed=0) != held_out_keys(keys, 0.1, seed=1)
    assert len(held_out_keys(["a", "b", "b"], 0.9, seed=0)) == 1
    with pytest.raises(ValueError, match="there is 1 file to train on"):
        held_out_keys(["a", "a"], 0.1, seed=0)


# ------------------------------------------------------------------------------------------------------------- pca


def test_a_picture_shows_whitened_components() -> None:
    tokens = torch.randn(2, 5, 6, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)
    colours, share = whitened_pca(tokens)
    components = colours.double().logit().flatten(0, 2) / 2
    torch.testing.assert_close(components.std(dim=0, correction=0), torch.ones(3).double(), rtol=1e-4, atol=0)
    values = (
        np.linalg.svd(tokens.flatten(0, 2).numpy() - tokens.flatten(0, 2).mean(dim=0).numpy(), compute_uv=False) ** 2
    )
    assert share == pytest.approx(values[:3].sum() / values.sum(), rel=1e-5)
    flat, _ = whitened_pca(torch.full((1, 3, 3, 5), 7.3))
    assert (flat == 0.5).all()


# ------------------------------------------------------------------------------------------------ files and features


def test_mean_and_spread_over_time_are_read_out() -> None:
    tokens = torch.randn(2, 4, 3, 3, 5)
    found = pool(tokens, "mean_std").numpy()
    np.testing.assert_allclose(found[:, :5], tokens.numpy().mean(axis=(1, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(found[:, 5:], tokens.numpy().std(axis=1).mean(axis=(1, 2)), atol=1e-6)


def test_features_are_encoded_once_and_kept_by_content(moving: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    @dataclass(frozen=True)
    class Counting(Colour):
        def tokens(self, clips: Tensor) -> Tensor:
            seen.append(len(clips))
            return super().tokens(clips)

    config = settings("knn", moving, *VIDEOS, f"cache.folder={tmp_path / 'cache'}", "batch_clips=3", "workers=2")
    paths = sorted(moving.glob("val/*/*.mp4"))
    first = pooled_table(Counting(), paths, config, "mean")
    assert (sum(seen), max(seen)) == (12, 3)
    again = [shutil.copy(path, tmp_path / f"{number}.mp4") for number, path in enumerate(paths)]
    assert torch.equal(pooled_table(Counting(), list(map(Path, again)), config, "mean").values, first.values)
    assert sum(seen) == 12, "known by what is in them"
    live = pooled_table(Colour(), paths, settings("knn", moving, *VIDEOS), "mean", changes=(AS_IT_IS, STILL))
    torch.testing.assert_close(live.values[:, :1], first.values)
    assert not torch.equal(live.values[:, 0], live.values[:, 1])


def test_damaged_files_are_named_or_left_out(
    brightening: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("0", "1"):
        shutil.copy(brightening / f"{name}.mp4", tmp_path / f"{name}.mp4")
    (tmp_path / "00_broken.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"00_broken\.mp4: .*data\.skip_damaged=true goes on"):
        scores(Colour(), settings("statistics", tmp_path, *VIDEOS))
    with_it = scores(Colour(), settings("statistics", tmp_path, *VIDEOS, "data.skip_damaged=true", "tokens=6"))
    assert "1 of 3 files are left out" in caplog.text
    (tmp_path / "00_broken.mp4").unlink()
    without = scores(Colour(), settings("statistics", tmp_path, *VIDEOS, "tokens=6"))
    assert with_it["pooled_statistics_clips_std"] == pytest.approx(without["pooled_statistics_clips_std"])
    (tmp_path / "0.mp4").write_bytes(b"")
    (tmp_path / "1.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="none of 2 files could be decoded"):
        scores(Colour(), settings("statistics", tmp_path, *VIDEOS, "data.skip_damaged=true"))


def test_a_link_to_a_folder_above_is_walked_once(tmp_path: Path) -> None:
    """It would be followed some forty times, and every file be there as often."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.mp4").write_bytes(b"")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert list_media(tmp_path) == [tmp_path / "a" / "1.mp4"]


def test_folders_of_frames_are_videos_where_that_is_said(tmp_path: Path) -> None:
    for number in range(4):
        paint(tmp_path / "one" / f"{number}.png", (10 * number, 0, 0))
    files, videos = (settings("statistics", tmp_path, f"data.frame_folders={each}") for each in ("false", "true"))
    assert [len(config.describe().split()) for config in (files, videos)] == [5, 2]
    with pytest.raises(ValueError, match="holds no videos"):
        settings("arrow_of_time", tmp_path).describe()
    assert str(tmp_path / "one") in settings("arrow_of_time", tmp_path, "data.frame_folders=true").describe()


# ---------------------------------------------------------------------------------------------------------- two ranks


def everything(moving: Path, brightening: Path, pictures: Path, world: World) -> list[float]:
    """A number of every kind, with files and rows that do not divide evenly."""
    encoder = EncoderFeatures("tiny", vjepa.create_model("vit_debug", patch_size=16, seed=0))
    fit = ["fit.steps=5", "fit.batch_size=8", "fit.lrs=[0.01,0.1]"]
    found = []
    for name, root, *more in (
        ("knn", moving), ("retrieval", moving), ("linear", moving, *fit), ("arrow_of_time", brightening, *fit),
        ("statistics", brightening), ("pca", brightening, "files=3"),
    ):  # fmt: skip
        config = settings(str(name), Path(root), *VIDEOS, *map(str, more))
        found += scores(encoder, config, pictures=pictures, world=world).values()
    return found


def everything_on_this_rank(moving: Path, brightening: Path, pictures: Path) -> list[float]:
    with init_world("cpu") as world:
        return everything(moving, brightening, pictures, world)


@pytest.mark.distributed
def test_two_ranks_measure_what_one_process_measures(moving: Path, brightening: Path, tmp_path: Path) -> None:
    expected = everything(moving, brightening, tmp_path / "one", ALONE)
    for found in on_ranks(2, everything_on_this_rank, moving, brightening, tmp_path / "two"):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    pictures = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert pictures[0] == pictures[1] == ["00_0.png", "01_1.png", "02_2.png"]


# --------------------------------------------------------------------------------------------------------- the command


def rows_of(out: Path) -> list[Row]:
    return [Row(**json.loads(line)) for line in (out / "evals" / "results.jsonl").read_text().splitlines()]


def test_one_command_asks_everything_of_a_folder_once(
    moving: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = hub.save_pretrained(vjepa.create_model("vit_debug", patch_size=16, seed=5), tmp_path / "model")
    short = [f"{name}.fit.{each}" for name in ("linear", "motion_only", "arrow_of_time")
             for each in ("steps=3", "lrs=[0.1]", "batch_size=8")]  # fmt: skip
    small = [f"pooled.{each}" for each in (*VIDEOS, f"cache.folder={tmp_path / 'cache'}")]
    asked = ["--model", str(model), "--suite", "pooled", f"data.root={moving}", "pca.files=2", *small, *short]
    out = tmp_path / "out"
    assert main([*asked, "--out", str(out), "--report"]) == 0
    rows = rows_of(out)
    assert {row.model for row in rows} == {"trained", "untrained", "rgb"}
    headlines = {f"pooled_{name}": ("accuracy", True) for name in ("knn", "linear", "arrow_of_time")}
    headlines |= {"pooled_retrieval": ("mAP", True), "pooled_motion_only": ("accuracy difference", True),
                  "pooled_statistics": ("rankme", True), "pooled_pca": ("explained variance", False)}  # fmt: skip
    assert {row.task: (row.metric, row.higher_is_better) for row in rows if row.task in headlines} == headlines
    assert {row.task for row in rows} >= {"pooled_knn_k200", "pooled_retrieval_recall@10", "pooled_motion_only_still"}
    assert (out / "report.html").read_text().count("<img ") == 2 * 3
    assert {path.name for path in (out / "pictures" / "pca").iterdir()} == {"trained", "untrained", "rgb"}
    capsys.readouterr()
    assert main([*asked, "--out", str(out)]) == 0
    assert capsys.readouterr().err.count("done before") == 7 * 3
    assert rows_of(out) == rows


def test_what_is_missing_is_named_and_the_rest_is_measured(
    brightening: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--model", "untrained:vit_debug", "--suite", "knn,retrieval,pca", f"data.root={brightening}"]
    asked += ["pooled.clips.size=16", "pooled.clips.frames=2", "pca.files=1", "--out", str(tmp_path)]
    assert main(asked) == 2
    message = capsys.readouterr().err
    for words in ("2 of 3 sets are missing", "- knn: ", "train/CLASS/FILE", "- retrieval:", "leave_one_out=true"):
        assert words in message, words
    assert main([*asked, "--skip-missing"]) == 0
    assert {row.task for row in rows_of(tmp_path)} == {"pooled_pca"}
    assert main(["--model", "untrained:vit_debug", "--suite", "pca", f"data.root={tmp_path / 'none'}"]) == 2
    assert f"{tmp_path / 'none'} is no folder. Expected as data.root: a folder with videos or images" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("suite", "override", "message"),
    [
        ("knn", "k=3", "knn: .*k"),
        ("knn", "headline=5", r"headline=5 must be one of neighbours=\[10, 20, 100, 200\]"),
        ("knn", "data.name=ucf", "data.name=ucf is unknown"),
        ("knn", "task=linear", "task says which settings there are"),
        ("knn", "clips.augment.flip=0.5", "for attentive probes"),
        ("linear", "fit.momentum=1", "fit: momentum=1"),
        ("linear", "fit.lrs=[]", "fit: .*at least one of each"),
        ("retrieval", "at=[0]", "ranks are at least 1"),
        ("arrow_of_time", "folds=1", "folds=1 must be at least 2"),
        ("arrow_of_time", "data.name=ssv2", "name"),
        ("statistics", "tokens=1", "tokens=1 must be at least 2"),
        ("pca", "files=0", "files=0 must be at least 1"),
        ("pca,knn", "clips.size=3", "whose is it"),
        ("pca", "dense.fit.steps=3", "fit|dense"),
    ],
)
def test_what_cannot_be_meant_is_refused(suite: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find(suite, ["data.root=x", override])


def test_recipes_have_their_sources_figures() -> None:
    recipes: dict[str, Any] = {name: load_pooled(name, ["data.root=x"]) for name in list_pooled()}
    assert tuple(recipes) == GROUPS["pooled"]
    assert all(config.source and config.task == name for name, config in recipes.items())
    assert (recipes["knn"].neighbours, recipes["knn"].headline, recipes["knn"].temperature) == (
        [10, 20, 100, 200],
        20,
        0.07,
    )
    fit = recipes["linear"].fit
    assert (len(fit.lrs), min(fit.lrs), max(fit.lrs), fit.steps, fit.batch_size) == (13, 1e-5, 0.1, 12_500, 128)
    assert (fit.momentum, fit.weight_decay, fit.standardise) == (0.9, 0, False)
    assert recipes["statistics"].tokens == 25_600
