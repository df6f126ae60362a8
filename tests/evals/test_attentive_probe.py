"""The engine trains attentive probes from files: motion is learnt, held-out data choose the head, caches agree."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import vjepa
from data_pipeline.decode import DecodeError
from evals import probe_tokens
from evals.dense_features import LevelFeatures
from evals.features import EncoderFeatures
from evals.grid import Draws, GridStateError
from evals.probe_config import ProbeConfig, load_probe
from evals.probe_tokens import Tokens, readable, stand_ins
from evals.tasks import attentive_probe
from evals.tasks.attentive_probe import build_task, evaluate, num_steps, run, scores_of
from tests.evals.rendered import write_video
from tests.evals.test_anticipation import features, make_epic
from tests.evals.test_probe_task import render
from vjepa.config import ConfigError

TINY = ["clips.frames=8", "clips.frame_step=1", "clips.segments=1", "clips.views=1", "clips.size=32"]
HEAD = ["head.num_heads=4", "head.depth=2", "augmented=false", "data.held_out=.2"]


def config_of(root: Path, *overrides: str) -> ProbeConfig:
    return load_probe("ssv2", ["data.name=folders", f"data.root={root}", *TINY, *HEAD, *overrides])


def untrained() -> EncoderFeatures:
    return EncoderFeatures("untrained", vjepa.create_model("vit_debug", patch_size=16, seed=0))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(tmp_path_factory.mktemp("videos"), train=28, validation=8)


def test_a_probe_learns_the_motion_of_rendered_videos(videos: Path, tmp_path: Path) -> None:
    """Four directions, chance .25: above .5, by the head that held-out videos prefer; the other hardly moves."""
    grid = ["grid.lr=[1e-7,2e-3]", "grid.weight_decay=[.01]", "schedule.epochs=40", "schedule.batch_size=32"]
    warmup = ["schedule.warmup_epochs=8", f"cache.folder={tmp_path / 'cache'}"]
    config = config_of(videos, *grid, *warmup)
    result = run(untrained(), config)
    assert result.grid.step == num_steps(config, build_task(config, untrained()).size("train"))
    last = config.schedule.lr(2e-3, result.grid.step - 1, result.grid.step)
    assert result.grid.optimizers[1].param_groups[0]["lr"] == last, "the recipe's schedule"
    assert result.choice.index == 1
    assert result.values[1]["accuracy"] > 0.5
    assert result.values[0]["accuracy"] < 0.5
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 4 * 36, "every video is encoded once"


def test_numbers_are_named_and_cached_ones_equal_live_ones(videos: Path, tmp_path: Path) -> None:
    config = config_of(
        videos, "clips.views=3", "grid.lr=[1e-3,1e-4]", "grid.weight_decay=[.1]", "schedule.epochs=1",
        "schedule.batch_size=16", "score_batch=5",
    )  # fmt: skip
    live = evaluate(untrained(), config)
    assert [score.task for score in live] == [
        "attentive_ssv2",
        "attentive_ssv2_accuracy_top5",
        "attentive_ssv2_max_over_heads",
    ]
    assert live[2].value >= live[0].value
    cached = replace(config, cache=replace(config.cache, folder=str(tmp_path / "cache")))
    assert evaluate(untrained(), cached) == live
    assert evaluate(untrained(), cached) == live, "read back"
    task = build_task(config, untrained())
    for part in ("held_out", "validation"):
        for mine, theirs in zip(
            Tokens.of(task, config).scored(part), Tokens.of(task, cached).scored(part), strict=True
        ):
            assert torch.equal(mine[0], theirs[0])
            assert torch.equal(mine[1], theirs[1])


def test_the_best_epoch_is_known_also_by_a_fit_that_goes_on(videos: Path, tmp_path: Path) -> None:
    """Validations in between change no weight; a fit that goes on knows the earlier ones."""
    grid = ["grid.lr=[3e-3,1e-4]", "grid.weight_decay=[.1]", "schedule.epochs=6", "schedule.batch_size=16"]
    cache = [f"cache.folder={tmp_path / 'cache'}", "data.held_out=.3"]
    once = run(untrained(), config_of(videos, *grid, *cache))
    config = config_of(videos, *grid, *cache, "schedule.val_every=2")
    result = run(untrained(), config)
    count = build_task(config, untrained()).size("train")
    assert list(result.grid.notes) == [str(2 * count // 16), str(4 * count // 16)]
    assert result.values == once.values
    seen = [*(value for values in result.grid.notes.values() for value in values), result.choice.max_over_heads]
    assert result.best_of_epochs == max(seen)
    names = [score.task for score in scores_of(result, config)]
    assert names[-2:] == ["attentive_ssv2_max_over_heads", "attentive_ssv2_max_over_heads_and_epochs"]
    kept = replace(config, state=str(tmp_path / "state"))
    run(untrained(), kept)
    again = run(untrained(), kept)  # of the stored end: nothing is trained, the earlier epochs are known
    assert (again.grid.notes, again.best_of_epochs) == (result.grid.notes, result.best_of_epochs)
    assert once.best_of_epochs == once.choice.max_over_heads


def test_a_state_goes_on_with_the_settings_and_files_it_is_of_alone(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other clips, levels or files ask for other heads, which have the same shapes."""
    short = ["grid.lr=[1e-3]", "grid.weight_decay=[.1]", "schedule.epochs=1", "schedule.batch_size=16"]
    fit = partial(config_of, videos, *short, f"state={tmp_path / 'state'}")
    run(untrained(), fit(), about="weights")
    for changed in ("clips.size=48", "clips.frames=4", "augmented=true", "head.eps=1e-6"):
        with pytest.raises(GridStateError, match="belongs to another fit: data and features was settings"):
            run(untrained(), fit(changed), about="weights")
    with pytest.raises(GridStateError, match=r"features weights, now .* features others"):
        run(untrained(), fit(), about="others")
    monkeypatch.setattr(attentive_probe, "describe_data", lambda config: "other files")
    with pytest.raises(GridStateError, match="belongs to another fit"):
        run(untrained(), fit(), about="weights")


