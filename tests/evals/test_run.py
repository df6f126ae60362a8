"""One command measures named evaluations: all models beside their rivals, once; what is missing or unknown is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vjepa
from evals import pace
from evals.cache import encoder_identity
from evals.comparison import compare, digest_of, rows_by_digest
from evals.models import EncoderModel, ForeignModel, PixelModel, load_model, load_models
from evals.protocol import Row
from evals.published import PUBLISHED
from evals.registry import DENSE, GLOBAL, GROUPS, LOADERS, find, names_of
from evals.results import read_summary_rows
from evals.run import main
from evals.tasks import tracking
from evals.videos import write_mask
from tests.evals.dense_scenes import write_camvid, write_rgbd
from tests.evals.rows import rows_of
from tests.evals.test_adapters import save, tiny_dinov2, tiny_vjepa2
from tests.evals.test_anticipation import features, make_epic
from tests.evals.test_probe_task import render
from vjepa import hub
from vjepa.config import ConfigError


def write_davis(root: Path) -> Path:
    """Two short videos of a bright square that moves over noise, in the official tree."""
    for video, step in (("right", 8), ("down", 4)):
        for frame in range(4):
            picture = np.random.default_rng(0).integers(0, 90, (64, 96, 3), dtype=np.uint8)
            ids = np.zeros((64, 96), dtype=np.uint8)
            where = (slice(16 + (video == "down") * step * frame, 40), slice(8 + (video == "right") * step * frame, 48))
            picture[where], ids[where] = 230, 1
            folder = root / "JPEGImages" / "480p" / video
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / f"{frame:05}.jpg", quality=95)
            write_mask(root / "Annotations" / "480p" / video / f"{frame:05}.png", ids)
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("right\ndown\n")
    return root


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sets: one under its evaluation's name, one under its makers'."""
    root = tmp_path_factory.mktemp("sets")
    write_camvid(root / "camvid", {"train": 6, "test": 2})
    write_davis(root / "DAVIS")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "exports" / "primary"
    return hub.save_pretrained(vjepa.create_model("vit_debug", seed=5), folder, extra={"pretraining": {"seed": 3}})


SHORT = ["camvid.fit.steps=20", "camvid.fit.warmup_steps=5", "camvid.fit.batch_size=4", "camvid.view.crop=[48,64]"]
SHORT += ["camvid.view.edges=resize", "davis2017.propagation.short_side=64", "davis2017.propagation.context=2"]


def arguments(sets: Path, model: Path, out: Path, *more: str, suite: str = "camvid,davis2017") -> list[str]:
    return ["--model", str(model), "--suite", suite, "--out", str(out), f"data.root={sets}", *SHORT, *more]


def test_one_command_measures_two_sets_and_again_only_what_is_new(
    sets: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(sets, model, tmp_path)) == 0
    printed = capsys.readouterr()
    rows = rows_of(tmp_path)
    measured = {(row.task, row.model): row.value for row in rows}
    for task, pixels, floor in (
        ("linear_segmentation_camvid", "rgb", "location_prior"),
        ("tracking_davis2017", "rgb_patches", "held_mask"),
    ):
        assert {name for each, name in measured if each == task} == {"trained", "untrained", pixels, floor}
    assert measured["linear_segmentation_camvid", "rgb"] > 0.4, "classes are colours"
    trained, untrained = (measured["tracking_davis2017", name] for name in ("trained", "untrained"))
    assert trained != untrained, "one has seed 5, the other the 3 that its config says the training began with"
    assert {(row.model, row.training_seed) for row in rows} == {
        ("trained", 3), ("untrained", 3), ("rgb", None), ("rgb_patches", None), ("location_prior", None),
        ("held_mask", None),
    }  # fmt: skip
    assert "[8/8] davis2017, held_mask: tracking_davis2017 J&F" in printed.err
    table, published = printed.out.split("Published, NOT measured here")
    assert all(row.task in table for row in rows)
    assert "V-JEPA 2.1 G" in published
    assert "0.690" in published
    assert "V-JEPA" not in table
    assert {path.name for path in (tmp_path / "masks" / "davis2017").iterdir()} == {
        "trained",
        "untrained",
        "rgb_patches",
        "held_mask",
    }

    assert main([*arguments(sets, model, tmp_path), "--report"]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("done before") == 8
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img ") == 2 * 3 * 2 + 2, (
        "two test images or videos, three models, two sets; two of the held mask"
    )
    assert page.index("linear_segmentation_camvid") < page.index("Published, not measured here") < page.index("0.690")
    assert rows_of(tmp_path) == rows
    assert [f"{row.value:.3f}" in printed.out for row in rows] == [True] * len(rows)

    assert main(arguments(sets, model, tmp_path, "camvid.fit.lrs=[1e-3]")) == 0
    assert capsys.readouterr().err.count("done before") == 4, "another recipe is another measurement"
    assert len(rows_of(tmp_path)) == len(rows) + 8

    assert main([*arguments(sets, model, tmp_path), "--again"]) == 0
    assert capsys.readouterr().err.count("done before") == 0
    assert len(rows_of(tmp_path)) == 2 * len(rows) + 8
    assert sum(map(len, rows_by_digest(tmp_path).values())) == len(rows) + 8, "the newest of each"


