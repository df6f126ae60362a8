"""The recipes of a ViT-S from few data, and its benchmark at a tiny size: which frames are seen, and that it trains."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.config import load_config
from launch.train import main as train
from tests.benchmarks.pretrain_vit_small import RECIPES, _film, make_shards, rgbd_frames, training_arguments
from vjepa import from_pretrained

TINY = (
    *("model.name=vit_debug", "model.levels=[2,4]", "predictor.depth=1", "predictor.embed_dim=48"),
    *(
        "train.steps=2",
        "train.batch={video: 2, image: 2}",
        "train.diagnostics_every=1",
        "train.optim.lr.warmup_steps=1",
        "train.device=cpu",
        "mask.group={video: 2, image: 2}",
    ),
    *("data.workers=0", "data.video.clip.size=64", "data.image.clip.size=64", "train.tensorboard=false"),
)


def pictures(paths: Sequence[Path]) -> list[Path]:
    """Noise of 96 x 64 pixels."""
    noise = np.random.default_rng(0)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (64, 96, 3), dtype=np.uint8)).save(path)
    return list(paths)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a small tree in the shape of shared/."""
    folder = tmp_path_factory.mktemp("vit_small")
    tree, camvid = folder / "shared", folder / "shared" / "data" / "camvid" / "images"
    for split in ("train", "val", "test"):
        frames = pictures([camvid / split / f"{split}_{number:02}.jpg" for number in range(20)])
    (tree / "clips").mkdir()
    for name in ("a_film.mp4", "co-tracker__bear.mp4"):
        _film(frames, tree / "clips" / name, fps=15)
    scene = tree / "data" / "rgbd_7scenes" / "frames"
    pictures([scene / f"frame-{number:06}.color.jpg" for number in range(440, 704, 8)])
    make_shards(tree, folder / "shards", jobs=1)
    return folder


def sources(shards: Path) -> set[str]:
    indices = shards.glob("*.index.jsonl")
    return {Path(json.loads(line)["source_path"]).name for path in indices for line in path.read_text().splitlines()}


def test_no_frame_of_a_test_split_and_none_of_davis_is_trained_on(out: Path) -> None:
    assert sources(out / "shards" / "clips") == {"a_film.mp4"}
    camvid = {f"{split}_{number:02}.jpg" for split in ("train", "val") for number in range(20)}
    assert sources(out / "shards" / "camvid") == camvid | {"camvid_val.mp4"}
    rgbd = {f"frame-{number:06}.color.jpg" for number in range(440, 600, 8)}
    assert sources(out / "shards" / "rgbd") == rgbd | {"rgbd_train.mp4"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipes_train_on_them_in_bf16_and_export_their_encoder(out: Path, recipe: str) -> None:
    run = out / f"run_of_{recipe}"
    assert train(training_arguments(out, recipe, [f"run_dir={run}", *TINY])) == 0
    encoder = from_pretrained(run / "exports" / "primary")
    assert encoder.config.absolute_position == 1
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 2
    assert {"loss/masked_prediction", "loss/vicreg"} <= row.keys()


def test_a_run_that_was_begun_goes_on(tmp_path: Path) -> None:
    assert "--resume" not in training_arguments(tmp_path, "vit_small", ())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    assert "--resume" in training_arguments(tmp_path, "vit_small", ())


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipes_ask_for_their_sources_and_have_shares_for_all_of_them(tmp_path: Path, recipe: str) -> None:
    with pytest.raises(ValueError, match=r"data\.video\.sources\.NAME\.path"):
        load_config(recipe, "primary").check()
    arguments = training_arguments(tmp_path, recipe, ())
    config = load_config(recipe, "primary", [word for word in arguments if "=" in word])
    config.check()
    for part in config.data.modalities().values():
        assert sum(source.weight for source in part.sources.values()) == pytest.approx(1)


def test_the_splits_at_hand_are_those_that_the_table_names(shared: Path) -> None:
    names = [path.name for path in rgbd_frames(shared)]
    assert (len(names), names[0], names[-1]) == (75, "frame-000000.color.jpg", "frame-000592.color.jpg")
    splits = {split: len(list((shared / "data/camvid/images" / split).iterdir())) for split in ("train", "val")}
    assert splits == {"train": 367, "val": 101}
