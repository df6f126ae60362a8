"""Recipes are read and refused, and a probe learns from rendered files what a single frame does not show."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import vjepa
from evals.anticipation import AnticipationFeatures
from evals.dense_features import LevelFeatures
from evals.features import EncoderFeatures
from evals.labelled_layouts import DATASETS
from evals.probe_config import ProbeConfig, list_recipes, load_probe
from evals.probe_task import AnticipationTask, ClassificationTask, FileClips, ProbeTask
from tests.evals.rendered import MOTIONS, moving_square, write_video
from tests.evals.test_anticipation import features, make_epic
from vjepa.config import ConfigError

# ---------------------------------------------------------------------------------------------------------- recipes

PAPER = {  # frames, segments, views, step or fps, size, epochs, heads, batch (evaluation.md 1.1)
    "ssv2": (16, 2, 3, 4, 256, 20, 20, 256),
    "ssv2_384": (64, 2, 3, 2, 384, 20, 20, 256),
    "k400": (16, 8, 3, 4, 256, 20, 20, 256),
    "coin": (16, 8, 3, 4, 256, 20, 20, 256),
    "diving48": (32, 4, 3, 2, 256, 100, 3, 128),
    "jester": (32, 4, 3, 2, 256, 100, 3, 128),
    "in1k": (16, 1, 1, 1, 256, 20, 20, 1024),
    "ek100": (32, 1, 1, 8.0, 256, 20, 20, 128),
}


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_has_the_papers_figures(name: str) -> None:
    config = load_probe(name, ["data.root=/data"])
    clips, schedule = config.clips, config.schedule
    protocol = (clips.frames, clips.segments, clips.views, clips.frame_step or clips.fps, clips.size)
    assert (*protocol, schedule.epochs, len(config.grid.settings()), schedule.batch_size) == PAPER[name]
    assert config.source
    assert (clips.augment.flip, clips.augment.erase, clips.validation_offset) == (0, 0.25, "centre")
    assert (config.head.depth, config.head.num_heads, config.head.eps) == (4, 16, 1e-5)


def test_every_set_has_a_recipe() -> None:
    named = {load_probe(name, ["data.root=/data"]).data.name for name in list_recipes()}
    assert named == set(DATASETS) - {"folders"} | {"ek100"}
    assert set(list_recipes()) == set(PAPER)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("clip.size=3", "Key 'clip' not in 'ProbeConfig'"),
        ("clips.augment.scale_mn=1", "scale_mn"),
        ("clips.augment.scale_min=2", r"scale_min=2\.0 and scale_max=1\.0"),
        ("data.name=ucf", "data.name=ucf is unknown"),
        ("grid.lr=[0.0]", r"lr=\[0\.0\] must be positive"),
        ("schedule.warmup_epochs=20", r"warmup_epochs=20\.0 below epochs"),
        ("levels=[0]", "blocks count from 1"),
        ("head.depth=0", "depth, num_heads, mlp_ratio and eps must be positive"),
        ("data.name=ek100", "ek100 takes one clip by its rate"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_probe("ssv2", ["data.root=/data", override])


def test_an_unknown_recipe_and_a_missing_root_are_named() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'ssv2'"):
        load_probe("sssv2")
    with pytest.raises(ConfigError, match=r"no value for data\.root"):
        load_probe("ssv2")


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    schedule = load_probe("in1k", ["data.root=/data"]).schedule  # 5 of 20 epochs from 2e-4
    assert [schedule.lr(1e-3, step, 800) for step in (0, 100, 200, 800)] == pytest.approx([2e-4, 6e-4, 1e-3, 0])
    assert schedule.lr(1e-3, 500, 800) == pytest.approx(5e-4)


def test_levels_count_from_one_and_need_a_norm() -> None:
    encoder = vjepa.create_model("vit_debug", patch_size=8, seed=0)
    depth = encoder.config.depth
    config = load_probe("ssv2", ["data.root=/data"])
    assert config.blocks(encoder) == (depth - 1,)
    assert replace(config, levels=[]).blocks(encoder) == encoder.levels
    with pytest.raises(ValueError, match=f"block {depth + 1} .from 1. has no norm"):
        replace(config, levels=[depth + 1]).blocks(encoder)


# ------------------------------------------------------------------------------------------------------ from files


def render(root: Path, *, train: int, validation: int) -> Path:
    for split, count, first in (("train", train, 0), ("val", validation, 10_000)):
        for number, motion in enumerate(MOTIONS):
            for i in range(count):
                pixels = moving_square(motion, first + 100 * i + number)
                write_video(root / split / motion / f"{i}.mp4", pixels)
    return root


def tiny_config(root: Path, *overrides: str) -> ProbeConfig:
    sizes = ["clips.frames=8", "clips.frame_step=1", "clips.segments=1", "clips.size=32"]
    head = ["head.num_heads=4", "head.depth=2"]
    return load_probe("ssv2", ["data.name=folders", f"data.root={root}", *sizes, *head, *overrides])


def untrained() -> EncoderFeatures:
    return EncoderFeatures("untrained", vjepa.create_model("vit_debug", patch_size=16, seed=0))


def read_all(task: ClassificationTask, dataset: FileClips) -> tuple[Tensor, Tensor]:
    batches = [(task.tokens(batch), batch["labels"]) for batch in DataLoader(dataset, batch_size=16)]
    return torch.cat([tokens for tokens, _ in batches]), torch.cat([labels for _, labels in batches])


def test_a_probe_learns_the_motion_of_rendered_videos(tmp_path: Path) -> None:
    """Four directions, chance .25, tokens of an untrained encoder: a loop of the engine's kind reaches above .6."""
    task = ClassificationTask.build(tiny_config(render(tmp_path, train=24, validation=8), "clips.views=1"), untrained())
    plain = replace(task.dataset("train"), is_train=False)  # without augmentation, read once
    (tokens, labels), (test, truth) = read_all(task, plain), read_all(task, task.dataset("validation"))
    head = task.make_head(0).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    for step in range(110):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 20)
        rows = torch.randperm(len(tokens), generator=generator)[:32]
        loss = task.loss(head(tokens[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    score = task.new_score("validation")
    head.eval()
    for part, true in zip(test.split(10), truth.split(10), strict=True):
        score.update(head(part), true)
    assert score.state[2] == 32
    assert score.values()["accuracy"] > 0.6
    assert score.values()["accuracy_top5"] == 1


def test_one_head_is_trained_on_all_of_the_training_set(tmp_path: Path) -> None:
    """There is nothing to choose: what is held out would be lost."""
    root = render(tmp_path, train=4, validation=1)
    one = tiny_config(root, "data.held_out=.5", "grid.lr=[1e-3]", "grid.weight_decay=[.1]")
    task = ClassificationTask.build(one, untrained())
    assert (task.size("train"), task.size("held_out")) == (16, 0)
    two = tiny_config(root, "data.held_out=.5", "grid.lr=[1e-3,1e-4]", "grid.weight_decay=[.1]")
    assert 0 < ClassificationTask.build(two, untrained()).size("train") < 16


def test_batches_hold_views_segments_and_labels(tmp_path: Path) -> None:
    config = tiny_config(
        render(tmp_path, train=4, validation=1), "clips.segments=2", "clips.views=3", "data.held_out=.3"
    )
    source = LevelFeatures("levels", untrained().encoder, untrained().encoder.levels, join="tokens")
    task: ProbeTask = ClassificationTask.build(config, source)
    assert task.size("train") + task.size("held_out") == 16
    assert task.size("held_out") > 0
    assert task.size("validation") == 4
    levels, train, held = len(source.encoder.levels), task.dataset("train", epoch=2), task.dataset("held_out")
    batch = next(iter(DataLoader(train, batch_size=3)))
    assert batch["clips"].shape == (3, 1, 2, 3, 8, 32, 32)
    assert task.tokens(batch).shape == (3, 2 * levels * 16, 48)
    batch = next(iter(DataLoader(task.dataset("validation"), batch_size=2)))
    assert batch["clips"].shape == (2, 3, 2, 3, 8, 32, 32)
    assert task.tokens(batch).shape == (2 * 3, 2 * levels * 16, 48)
    assert batch["labels"].tolist() == [0, 1]
    assert not torch.equal(train[0]["clips"], task.dataset("train", epoch=3)[0]["clips"])  # augmented by epoch
    assert torch.equal(held[0]["clips"], task.dataset("held_out", epoch=3)[0]["clips"])
    score = task.new_score("validation")
    score.update(task.make_head(0).eval()(task.tokens(batch)), batch["labels"])
    assert score.state.tolist()[1:] == [2, 2], "of four classes, every one is among the first five"
    assert task.headline in score.values()


def test_anticipation_runs_from_its_tables_to_its_recalls(tmp_path: Path) -> None:
    make_epic(tmp_path)
    sizes = ["clips.frames=4", "clips.fps=4.0", "clips.size=16", "head.num_heads=4", "head.depth=2", "data.held_out=.4"]
    config = load_probe("ek100", [f"data.root={tmp_path}", *sizes])
    source: AnticipationFeatures = features(fps=4.0)
    task = AnticipationTask.build(config, source)
    asked: ProbeTask = task
    assert asked.size("train") + asked.size("held_out") == 3
    assert asked.size("validation") == 1, "the pair (take, cup) never occurs in training"
    batch = next(iter(DataLoader(asked.dataset("validation"), batch_size=2)))
    assert (batch["clips"].shape, batch["seconds"].tolist()) == ((1, 1, 3, 4, 16, 16), [1.0])
    tokens = asked.tokens(batch)
    assert torch.equal(tokens, source.tokens(batch["clips"][:, 0], torch.tensor([1.0])))
    head, score = asked.make_head(0), asked.new_score("validation")
    asked.loss(head(tokens), batch["labels"]).backward()
    score.update(head.eval()(tokens), batch["labels"])
    assert score.state[1].tolist() == [0, 1, 0, 1, 0, 0, 1], "counts of verbs, nouns and actions side by side"
    assert score.values() == {"verb_recall@5": 1, "noun_recall@5": 1, "action_recall@5": 1}
    assert asked.headline in score.values()