def test_depth_is_measured_and_its_pictures_say_what_is_unknown(tmp_path: Path) -> None:
    write_rgbd(tmp_path / "sets" / "rgbd_7scenes", 8)
    short = ["data.train_split='0:6'", "data.test_split='6:'", "fit.steps=10", "fit.warmup_steps=2", "fit.batch_size=4"]
    out = tmp_path / "out"
    asked = ["--model", "untrained:vit_debug", "--suite", "rgbd", "--report", "--out", str(out), *short]
    assert main([*asked, f"data.root={tmp_path / 'sets'}"]) == 0
    assert {row.model for row in rows_of(out)} == {"untrained_vit_debug", "rgb", "constant", "location_mean"}
    assert {row.metric for row in rows_of(out)} >= {"RMSE", "delta1"}
    picture = np.asarray(Image.open(out / "pictures" / "rgbd" / "rgb" / "00.png"))
    truth, predicted = picture[18:, 284:564], picture[18:, 568:]  # behind the image, each 280 pixels wide
    assert (truth[:10].max(axis=-1) == 0).mean() > 0.9, "first rows are unknown in this set"
    assert (truth[60:180].max(axis=-1) > 0).all()
    assert (predicted[:180].max(axis=-1) > 0).all()
    assert (out / "report.html").read_text().count("<img ") == 4


def test_weights_that_differ_are_measured_and_named_apart(sets: Path, model: Path, tmp_path: Path) -> None:
    other = hub.save_pretrained(vjepa.create_model("vit_debug", seed=6), tmp_path / "other" / "exports" / "primary")
    out = tmp_path / "out"
    models = [str(model), f"second={other}", "untrained:vit_debug"]
    asked = [word for each in models for word in ("--model", each)]
    asked += ["--suite", "davis2017", "--out", str(out), f"data.root={sets}", "propagation.short_side=64"]
    assert main(asked) == 0
    assert {row.model for row in rows_of(out)} == {
        "primary", "second", "untrained_vit_debug", "untrained_primary", "untrained_second", "rgb_patches",
        "held_mask",
    }  # fmt: skip
    assert len(rows_by_digest(out)) == 7
    with pytest.raises(ValueError, match="primary comes twice; results go by names: write --model NAME=PATH"):
        load_models([str(model), str(other)])


def test_missing_sets_are_named_together_and_can_be_left_out(
    sets: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = arguments(sets, model, tmp_path, suite="ade20k,ssv2,ek100,motion,davis2017")
    asked = [each for each in asked if not each.startswith("camvid.")]
    assert main(asked) == 2
    message = capsys.readouterr().err
    assert "4 of 5 sets are missing" in message
    for words in ("- ade20k:", f"{sets}/ade20k", "- ssv2:", "20bn-something", "- ek100:", "EPIC_100", "- motion:"):
        assert words in message, words
    assert not (tmp_path / "evals").exists()
    assert main([*asked, "--skip-missing"]) == 0
    printed = capsys.readouterr().out
    assert "NOT measured, sets missing:\n- ade20k:" in printed
    assert {row.task for row in read_summary_rows(tmp_path)} == {f"tracking_davis2017{end}" for end in ("", "_J", "_F")}
    assert main([*asked[:3], "ade20k", *asked[4:6], f"data.root={sets}", "--skip-missing"]) == 2, "nothing is left"


@pytest.mark.parametrize(
    ("suite", "overrides", "message"),
    [
        ("camvit", ["data.root=x"], "--suite camvit: there is no such evaluation. Did you mean 'camvid'"),
        ("camvid", [], r"camvid: where does its set lie\? Give data.root=DIR"),
        ("camvid,kitti", ["data.root=x", "fit.steps=3"], "'fit.steps=3': whose is it"),
        ("camvid", ["data.root=x", "kitti.fit.steps=3"], "'kitti.fit.steps=3': whose is it"),
        ("camvid", ["data.root=x", "camvid.fit.stepps=3"], "camvid: .*stepps"),
        ("davis2017", ["data.root=x", "propagation.topk=3"], "davis2017: .*topk"),
        ("davis2017", ["data.root=x", "preset=dyno"], "davis2017: preset=dyno is unknown"),
        ("motion", ["data.root=x", "seed=3"], "motion: .*seed"),
        (",", ["data.root=x"], "names no evaluation"),
    ],
)
def test_unknown_names_and_keys_are_refused(suite: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find(suite, overrides)


def test_a_model_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "nowhere", "--suite", "camvid", "data.root=x"]) == 2
    assert "--model nowhere: no such file or folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="untrained:vit_hugge: there is no such size"):
        load_models(["untrained:vit_hugge"])


