"""Anticipation: clips end before the action, the predictor answers for the right moment, scores are the benchmark's."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vjepa
from evals.anticipation import (
    AnticipationConfig,
    AnticipationFeatures,
    ClassMeanRecall,
    anticipation_loss,
    context_end,
    context_times,
    draw_aim,
    focal_loss,
    restrict,
)
from evals.attentive import AttentiveClassifiers, AttentiveConfig
from evals.augment import AugmentConfig
from evals.clip_protocol import ClipProtocol
from evals.epic_kitchens import Action, ActionClasses, EpicReader, EpicVideos, read_actions
from evals.labelled_files import DataMissing
from evals.probe_config import load_probe
from evals.probe_task import AnticipationTask
from evals.tasks.attentive_probe import describe_data
from tests.evals.rendered import ramp, write_video
from vjepa.batch import normalise
from vjepa.config import ConfigError, PredictorSettings
from vjepa.nn.encoder import View
from vjepa.registry import create_predictor

# ----------------------------------------------------------------------------------------------------- which frames


def test_a_clip_ends_before_the_actions_start_and_in_the_references_form_before_its_end() -> None:
    assert context_end(10.0, 14.0, 1.0, 0.0, "start_relative") == 9.0
    assert context_end(10.0, 14.0, 1.0, 0.0, "vjepa2_compat") == 13.0
    assert context_end(10.0, 14.0, 1.5, 0.25, "start_relative") == 9.5
    assert context_end(10.0, 14.0, 1.5, 0.25, "vjepa2_compat") == 11.5
    with pytest.raises(ValueError, match="ends before it begins"):
        context_end(3.0, 2.0, 1.0, 0.0, "start_relative")


def test_no_frame_is_from_the_clips_end_or_later() -> None:
    assert context_times(9.0, 4, 2.0).tolist() == [7.0, 7.5, 8.0, 8.5]
    assert context_times(1.0, 4, 2.0).tolist() == [0.0, 0.0, 0.0, 0.5]


def test_training_draws_its_aim_and_validation_does_not() -> None:
    config = AnticipationConfig()
    assert draw_aim(config, None) == (1.0, 0.0)
    drawn = np.array([draw_aim(config, np.random.default_rng(seed)) for seed in range(300)])
    assert 0.25 <= drawn[:, 0].min() < 0.35
    assert 1.65 < drawn[:, 0].max() <= 1.75
    assert 0 <= drawn[:, 1].min() < 0.02
    assert 0.23 < drawn[:, 1].max() <= 0.25


# ------------------------------------------------------------------------------------------------------ the tokens


def features(fps: float = 4.0) -> AnticipationFeatures:
    encoder = vjepa.create_model("vit_debug", patch_size=8, seed=0)
    settings = PredictorSettings(embed_dim=48, depth=2, num_heads=4, mask_token_std=0.02)
    predictor = create_predictor(settings.predictor_config(encoder.config), seed=0, weight_std=0.2)
    return AnticipationFeatures("tiny", encoder, predictor, fps)


def random_clips(count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 4, 16, 16), dtype=torch.uint8, generator=generator)


def test_tokens_are_the_encoders_and_the_predictors_of_the_moment() -> None:
    source, clips = features(), random_clips()
    tokens = source.tokens(clips, torch.tensor([1.0, 1.0]))
    assert tokens.shape == (2, 8 + 4, 48)
    normalised = normalise(clips)
    with torch.no_grad():
        torch.testing.assert_close(tokens[:, :8], source.encoder(normalised))
        levels = source.encoder.forward_levels([View(normalised)])[0][0]
        places = torch.arange(8).expand(2, -1), (8 + 2 * 4 + torch.arange(4)).expand(2, -1)  # 2 steps of .5 s later
        expected, _ = source.predictor(levels, context=places[0], masked=places[1], grid=(5, 2, 2), modality="video")
    torch.testing.assert_close(tokens[:, 8:], expected[..., -48:])


def test_each_clip_of_a_batch_is_asked_for_its_own_moment() -> None:
    source, clips = features(), random_clips()
    both = source.tokens(clips, torch.tensor([0.5, 1.75]))
    for i, ahead in enumerate((0.5, 1.75)):
        torch.testing.assert_close(both[i : i + 1], source.tokens(clips[i : i + 1], torch.tensor([ahead])))
    other = source.tokens(clips[:1], torch.tensor([1.75]))
    assert torch.equal(both[:1, :8], other[:, :8])
    assert (both[:1, 8:] - other[:, 8:]).abs().max() > 1e-4


def test_the_moment_of_the_reference() -> None:
    """32 frames at 8 fps and t_a = 1 s: 16 time steps, and 4 later, int(1 * 8 / 2); 1.74 s: 6 later, int(6.96)."""
    places, grid = features(fps=8.0).future_places((16, 2, 2), torch.tensor([1.0, 1.74]))
    assert places[:, 0].tolist() == [20 * 4, 22 * 4]
    assert grid == (23, 2, 2)


def test_a_predictor_of_another_encoder_is_refused() -> None:
    source = features()
    settings = PredictorSettings(embed_dim=48, depth=1, num_heads=4).predictor_config(source.encoder.config)
    with pytest.raises(ValueError, match="were trained together"):
        replace(source, predictor=create_predictor(replace(settings, encoder_dim=96), seed=0))
    with pytest.raises(ValueError, match="no levels of width 48"):
        replace(source, predictor=create_predictor(replace(settings, target_dim=100), seed=0))


# ------------------------------------------------------------------------------------------------ loss and metric


def test_the_focal_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 2.0], [-1.0, 0.5]], dtype=torch.float64)
    p = logits.sigmoid()
    expected = (
        -0.25 * (1 - p[0, 0]) ** 2 * p[0, 0].log()
        - 0.75 * p[0, 1] ** 2 * (1 - p[0, 1]).log()
        - 0.75 * p[1, 0] ** 2 * (1 - p[1, 0]).log()
        - 0.25 * (1 - p[1, 1]) ** 2 * p[1, 1].log()
    )
    torch.testing.assert_close(focal_loss(logits, torch.tensor([0, 1])), expected)
    flat = focal_loss(logits, torch.tensor([0, 1]), alpha=0.5, gamma=0.0)
    truth = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(
        2 * flat, torch.nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
    )


def test_the_loss_is_the_sum_over_questions() -> None:
    logits = {"verb": torch.randn(3, 4), "noun": torch.randn(3, 6)}
    labels = {"verb": torch.tensor([0, 1, 3]), "noun": torch.tensor([5, 0, 2])}
    expected = focal_loss(logits["verb"], labels["verb"]) + focal_loss(logits["noun"], labels["noun"])
    torch.testing.assert_close(anticipation_loss(logits, labels), expected)


@pytest.mark.filterwarnings("ignore")
def test_class_mean_recall_is_that_of_torchmetrics() -> None:
    torchmetrics = pytest.importorskip("torchmetrics.classification")
    generator = torch.Generator().manual_seed(0)
    occurring = torch.tensor([1, 2, 3, 5, 8, 9, 11, 13, 14, 17])  # of 20 classes
    labels = occurring[torch.randint(0, len(occurring), (200,), generator=generator)]
    logits = torch.randn(200, 20, generator=generator)
    logits[torch.arange(200), labels] += 0.7
    logits = restrict(logits, occurring)
    metric = torchmetrics.MulticlassRecall(num_classes=20, top_k=5, average="macro")
    expected = metric(logits, labels).item()
    assert 0.3 < expected < 0.95
    parts = ClassMeanRecall(20).update(logits[:77], labels[:77]).update(logits[77:], labels[77:])
    assert parts.value() == pytest.approx(expected, abs=1e-6)
    top1 = ClassMeanRecall(20, k=1).update(logits, labels).value()
    metric = torchmetrics.MulticlassRecall(num_classes=20, top_k=1, average="macro")
    assert top1 == pytest.approx(metric(logits, labels).item(), abs=1e-6)


def test_every_class_counts_alike_and_absent_ones_not() -> None:
    logits = torch.eye(4)[[0, 0, 0, 1, 2]]
    recall = ClassMeanRecall(4, k=1).update(logits, torch.tensor([0, 0, 0, 0, 2]))
    assert recall.value() == pytest.approx((3 / 4 + 1) / 2)
    with pytest.raises(ValueError, match="nothing was counted"):
        ClassMeanRecall(4).value()


# -------------------------------------------------------------------------------------------------- EPIC-Kitchens

HEADER = "narration_id,video_id,start_timestamp,stop_timestamp,verb,verb_class,noun,noun_class\n"


def make_epic(root: Path) -> None:
    (root / "EPIC_100_train.csv").write_text(
        f"{HEADER}a,P01_01,00:00:02.00,00:00:02.50,take,0,plate,2\nb,P01_01,00:00:02.20,00:00:02.70,put,1,plate,2\n"
        "c,P01_01,00:01:02.50,01:00:00.00,put,1,cup,13\n"
    )
    (root / "EPIC_100_validation.csv").write_text(
        f"{HEADER}d,P01_01,00:00:02.00,00:00:02.50,put,1,cup,13\ne,P01_01,00:00:02.00,00:00:02.50,take,0,cup,13\n"
    )
    write_video(root / "P01/videos/P01_01.MP4", ramp(28))


def test_actions_are_read_and_those_new_in_validation_are_known_as_such(tmp_path: Path) -> None:
    make_epic(tmp_path)
    train, validation = (read_actions(tmp_path, split) for split in ("train", "validation"))
    assert train[2] == Action("P01_01", 62.5, 3600.0, 1, 13)
    classes = ActionClasses.of(train)
    assert classes.counts == {"verb": 2, "noun": 2, "action": 3}
    assert [classes.knows(action) for action in validation] == [True, False]
    labels = classes.labels(train)
    assert {name: values.tolist() for name, values in labels.items()} == {
        "verb": [0, 1, 1],
        "noun": [0, 0, 1],
        "action": [0, 1, 2],
    }


def epic_protocol() -> ClipProtocol:
    plain = AugmentConfig(scale_min=1, aspect_min=1, aspect_max=1, erase=0, rand_augment=False)
    return ClipProtocol(frames=4, segments=1, views=1, frame_step=None, fps=5.0, size=16, augment=plain)


@pytest.mark.parametrize(("form", "last"), [("start_relative", 8), ("vjepa2_compat", 13)])
def test_a_context_clip_holds_the_frames_before_the_action(form: str, last: int, tmp_path: Path) -> None:
    """10 frames a second, the action from 2.0 to 2.5 s, t_a = 1 s: the last frame is from .8 or 1.3 s."""
    make_epic(tmp_path)
    config = AnticipationConfig(form=form)  # type: ignore[arg-type]
    reader = EpicReader(EpicVideos(tmp_path), epic_protocol(), config)
    clip, ahead = reader.validate(read_actions(tmp_path, "validation")[0])
    assert (tuple(clip.shape), ahead) == ((1, 3, 4, 16, 16), 1.0)
    numbers = ((clip[0].float().mean(dim=(0, 2, 3)) - 10) / 3).round().long()
    assert numbers.tolist() == [last - 6, last - 4, last - 2, last]


def test_training_clips_depend_on_seed_epoch_and_ordinal(tmp_path: Path) -> None:
    make_epic(tmp_path)
    reader = EpicReader(EpicVideos(tmp_path), epic_protocol(), AnticipationConfig())
    action = read_actions(tmp_path, "train")[0]
    clip, ahead = reader.train(action, ordinal=3, epoch=1)
    again, same = reader.train(action, ordinal=3, epoch=1)
    assert torch.equal(clip, again)
    assert ahead == same
    assert reader.train(action, ordinal=3, epoch=2)[1] != ahead


def test_frames_in_folders_are_read_at_their_own_rate(tmp_path: Path) -> None:
    make_epic(tmp_path)
    (tmp_path / "P01/videos/P01_01.MP4").unlink()
    folder = tmp_path / "P01/rgb_frames/P01_01"
    folder.mkdir(parents=True)
    for number, pixels in enumerate(ramp(28), start=1):
        Image.fromarray(pixels).save(folder / f"frame_{number:010d}.png")
    reader = EpicReader(EpicVideos(tmp_path), epic_protocol(), AnticipationConfig())
    action = read_actions(tmp_path, "validation")[0]
    with pytest.raises(DataMissing, match="has the rate of P01_01"):
        reader.validate(action)
    (tmp_path / "EPIC_100_video_info.csv").write_text("video_id,duration,fps,resolution\nP01_01,2.8,10.0,48x32\n")
    reader = EpicReader(EpicVideos(tmp_path), epic_protocol(), AnticipationConfig())
    numbers = ((reader.validate(action)[0][0].float().mean(dim=(0, 2, 3)) - 10) / 3).round().long()
    assert numbers.tolist() == [2, 4, 6, 8]


def test_videos_that_are_not_there_are_missed_before_anything_is_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_epic(tmp_path)
    with (tmp_path / "EPIC_100_train.csv").open("a") as table:
        table.write("f,P07_02,00:00:02.00,00:00:02.50,cut,7,leek,3\ng,P07_03,00:00:02.00,00:00:02.50,cut,7,leek,3\n")
    (tmp_path / "P07" / "rgb_frames" / "P07_03").mkdir(parents=True)
    config = load_probe("ek100", [f"data.root={tmp_path}"])
    with pytest.raises(DataMissing, match=r"video P07_02 is not below(.|\n)*2 of 3 videos of train.*skip_missing=true"):
        describe_data(config)
    skipping = load_probe("ek100", [f"data.root={tmp_path}", "data.skip_missing=true", "data.held_out=.4"])
    assert "P07" not in describe_data(skipping)
    task = AnticipationTask.build(skipping, features(fps=8.0))
    assert task.size("train") + task.size("held_out") == 3
    assert task.classes.counts["verb"] == 2, "what is left out is no class"
    assert "2 of 3 videos of train are not there; their actions are left out" in caplog.text
    with pytest.raises(ConfigError, match=r"leave data\.train_files"):
        load_probe("ek100", [f"data.root={tmp_path}", "data.train_files=mine.csv"])


def test_what_is_missing_is_described(tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match=r"no EPIC_100_train\.csv.*\n.*EPIC_100_validation"):
        read_actions(tmp_path, "train")
    (tmp_path / "EPIC_100_train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="line 2: no video_id"):
        read_actions(tmp_path, "train")
    for start in ("noon", "00:00:03.00"):  # the second is after its end
        row = f"P01_01,{start},00:00:02.00,1,2\n"
        (tmp_path / "EPIC_100_train.csv").write_text(
            f"video_id,start_timestamp,stop_timestamp,verb_class,noun_class\n{row}"
        )
        with pytest.raises(ValueError, match=r"train\.csv, line 2: .*not a table of EPIC-Kitchens"):
            read_actions(tmp_path, "train")
    with pytest.raises(DataMissing, match="video P07_02 is not below"):
        EpicVideos(tmp_path).find("P07_02")
    with pytest.raises(ValueError, match=r"clips\.segments=2 to 1"):
        EpicReader(EpicVideos(tmp_path), replace(epic_protocol(), segments=2), AnticipationConfig())


def test_a_probe_with_three_queries_learns_from_anticipated_tokens() -> None:
    """Verb = is the clip dark or bright; noun and action follow from it. Above chance after a few steps."""
    source, generator = features(), torch.Generator().manual_seed(0)
    labels = {"verb": torch.arange(16) % 2, "noun": torch.arange(16) % 2, "action": torch.arange(16) % 2}
    low, high = torch.tensor([0, 150])[labels["verb"]], torch.tensor([100, 250])[labels["verb"]]
    noise = torch.rand(16, 3, 4, 16, 16, generator=generator)
    clips = (low.view(-1, 1, 1, 1, 1) + noise * (high - low).view(-1, 1, 1, 1, 1)).byte()
    tokens = source.tokens(clips, torch.ones(16))
    head = AttentiveClassifiers(48, {"verb": 2, "noun": 2, "action": 2}, AttentiveConfig(depth=2, num_heads=4))
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = anticipation_loss(head(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert ClassMeanRecall(2, k=1).update(head(tokens)["action"], labels["action"]).value() == 1.0
