"""Every evaluation that has a name runs on tiny made data by its own recipe, made short; one without a set fails."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vjepa
from data_pipeline.prepare.digits import DigitsConfig, make_digits
from evals.comparison import compare
from evals.models import EncoderModel
from evals.registry import GROUPS, LOADERS, find
from tests.evals.dense_scenes import DEPTHS, scene, write, write_camvid, write_rgbd
from tests.evals.test_anticipation import features, make_epic
from tests.evals.test_labelled_sets import CLIPS
from tests.evals.test_probe_task import render
from tests.evals.test_run import write_davis

Maker = Callable[[Path], list[str]]
"""Writes a set and says what is shorter or smaller than in its recipe."""
FIT = ["fit.steps=1", "fit.warmup_steps=0", "fit.batch_size=1", "fit.lrs=[1e-3]", "fit.weight_decays=[0]"]
SMALL = [*FIT, "view.short_side=48", "view.crop=[48,64]", "view.stride=32", "augment.crop=[48,64]"]
PROBE = ["clips.size=32", "clips.views=1", "head.depth=2", "head.num_heads=4", "grid.lr=[1e-3]", "data.held_out=.3"]
PROBE += ["grid.weight_decay=[.1]", "schedule.epochs=2", "schedule.batch_size=4", "schedule.warmup_epochs=0"]


# -------------------------------------------------------------------------------------------------------- dense sets


def ade20k(root: Path) -> list[str]:
    for number, split in enumerate(("training", "validation")):
        image, classes = scene(number)
        write(root / "images" / split / "a.png", image)
        write(root / "annotations" / split / "a.png", classes)
    return SMALL


def cityscapes(root: Path) -> list[str]:
    for number, split in enumerate(("train", "val")):
        image, classes = scene(number)
        write(root / "leftImg8bit" / split / "town" / "a_leftImg8bit.png", image)
        write(root / "gtFine" / split / "town" / "a_gtFine_labelTrainIds.png", classes)
    return SMALL


def voc12(root: Path) -> list[str]:
    for number, split in enumerate(("train", "val")):
        image, classes = scene(number)
        write(root / "JPEGImages" / f"{split}.jpg", image)
        write(root / "SegmentationClass" / f"{split}.png", classes)
        listing = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text(f"{split}\n")
    return [*SMALL, "data.train_split=train"]


def camvid(root: Path) -> list[str]:
    write_camvid(root, {"train": 2, "test": 1})
    return FIT


def depth_frame(picture: Path, depth: Path, number: int, height: int, width: int, per_millimetre: float) -> None:
    image, classes = scene(number, height, width)
    write(picture, image)
    write(depth, (DEPTHS[classes] * per_millimetre).astype(np.uint16))


def nyuv2(root: Path) -> list[str]:
    for number, split in enumerate(("train", "test")):
        folder = root / split / "room"
        depth_frame(folder / "rgb_1.jpg", folder / "sync_depth_1.png", number, 480, 640, 1)
    return FIT


def kitti(root: Path) -> list[str]:
    for number, split in enumerate(("train", "test")):
        depth_frame(root / f"{split}.png", root / f"{split}_depth.png", number, 352, 1216, 0.256)
        (root / f"kitti_eigen_{split}.txt").write_text(f"{split}.png {split}_depth.png 721.5\n")
    return FIT


def rgbd(root: Path) -> list[str]:
    write_rgbd(root, 3)
    return [*FIT, "data.train_split='0:2'", "data.test_split='2:'"]


# ------------------------------------------------------------------------------------------------------------ videos


def davis(root: Path) -> list[str]:
    write_davis(root)
    (root / "ImageSets" / "2016").mkdir()
    (root / "ImageSets" / "2016" / "val.txt").write_text("right\n")
    return ["propagation.short_side=64"]


def youtube_vos(root: Path) -> list[str]:
    """Of the five videos of a training set one is held out; each is the same square, from the first frame on."""
    davis(root / "made")
    for number in range(5):
        for kind in ("JPEGImages", "Annotations"):
            (root / kind).mkdir(exist_ok=True)
            (root / kind / f"v{number}").symlink_to(root / "made" / kind / "480p" / "right")
    objects = {"1": {"category": "square", "frames": ["00000"]}}
    about = {"videos": {f"v{number}": {"objects": objects} for number in range(5)}}
    (root / "meta.json").write_text(json.dumps(about))
    return ["propagation.short_side=64"]


def videos(root: Path) -> list[str]:
    render(root, train=2, validation=1)
    return [*PROBE, "data.name=folders", "clips.frames=4", "clips.frame_step=1", "clips.segments=2"]


def images(root: Path) -> list[str]:
    for split, count in (("train", 6), ("val", 2)):
        for number in range(2 * count):
            folder = root / split / f"n{number % 2:02}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(scene(number)[0]).save(folder / f"{number}.JPEG")
    return [*PROBE, "clips.frames=2"]


def epic(root: Path) -> list[str]:
    make_epic(root)
    return [*PROBE, "clips.frames=4", "clips.fps=4.0", "clips.size=16", "data.held_out=.4", "schedule.batch_size=2"]


def digits(root: Path) -> list[str]:
    make_digits(root, DigitsConfig(**CLIPS))
    return ["seeds=1"]


# ----------------------------------------------------------------------------------------- one's own videos and images


SHORT_CLIPS = ["clips.frames=4", "clips.frame_step=1", "clips.segments=2", "clips.size=32"]
SHORT_FIT = ["fit.steps=2", "fit.batch_size=2", "fit.lrs=[.1]"]


def labelled_videos(root: Path) -> list[str]:
    render(root, train=3, validation=2)
    return SHORT_CLIPS


def fitted_videos(root: Path) -> list[str]:
    return [*labelled_videos(root), *SHORT_FIT]


def unlabelled_videos(root: Path) -> list[str]:
    return [*labelled_videos(root), "tokens=64"]


MAKERS: Mapping[str, Maker] = {
    "ade20k": ade20k,
    "cityscapes": cityscapes,
    "voc12": voc12,
    "camvid": camvid,
    "nyuv2": nyuv2,
    "kitti": kitti,
    "rgbd": rgbd,
    **dict.fromkeys(("davis2016", "davis2017"), davis),
    "youtube_vos": youtube_vos,
    **dict.fromkeys(("ssv2", "ssv2_384", "k400", "diving48", "coin", "jester"), videos),
    "in1k": images,
    "ek100": epic,
    **dict.fromkeys(("motion", "fine_motion"), digits),
    **dict.fromkeys(("knn", "retrieval", "pca"), labelled_videos),
    **dict.fromkeys(("linear", "motion_only", "arrow_of_time"), fitted_videos),
    "statistics": unlabelled_videos,
}
REAL = {"camvid": "camvid", "rgbd": "rgbd_7scenes"}  # shared/data


def model_for(name: str) -> EncoderModel:
    """A tiny encoder, with the predictor that anticipation asks for; digits are drawn for patches of 8."""
    if name == "ek100":
        source = features(fps=4.0)
        return EncoderModel("tiny", source.encoder, source.predictor)
    return EncoderModel("tiny", vjepa.create_model("vit_debug", patch_size=8 if MAKERS[name] is digits else 16, seed=0))


def run(name: str, root: Path, out: Path, overrides: list[str]) -> None:
    """A finite number under the task of the set's name, of the model and of every floor."""
    [evaluation] = find(name, [f"{name}.data.root={root}", *overrides])
    found = compare([evaluation], [model_for(name)], out, stage="tiny", say=lambda line: None)
    assert (found.missing, found.unsuited) == ({}, [])
    assert {row.model for row in found.rows} == {"tiny", *evaluation.floors}
    assert all(math.isfinite(row.value) for row in found.rows)
    assert found.rows[0].task.endswith(name)


@pytest.mark.parametrize("name", LOADERS)
def test_it_runs_on_a_tiny_set(name: str, tmp_path: Path) -> None:
    assert name in MAKERS, f"{name} has no tiny set: write it above, so that it is known to run"
    root = tmp_path / "set"
    root.mkdir()
    run(name, root, tmp_path / "out", MAKERS[name](root))


def test_groups_are_made_of_names_that_are_tested() -> None:
    assert set().union(*GROUPS.values()) <= set(MAKERS) == set(LOADERS)


@pytest.mark.parametrize("name", REAL)
def test_it_runs_on_real_images(name: str, shared: Path, tmp_path: Path) -> None:
    root = shared / "data" / REAL[name]
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    run(name, root, tmp_path, [*FIT, "data.limit=2"])