def test_groups_hold_every_recipe_once_and_published_figures_are_of_their_tasks() -> None:
    assert set(GROUPS["all"]) == set(LOADERS) - {"motion", "fine_motion", "ssv2_384", *GROUPS["pooled"]}
    assert names_of("dense,camvid,global") == [*DENSE, *GLOBAL]
    tasks = {f"{kind}_{name}" for name in LOADERS for kind in ("linear_segmentation", "linear_depth", "tracking")}
    assert {each.task for each in PUBLISHED} <= tasks | {f"attentive_{name}" for name in LOADERS}
    assert all(0 < each.value < 1 or each.metric == "RMSE" for each in PUBLISHED)
    assert not any(each.task.endswith(("camvid", "rgbd")) for each in PUBLISHED), "no paper has these"


def test_overrides_go_to_their_recipe(tmp_path: Path) -> None:
    (tmp_path / "VOCdevkit").mkdir()
    voc, davis = find("voc12,davis2017", [f"data.root={tmp_path}", "davis2017.preset=dino", "davis2017.data.root=/d",
                                          "davis2017.propagation.top_k=3"])  # fmt: skip
    assert voc.config.data.root == str(tmp_path / "VOCdevkit")  # pyright: ignore[reportAttributeAccessIssue]
    settings = davis.config  # pyright: ignore[reportAttributeAccessIssue]
    assert (settings.data.root, settings.propagation.context, settings.propagation.top_k) == ("/d", 7, 3)


def test_models_of_transformers_are_measured_beside_their_untrained_selves(sets: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "tiny-dino", tiny_dinov2())
    out = tmp_path / "out"
    assert main(["--model", f"hf:{folder}", "--suite", "davis2017", "--out", str(out), f"data.root={sets}",
                 "propagation.short_side=56"]) == 0  # fmt: skip
    assert {row.model for row in rows_of(out)} == {"trained", "untrained", "rgb_patches", "held_mask"}
    model = tiny_vjepa2()
    for weights in model.parameters():
        weights.data.mul_(2)
    trained, first, _ = load_models([f"hf:{save(tmp_path / 'tiny-vjepa2', model)}"])
    assert isinstance(trained, ForeignModel)
    assert isinstance(first, ForeignModel)
    clips = torch.randint(0, 256, (1, 3, 4, 16, 16), dtype=torch.uint8)
    assert trained.last().tokens(clips).shape == first.last().tokens(clips).shape
    assert trained.identity != first.identity


def test_an_untrained_rival_begins_where_the_training_began(model: Path) -> None:
    trained, untrained, pixels = load_models([str(model)])
    assert trained.identity == encoder_identity(vjepa.create_model("vit_debug", seed=5))
    assert untrained.identity == encoder_identity(vjepa.create_model("vit_debug", seed=3))
    assert (pixels.name, pixels.patch_size, pixels.tubelet_size) == ("rgb", 16, 2)


def test_anticipation_is_for_models_with_a_predictor(tmp_path: Path) -> None:
    (tmp_path / "ek100").mkdir()
    make_epic(tmp_path / "ek100")
    small = ["clips.frames=4", "clips.fps=4.0", "clips.size=16", "head.num_heads=4", "head.depth=2", "data.held_out=.4"]
    fit = ["grid.lr=[1e-3]", "grid.weight_decay=[.1]", "schedule.epochs=1", "schedule.batch_size=2"]
    source = features(fps=4.0)
    models = [EncoderModel("with", source.encoder, source.predictor), EncoderModel("without", source.encoder)]
    asked = find("ek100", [f"data.root={tmp_path}", *small, *fit])
    found = compare(asked, [*models, PixelModel(16, 2)], tmp_path / "out", stage="frozen")
    assert {(row.task, row.model) for row in found.rows} == {
        (f"attentive_ek100{end}", "with") for end in ("", "_verb_recall@5", "_noun_recall@5")
    }
    assert [each.partition(":")[0] for each in found.unsuited] == ["ek100, without", "ek100, rgb"]