def test_the_state_is_kept_as_often_as_is_said(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a probe of many heads and clips may take minutes."""
    kept: list[int] = []
    monkeypatch.setattr("evals.grid.fit.write_state", lambda found, path: kept.append(found.step))
    short = ["grid.lr=[1e-3]", "grid.weight_decay=[.1]", "schedule.epochs=2", "schedule.batch_size=16"]
    config = config_of(videos, *short, f"state={tmp_path / 'state'}", "save_every=2")
    steps = run(untrained(), config).grid.step
    assert kept == [*range(2, steps, 2), steps]
    assert config.numbers() == replace(config, save_every=1).numbers()
    with pytest.raises(ConfigError, match="save_every=0 at least 1"):
        config_of(videos, "save_every=0")


def test_a_cached_file_is_read_for_its_digest_once(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    digest = probe_tokens.content_digest
    monkeypatch.setattr(probe_tokens, "content_digest", lambda path: (read.append(path), digest(path))[1])
    several = ["clips.segments=2", "schedule.epochs=3", "schedule.batch_size=48", f"cache.folder={tmp_path}"]
    run(untrained(), config_of(videos, "grid.lr=[1e-3]", "grid.weight_decay=[.1]", "schedule.val_every=1", *several))
    assert read
    assert len(read) == len(set(read))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_video_is_named_or_skipped_with_a_word(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """In one line, from a loader process too; cached tokens are of the same files as live ones."""
    root = render(tmp_path / "videos", train=6, validation=2)
    for split in ("train", "val"):
        (root / split / "left" / "0.mp4").write_bytes(b"this is no video")
    short = [
        "grid.lr=[1e-3]",
        "grid.weight_decay=[.1]",
        "schedule.epochs=2",
        "schedule.batch_size=8",
        f"workers={workers}",
    ]
    with pytest.raises(
        DecodeError, match=r"^\S+left/0.mp4: [^\n]+\. data.skip_damaged=true goes on without such files$"
    ):
        run(untrained(), config_of(root, *short))
    skipping = config_of(root, *short, "data.skip_damaged=true", "data.held_out=.01")
    live = run(untrained(), skipping)
    assert live.values[0]["accuracy"] * 7 == pytest.approx(round(live.values[0]["accuracy"] * 7)), "7 of 8 are scored"
    cached = run(untrained(), replace(skipping, cache=replace(skipping.cache, folder=str(tmp_path / "cache"))))
    assert cached.values == live.values
    for mine, theirs in zip(cached.head.parameters(), live.head.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert f"{Path('train') / 'left' / '0.mp4'}" in caplog.text
    assert "skipped" in caplog.text


def test_what_stands_in_is_the_next_file_and_no_more_than_ten_are_tried() -> None:
    def read(sample: int) -> int:
        if sample in (3, 4):
            raise DecodeError(f"{sample} is damaged")
        return 10 * sample

    assert stand_ins(3, 5) == [3, 4, 0, 1, 2]
    assert len(stand_ins(3, 50)) == 10
    assert readable(read, stand_ins(3, 5), skip=True) == (0, 0)
    assert readable(read, [3, 4], skip=True) is None
    with pytest.raises(DecodeError, match="3 is damaged"):
        readable(read, stand_ins(3, 5), skip=False)


def test_the_order_of_a_long_fit_is_made_as_it_is_wanted(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, asked = config_of(videos, "schedule.batch_size=8"), list[int]()
    ordinals = Draws.ordinals
    monkeypatch.setattr(
        Draws, "ordinals", lambda self, step, world: (asked.append(step), ordinals(self, step, world))[1]
    )
    Tokens.of(build_task(config, untrained()), config).training(1000)(990)
    assert asked == [990]


def test_training_clips_are_augmented_by_their_turn(videos: Path) -> None:
    config = replace(config_of(videos, "schedule.batch_size=8"), augmented=True)
    task = build_task(config, untrained())
    count = task.size("train")
    steps = num_steps(config, count)
    tokens, labels = Tokens.of(task, config).training(steps)(0)
    assert tokens.shape == (8, 4 * 4, 48)
    again = Tokens.of(task, config).training(steps)
    assert torch.equal(again(0)[0], tokens)
    seen = [again(step)[1] for step in range(1, count // 8)]
    assert len(torch.cat([labels, *seen])) <= count
    with_worker = Tokens.of(task, replace(config, workers=1)).training(steps)
    assert torch.equal(with_worker(1)[0], Tokens.of(task, config).training(steps)(1)[0]), "a fit that goes on at step 1"


def test_training_without_augmentation_sees_the_middle_of_three_views(tmp_path: Path) -> None:
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 32, 64, 3), dtype=np.uint8)
        for split in ("train", "val"):
            write_video(tmp_path / split / str(number % 2) / f"{number}.mp4", pixels)
    config = config_of(tmp_path, "clips.views=3", "data.held_out=1e-9", "schedule.batch_size=4")
    task = build_task(config, untrained())
    found, labels = Tokens.of(task, config).training(1)(0)
    kept = Tokens.of(task, replace(config, cache=replace(config.cache, folder=str(tmp_path / "cache"))))
    cached, cached_labels = kept.training(1)(0)
    order = [Draws(4, 4, config.seed).sample(place) for place in range(4)]
    clips = task.dataset("validation")  # the same four videos
    middle = torch.stack([clips[sample]["clips"][1, 0] for sample in order])
    expected = LevelFeatures("one", untrained().encoder, (untrained().encoder.levels[-1],)).tokens(middle).flatten(1, 3)
    for tokens, classes in ((found, labels), (cached, cached_labels)):
        assert torch.allclose(tokens, expected, atol=1e-6)
        assert classes.tolist() == [clips[sample]["labels"] for sample in order]


def test_anticipation_is_trained_and_scored(tmp_path: Path) -> None:
    make_epic(tmp_path)
    sizes = ["clips.frames=4", "clips.fps=4.0", "clips.size=16", "head.num_heads=4", "head.depth=2", "data.held_out=.4"]
    fit = ["grid.lr=[1e-3]", "grid.weight_decay=[.1]", "schedule.epochs=2", "schedule.batch_size=2"]
    config = load_probe("ek100", [f"data.root={tmp_path}", *sizes, *fit])
    found = {score.task: score.value for score in evaluate(features(fps=4.0), config)}
    assert found == {
        "attentive_ek100": 1,
        "attentive_ek100_verb_recall@5": 1,
        "attentive_ek100_noun_recall@5": 1,
    }, "few classes, five answers"
    with pytest.raises(ValueError, match="needs an encoder and its predictor"):
        evaluate(untrained(), config)


def test_what_cannot_be_is_refused(videos: Path) -> None:
    with pytest.raises(ConfigError, match=r"cache\.folder is set, but no clips are the same"):
        config_of(videos, "cache.folder=x", "clips.validation_offset=random")
    with pytest.raises(ConfigError, match=r"schedule\.val_every=0 must be at least 1"):
        config_of(videos, "schedule.val_every=0")
    with pytest.raises(ConfigError, match="score_batch=0 and save_every=500 at least 1"):
        config_of(videos, "score_batch=0")
    config = config_of(videos, "data.held_out=.0001")
    with pytest.raises(ValueError, match="the part held_out is empty"):
        run(untrained(), config)