def test_a_set_whose_files_have_changed_is_another_set(tmp_path: Path) -> None:
    """Labels mended in place: the names are the same."""
    write_camvid(tmp_path / "camvid", {"train": 6, "test": 2})
    write_davis(tmp_path / "DAVIS")
    for split in ("probe_train", "test"):
        (tmp_path / "motion" / split).mkdir(parents=True)
        (tmp_path / "motion" / split / "digits-000000.index.jsonl").write_text('{"sha256": "0"}')
    asked = find("camvid,davis2017,motion", [f"data.root={tmp_path}"])
    before = [each.open() for each in asked]
    asked = find("camvid,davis2017,motion", [f"data.root={tmp_path}"])
    assert [each.open() for each in asked] == before
    for changed in (
        next((tmp_path / "camvid" / "labels" / "test").iterdir()),
        tmp_path / "DAVIS" / "Annotations" / "480p" / "down" / "00002.png",
        next((tmp_path / "motion" / "test").glob("*.index.jsonl")),
    ):
        changed.write_bytes(changed.read_bytes() + b" ")
    asked = find("camvid,davis2017,motion", [f"data.root={tmp_path}"])
    assert all(mine != theirs for mine, theirs in zip([each.open() for each in asked], before, strict=True))


@pytest.mark.parametrize("version", ["NUMBERS_VERSION", "CLIPS_VERSION"])
def test_rows_of_code_that_gave_other_numbers_are_not_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (asked,), model = find("camvid", ["data.root=/data"]), PixelModel(16, 2)
    before = digest_of(asked, "files", model)
    assert digest_of(asked, "files", model) == before
    monkeypatch.setattr(f"evals.comparison.{version}", 2)
    assert digest_of(asked, "files", model) != before


def test_long_loops_say_how_far_they_are(
    sets: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "SECONDS", 0.0)
    command = ["--model", str(model), "--suite", "camvid", "--out", str(tmp_path), f"data.root={sets}", *SHORT[:5]]
    assert main([*command, "fit.lrs=[5.0e-3,1.0e+30]"]) == 0
    said = capsys.readouterr().err
    line = r"\n  step 10 of 20, [\d.]+ a second, 0:00:00 left, least loss [\d.]+, 1 of 2 heads diverged\n"
    assert len(re.findall(line, said)) == 3, "a line for each of the models"
    assert "\n  scored batch 2, " in said
    assert main(command) == 0
    assert len(re.findall("\n  step 10 of 20", capsys.readouterr().err)) == 3, "nothing is shown twice"


def test_a_stopped_command_says_that_it_goes_on(
    sets: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(tracking, "score_video", stop)
        assert main(arguments(sets, model, tmp_path)) == 130
    assert capsys.readouterr().err.endswith(
        "\nstopped; the same command goes on behind the last evaluation that was finished\n"
    )
    assert main(arguments(sets, model, tmp_path)) == 0
    assert capsys.readouterr().err.count("done before") == 4, "CamVid, of three models and a floor"

    def fill(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(tracking, "score_video", fill)
    assert main([*arguments(sets, model, tmp_path, suite="davis2017")[:-7], *SHORT[-2:], "--again"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: the GPU's memory is full: set a smaller score_batch")
    assert said.endswith("(tried to allocate 80 GiB)")


def test_rows_have_their_settings_beside_them_and_a_summary_that_lacks_them_gets_them(
    sets: Path, model: Path, tmp_path: Path
) -> None:
    """A command may be killed between two files."""
    command = arguments(sets, model, tmp_path, suite="camvid")[:-2]
    assert main(command) == 0
    (digest,) = {row.digest for row in rows_of(tmp_path) if row.model == "trained"}
    settings = json.loads((tmp_path / "evals" / "settings" / f"{digest}.json").read_text())
    assert (settings["evaluation"], settings["model"]) == ("camvid", "trained")
    assert settings["recipe"]["fit"]["steps"] == 20
    before = (tmp_path / "summary.json").read_text()
    (tmp_path / "summary.json").unlink()
    assert main(command) == 0
    assert (tmp_path / "summary.json").read_text() == before


def test_a_full_disk_loses_no_row(
    sets: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures are done without; rows that cannot be written are printed."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full)
    monkeypatch.setattr("evals.whole_files.os.fsync", full)
    assert main(arguments(sets, model, tmp_path, suite="camvid")[:-2]) == 2
    said = capsys.readouterr().err
    assert "00.png cannot be written ([Errno 28] No space left on device): make room there" in said
    assert "What was measured, to be added to " in said
    row = Row(**json.loads(next(line for line in said.splitlines() if line.startswith("{"))))
    assert (row.task, row.model) == ("linear_segmentation_camvid", "trained")


def test_what_cannot_be_kept_is_said_before_it_is_measured(
    sets: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(arguments(sets, model, tmp_path / "file" / "out")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: [Errno 20] Not a directory: ")
    assert said.count("\n") == 1


def test_the_device_is_checked_and_used_by_both_forms(
    sets: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, reason in (("cuda", "torch sees no CUDA device: use --device cpu"), ("gpu", "write cpu, cuda")):
        assert main([*arguments(sets, model, tmp_path), "--device", name]) == 2
        assert f"error: --device {name}: {reason}" in capsys.readouterr().err

    def load(path: Path, *, device: str) -> None:
        raise ValueError(f"{path.name} on {device}")

    monkeypatch.setattr("evals.run.from_pretrained", load)
    assert main(["--model", str(model), "--suite", "motion", "--data", str(tmp_path), "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "error: primary on cpu\n"


def test_a_measurement_that_fails_says_of_what(tmp_path: Path, sets: Path) -> None:
    asked = find("camvid", [f"data.root={sets}", "view.crop=[40,40]"])
    with pytest.raises(ValueError, match=r"camvid, rgb: view.crop=\[40, 40\] must be multiples of the patch size 16"):
        compare(asked, [PixelModel(16, 2)], tmp_path, stage="frozen")


def test_what_fits_no_model_is_refused_before_anything_is_measured(tmp_path: Path, sets: Path) -> None:
    write_rgbd(tmp_path / "rgbd", 4)
    asked = find("camvid,rgbd", [f"data.root={sets}", f"rgbd.data.root={tmp_path / 'rgbd'}", *SHORT[:5],
                                 "rgbd.augment.crop=[40,48]", "rgbd.data.test_split='0:'"])  # fmt: skip
    with pytest.raises(ValueError, match=r"rgbd, rgb: augment.crop=\[40, 48\] .*patch size 16: \[32, 48\] has as many"):
        compare(asked, [PixelModel(16, 2)], tmp_path / "out", stage="frozen")
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_take_pictures_of_a_set_is_left_out(tmp_path: Path, sets: Path) -> None:
    """V-JEPA 2 of transformers has one size, another model has patches that do not fit: the rest is measured."""
    theirs, dino = save(tmp_path / "theirs", tiny_vjepa2()), save(tmp_path / "dino", tiny_dinov2())
    models = load_models([f"v2=hf:{theirs}", f"dino=hf:{dino}", f"ours={theirs}"])
    found = compare(find("camvid", [f"data.root={sets}", *SHORT[:5]]), models, tmp_path / "out", stage="frozen")
    left_out = {line.partition(":")[0].removeprefix("camvid, ") for line in found.unsuited}
    assert left_out == {"v2", "untrained_v2", "dino", "untrained_dino", "rgb_14"}
    assert "it takes 16x16 alone" in found.unsuited[0]
    assert {row.model for row in found.rows} == {"ours", "untrained_ours", "rgb", "location_prior"}


USERS = """
import torch
from evals.adapters import CallableFeatures

def load(device):
    def colours(clips):  # [B, 3, T, H, W] -> the mean colour of each patch of 8 pixels
        return torch.nn.functional.avg_pool3d(clips, (1, 8, 8)).flatten(2).transpose(1, 2)
    return CallableFeatures("colours", colours, 8, device=device, identity="colours, 1")

def nameless(device):
    return CallableFeatures("colours", print, 8)

def other(device):
    return print
"""


def test_a_users_own_encoder_is_measured_by_the_command(tmp_path: Path, sets: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(USERS)
    command = ["--suite", "camvid", "--out", str(tmp_path), f"data.root={sets}", *SHORT[:5]]
    assert main(["--model", f"py:{file}:load", "--model", f"again=py:{file}:load", *command]) == 0
    values = {row.model: row.value for row in rows_of(tmp_path) if row.task == "linear_segmentation_camvid"}
    assert set(values) == {"colours", "again", "rgb", "location_prior"}
    assert values["colours"] == values["again"] > 0.4, "classes are colours"


def test_a_users_encoder_that_is_changed_is_another(tmp_path: Path) -> None:
    """Its rows and cached features would be taken for those of the new one, whose weights are the same."""
    file, identities = tmp_path / "mine.py", set()
    for text in (USERS, USERS.replace('"colours, 1"', '"colours, 2"'), USERS.replace("avg_pool3d", "max_pool3d")):
        file.write_text(text)
        identities.add(load_model(f"py:{file}:load").identity)
    assert len(identities) == 3


def test_models_that_are_scored_on_different_pixels_are_said(sets: Path, caplog: pytest.LogCaptureFixture) -> None:
    """CamVid's view leaves out what is no whole patch; a model of other patches leaves out something else."""
    for edges, lines in (("resize", 0), ("crop", 1)):
        (asked,) = find("camvid", [f"data.root={sets}", f"view.edges={edges}"])
        for patch in (16, 16, 14):
            asked.rehearse(PixelModel(patch, 1))
        assert len(caplog.records) == lines
    assert (
        "camvid: with patches of 16, 48 x 64 pixels of an image are scored, with patches of 14 42 x 56" in caplog.text
    )


def test_names_that_are_no_names_of_files_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--model a/b=\.\.\.: files and folders are called by this name"):
        load_models(["a/b=untrained:vit_debug"])


def test_images_that_are_trained_and_tested_on_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_rgbd(tmp_path / "rgbd", 4)
    (asked,) = find("rgbd", [f"data.root={tmp_path}", "data.train_split=0:1", "data.test_split=1:"])
    asked.open()
    assert not caplog.records
    (asked,) = find("rgbd", [f"data.root={tmp_path}", "data.train_split=0:2", "data.test_split=1:"])
    asked.open()
    assert "rgbd: 1 of 3 test images are training images too" in caplog.text
    assert "data.train_split=0:2 and data.test_split=1:" in caplog.text


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("mine.py:nothing", "has no function nothing; write py:FILE.py:FUNCTION"),
        ("mine.py:nameless", "give its CallableFeatures an identity"),
        ("mine.py:other", "other gave builtin_function_or_method; write"),
        ("missing.py:load", r"there is no file .*missing\.py"),
    ],
)
def test_what_is_wrong_with_a_users_file_is_said(tmp_path: Path, spec: str, reason: str) -> None:
    (tmp_path / "mine.py").write_text(USERS)
    with pytest.raises(ValueError, match=reason):
        load_models([f"py:{tmp_path / spec}"])


def test_every_model_has_a_state_of_its_own(tmp_path: Path, sets: Path) -> None:
    models = [PixelModel(16, 2), PixelModel(8, 2, "rgb_8")]
    asked = find("camvid", [f"data.root={sets}", *SHORT[:5], f"fit.state={tmp_path / 'state'}"])
    compare(asked, models, tmp_path / "out", stage="frozen")
    assert {path.stem for path in (tmp_path / "state").iterdir()} == {
        "linear_segmentation_camvid_rgb",
        "linear_segmentation_camvid_rgb_8",
    }


def test_a_probe_and_its_rivals_are_trained_by_the_same_command(tmp_path: Path) -> None:
    model = hub.save_pretrained(vjepa.create_model("vit_debug", patch_size=8, seed=5), tmp_path / "model")
    render(tmp_path / "sets" / "ssv2", train=4, validation=1)
    small = ["data.name=folders", "clips.frames=8", "clips.frame_step=1", "clips.size=32", "clips.segments=1"]
    fit = ["head.depth=2", "head.num_heads=4", "grid.lr=[1e-3,1e-4]", "grid.weight_decay=[.1]", "schedule.epochs=1"]
    out = tmp_path / "out"
    assert main(["--model", str(model), "--suite", "ssv2", "--out", str(out), f"data.root={tmp_path / 'sets'}",
                 *small, *fit, "schedule.batch_size=4", "data.held_out=.3"]) == 0  # fmt: skip
    rows = rows_of(out)
    assert {row.model for row in rows} == {"trained", "untrained", "rgb"}
    assert {row.task for row in rows} == {f"attentive_ssv2{end}" for end in ("", "_accuracy_top5", "_max_over_heads")}
