"""Masks follow what they were given on, as far as features tell it; official trees are read or their lack is named."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import vjepa
from evals.jf import mean_scores
from evals.overlays import TINT, tint
from evals.propagation import PRESETS, Memory, PropagationConfig, decide, enter, hold, input_size, propagate
from evals.references import RandomPatches, RgbPatches
from evals.tasks.tracking import Tracker, build_trackers, main, track
from evals.videos import PALETTE, DatasetError, open_dataset, read_mask, write_mask

SIZE = 128, 192
SMALL = PropagationConfig(short_side=128, context=3, radius=4, temperature=0.05)


def noise(seed: int, *shape: int) -> np.ndarray:
    """Blocks of 4 x 4 pixels in random colours: a texture that jpeg leaves alone."""
    small = np.random.default_rng(seed).integers(0, 256, size=(*(side // 4 for side in shape), 3), dtype=np.uint8)
    return small.repeat(4, axis=0).repeat(4, axis=1)


def draw(places: dict[int, tuple[int, int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """A frame and its ids: objects of id -> (top, left, height, width) with textures of their own, on a tiled ground.

    The ground is the same in every patch, so that what an object uncovers has been seen elsewhere.
    """
    frame, ids = np.tile(noise(0, 16, 16), (8, 12, 1)), np.zeros(SIZE, dtype=np.uint8)
    for each, (top, left, height, width) in places.items():
        where = slice(top, top + height), slice(left, left + width)
        frame[where], ids[where] = noise(each, height, width), each
    return frame, ids


def write_video(root: Path, name: str, frames: list[dict[int, tuple[int, int, int, int]]], middle: str = "") -> None:
    for index, places in enumerate(frames):
        frame, ids = draw(places)
        folder = root / "JPEGImages" / middle / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame).save(folder / f"{index:05}.jpg", quality=95)
        write_mask(root / "Annotations" / middle / name / f"{index:05}.png", ids)


MOVING = [{1: (32, 16 + 16 * index, 64, 64)} for index in range(6)]
LATE = [{3: (0, 16 * index, 64, 64)} | ({5: (64, 144 - 16 * index, 64, 48)} if index > 1 else {}) for index in range(6)]
STILL = [{1: (0, 48, 128, 64)}] * 5  # from edge to edge: a map of patches has round corners


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos: a square that moves, a second one that enters in the third frame, and a bar that stands still."""
    root = tmp_path_factory.mktemp("videos")
    for name, frames in (("late", LATE), ("moving", MOVING), ("still", STILL)):
        write_video(root, name, frames)
    return root


def j_and_f(data: Path, name: str, tracker: Tracker, out: Path, config: PropagationConfig = SMALL) -> float:
    return mean_scores(track(open_dataset("folder", data, sequences=[name]), tracker, config, out))["J&F"]


@pytest.mark.parametrize("source", [RgbPatches(), RandomPatches()], ids=lambda source: source.name)
def test_a_video_that_stands_still_gives_j_and_f_of_1(data: Path, tmp_path: Path, source) -> None:
    assert j_and_f(data, "still", Tracker("one", source), tmp_path) == 1
    given_alone = replace(SMALL, context=0)  # the frame with the given mask is looked at from all others
    assert j_and_f(data, "still", Tracker("one", source), tmp_path, given_alone) == 1
    assert j_and_f(data, "still", Tracker("held", None), tmp_path) == 1


def test_a_square_that_moves_is_followed_and_a_held_mask_is_left_behind(data: Path, tmp_path: Path) -> None:
    assert j_and_f(data, "moving", Tracker("one", RandomPatches()), tmp_path) > 0.9
    assert j_and_f(data, "moving", Tracker("held", None), tmp_path) < 0.4
    near = replace(SMALL, radius=0)
    assert j_and_f(data, "moving", Tracker("one", RandomPatches()), tmp_path, near) < 0.5, "it moves further than that"


def test_an_object_that_enters_late_exists_from_its_first_mask_on(data: Path, tmp_path: Path) -> None:
    (video,) = open_dataset("folder", data, sequences=["late"])
    assert video.entries == {"00000": (3,), "00002": (5,)}
    for masks in (propagate(video, RandomPatches(), 16, SMALL), hold(video)):
        found = dict(masks)
        assert [5 in ids for ids in found.values()] == [False, False, True, True, True, True]
        assert (found["00000"] == video.mask("00000")).all()
        assert ((found["00002"] == 5) == (video.mask("00002") == 5)).all()
    scores = track([video], Tracker("one", RandomPatches()), SMALL, tmp_path)
    assert [(each.object_id, each.num_frames) for each in scores] == [(3, 5), (5, 3)]
    assert min(each.j_and_f for each in scores) > 0.9


def test_what_is_scored_is_what_was_predicted_here(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another command may fill the same folder with its own masks meanwhile."""
    videos, tracker = open_dataset("folder", data, sequences=["moving"]), Tracker("held_mask", None)
    alone = track(videos, tracker, PropagationConfig(), tmp_path)
    monkeypatch.setattr("evals.tasks.tracking.write_mask", lambda path, ids: write_mask(path, 0 * ids))
    assert track(videos, tracker, PropagationConfig(), tmp_path) == alone


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    write_video(tmp_path, "broken", [{1: (8, 24, 8, 24)}] * 3)
    (video,) = open_dataset("folder", tmp_path)
    video.frames["00001"].write_bytes(b"this is no picture")
    with pytest.raises(DatasetError, match=r"JPEGImages/broken/00001\.\w+ is no readable image: "):
        track([video], Tracker("rgb_patches", RgbPatches(16)), SMALL, tmp_path / "masks")


def test_frames_before_the_first_object_are_background(data: Path) -> None:
    (video,) = open_dataset("folder", data, sequences=["moving"])
    video = replace(video, entry_frames={1: "00002"})
    for masks in (propagate(video, RandomPatches(), 16, SMALL), hold(video)):
        assert [bool(ids.any()) for _, ids in masks] == [False, False, True, True, True, True]


# --------------------------------------------------------------------------------------------------------------- maps


def unit(seed: int, *shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def one_by_one(queries: Tensor, frames: list[tuple[Tensor, Tensor]], config: PropagationConfig) -> Tensor:
    """What Memory.look_up does, a patch at a time, from its definition."""
    height, width, _ = queries.shape
    maps = torch.zeros(frames[0][1].shape)
    for row in range(height):
        for column in range(width):
            seen = []
            for features, known in frames:
                for y in range(height):
                    for x in range(width):
                        dy, dx = abs(y - row), abs(x - column)
                        far = math.hypot(dy, dx) if config.neighbourhood == "circle" else max(dy, dx)
                        if far <= config.radius:
                            seen.append((float(queries[row, column] @ features[y, x]), known[:, y, x]))
            seen = sorted(seen, key=lambda pair: -pair[0])[: config.top_k]
            weights = [math.exp(cosine / config.temperature) for cosine, _ in seen]
            for weight, (_, value) in zip(weights, seen, strict=True):
                maps[:, row, column] += weight / sum(weights) * value
    return maps


@pytest.mark.parametrize("neighbourhood", ["circle", "square"])
@pytest.mark.parametrize(("radius", "top_k"), [(2, 4), (1, 30), (9, 3)])
def test_maps_are_those_of_the_definition(neighbourhood, radius: int, top_k: int) -> None:
    config = PropagationConfig(neighbourhood=neighbourhood, radius=radius, top_k=top_k, context=2)
    frames = [(unit(i, 7, 5, 8), torch.rand(3, 7, 5, generator=torch.Generator().manual_seed(i))) for i in range(4)]
    memory = Memory((7, 5), 3, config)
    for index, frame in enumerate(frames):
        memory.remember(*frame, keep=index == 0)
    queries = unit(9, 7, 5, 8)
    expected = one_by_one(queries, [frames[0], *frames[2:]], config)  # the first and the last two
    assert torch.allclose(memory.look_up(queries), expected, atol=1e-5)


def test_given_masks_come_down_to_patches_by_their_middle_or_their_share() -> None:
    given = torch.zeros(8, 8, dtype=torch.int64)
    given[:4, :3] = 2
    before = torch.tensor([0.2, 0.8, 0.0])[:, None, None].expand(3, 2, 2)
    nearest, area = enter(before, given, "nearest"), enter(before, given, "area")
    assert torch.equal(nearest[:, 0, 0], torch.tensor([0.0, 0.0, 1.0]))
    assert torch.allclose(area[:, 0, 0], torch.tensor([0.05, 0.2, 0.75]))
    assert torch.equal(area[:, 1, 1], before[:, 1, 1])


def test_stretching_gives_a_faint_object_its_peak() -> None:
    maps = torch.full((2, 2, 2), 0.0)
    maps[1, 0, 0] = 0.3
    maps[0] = 1 - maps[1]
    assert not decide(maps, (8, 8), stretch=False).any()
    assert decide(maps, (8, 8), stretch=True)[0, 0] == 1
    assert not decide(torch.stack([torch.ones(2, 2), torch.zeros(2, 2)]), (8, 8), stretch=True).any(), (
        "nothing is there"
    )


def test_the_input_has_the_short_side_asked_for_in_whole_patches() -> None:
    assert input_size((480, 854), 480, 16) == (480, 848)
    assert input_size((1080, 1920), 480, 16) == (480, 848)
    assert input_size((854, 480), 420, 14) == (742, 420)


def test_presets_are_the_papers() -> None:
    """V-JEPA 2.1: 15 frames, circle 12, top-5, T .2. DINO's script: 7 frames, square 12, top-5, T .1, stretched."""
    assert PRESETS["vjepa21"] == PropagationConfig(None, 15, "circle", 12, 5, 0.2, False)
    assert PRESETS["dino"] == PropagationConfig(None, 7, "square", 12, 5, 0.1, True)


def test_patches_of_14_see_frames_of_420_and_others_of_480() -> None:
    """V-JEPA 2.1, appendix C; a side that is asked for holds for all."""
    assert [PropagationConfig().side(patch) for patch in (8, 14, 16)] == [480, 420, 480]
    assert [PropagationConfig(56).side(patch) for patch in (14, 16)] == [56, 56]


def test_rgb_patches_are_the_means_of_a_grid_of_cells() -> None:
    clip = torch.zeros(1, 3, 1, 16, 32, dtype=torch.uint8)
    clip[0, 0, 0, :4, 16:18] = 255  # red, half of the first cell of the second patch
    tokens = RgbPatches().tokens(clip)
    assert tokens.shape == (1, 1, 1, 2, 48)
    change = tokens[0, 0, 0, 1] - tokens[0, 0, 0, 0]
    assert change.nonzero().flatten().tolist() == [0]
    assert change[0].item() == pytest.approx(0.5 / 0.229), "half of black to white, by the channel's deviation"


# --------------------------------------------------------------------------------------------------------------- trees


def test_davis_2016_has_one_object_and_the_official_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_video(tmp_path, name, [{3: (0, 0, 32, 32), 5: (64, 64, 32, 32)}] * 3, middle="480p")
    listed = tmp_path / "ImageSets" / "480p" / "val.txt"
    listed.parent.mkdir(parents=True)
    lines = [
        f"/JPEGImages/480p/{name}/0000{i}.jpg /Annotations/480p/{name}/0000{i}.png" for name in "ba" for i in (0, 1)
    ]
    listed.write_text("\n".join(lines) + "\n")
    videos = open_dataset("davis2016", tmp_path)
    assert [video.name for video in videos] == ["b", "a"]
    assert [video.object_ids for video in videos] == [(1,), (1,)]
    assert videos[0].entries == {"00000": (1,)}


def test_davis_2017_gives_the_first_frame_alone_and_ignores_void(tmp_path: Path) -> None:
    write_video(
        tmp_path, "a", [{2: (0, 0, 32, 32), 255: (64, 64, 32, 32)}, {2: (0, 0, 32, 32), 4: (64, 0, 32, 32)}], "480p"
    )
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("a\ngone\n")
    lacking = r"1 of 2 videos lack frames or masks in .*: gone\..*data\.skip_missing=true, or --skip-missing"
    with pytest.raises(DatasetError, match=lacking):
        open_dataset("davis2017", tmp_path)
    (video,) = open_dataset("davis2017", tmp_path, skip_missing=True)
    assert video.object_ids == (2,), "the official evaluation takes its objects from the first mask"
    assert video.entries == {"00000": (2,)}


def test_youtube_vos_says_where_objects_enter_and_what_they_are(tmp_path: Path) -> None:
    names = [f"v{i}" for i in range(6)]
    about = {"1": {"category": "cat", "frames": ["00000", "00002"]}, "2": {"category": "yak", "frames": ["00002"]}}
    for name in names:
        write_video(tmp_path, name, [{1: (0, 0, 32, 32)}] * 2 + [{1: (0, 0, 32, 32), 2: (64, 64, 32, 32)}] * 2)
    with pytest.raises(DatasetError, match=r"meta\.json is missing.*must hold JPEGImages/VIDEO"):
        open_dataset("youtube_vos", tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps({"videos": {name: {"objects": about} for name in names}}))
    (video,) = open_dataset("youtube_vos", tmp_path)
    assert video.name == "v4", "one in five is held out"
    assert video.entries == {"00000": (1,), "00002": (2,)}
    assert video.categories == {1: "cat", 2: "yak"}
    assert len(open_dataset("youtube_vos", tmp_path, split="train")) == 5

    out, meta = tmp_path / "out", tmp_path / "seen"
    meta.mkdir()
    (meta / "meta.json").write_text(json.dumps({"videos": {"v": {"objects": {"1": about["1"]}}}}))
    arguments = [
        "--data",
        str(tmp_path),
        "--dataset",
        "youtube_vos",
        "--out",
        str(out),
        "--seen",
        str(meta / "meta.json"),
    ]
    assert main(["run", "--model", "held_mask", *arguments]) == 0
    rows = [json.loads(line) for line in (out / "evals" / "results.jsonl").read_text().splitlines()]
    assert [(row["task"], row["metric"], row["value"]) for row in rows] == [
        ("tracking_youtube_vos", "G", 1),
        *((f"tracking_youtube_vos_{name}", name, 1) for name in ("J_seen", "F_seen", "J_unseen", "F_unseen")),
    ]


@pytest.mark.parametrize("name", ["davis2016", "davis2017", "youtube_vos", "folder"])
def test_a_tree_that_is_not_there_is_described(tmp_path: Path, name) -> None:
    with pytest.raises(DatasetError, match=r"JPEGImages.* is missing\. .* must hold JPEGImages/.*Annotations/"):
        open_dataset(name, tmp_path)


def test_masks_survive_the_disk_and_colours_are_refused(tmp_path: Path) -> None:
    ids = np.arange(256, dtype=np.uint8).reshape(16, 16)
    write_mask(tmp_path / "a.png", ids)
    assert (read_mask(tmp_path / "a.png") == ids).all()
    assert PALETTE[:5].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]
    Image.fromarray(ids.repeat(3).reshape(16, 16, 3)).save(tmp_path / "grey.png")
    assert (read_mask(tmp_path / "grey.png") == ids).all()
    Image.fromarray(PALETTE[ids]).save(tmp_path / "colours.png")
    with pytest.raises(DatasetError, match=r"colours\.png is RGB, not a mask of object ids"):
        read_mask(tmp_path / "colours.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(DatasetError, match=r"cut\.png is not a readable mask"):
        read_mask(tmp_path / "cut.png")


# -------------------------------------------------------------------------------------------------------- the command


def test_one_command_predicts_scores_and_pictures(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = vjepa.hub.save_pretrained(vjepa.create_model("vit_debug", seed=1), tmp_path / "encoder")
    models = ["held_mask", "rgb_patches", "untrained", str(model)]
    arguments = [word for each in models for word in ("--model", each)]
    arguments += ["--data", str(data), "--dataset", "folder", "--sequences", "late", "--out", str(tmp_path)]
    assert main(["run", *arguments, "short_side=64", "context=2", "radius=3"]) == 0
    table = capsys.readouterr().out
    assert "folder: 1 videos, 6 frames" in table
    assert "mean J&F" in table
    names = ["held_mask", "rgb_patches", "untrained", "trained"]
    rows = json.loads((tmp_path / "summary.json").read_text())["evals"]
    assert [row["model"] for row in rows if row["metric"] == "J&F"] == names
    assert {row["task"] for row in rows} == {"tracking_folder", "tracking_folder_J", "tracking_folder_F"}
    for name in names:
        frames = sorted((tmp_path / "masks" / "folder" / name / "late").iterdir())
        assert [path.name for path in frames] == [f"0000{i}.png" for i in range(6)]
        assert read_mask(frames[0]).shape == SIZE
    with Image.open(tmp_path / "pictures" / "folder" / "late.png") as picture:
        assert picture.width > 6 * 200
    scored = [
        "--predictions",
        str(tmp_path / "masks" / "folder" / "trained"),
        "--ground-truth",
        str(data / "Annotations"),
    ]
    assert main(["score", *scored, "--sequences", "late"]) == 0


def test_models_are_references_by_name_or_encoders_by_path(tmp_path: Path) -> None:
    model = vjepa.hub.save_pretrained(vjepa.create_model("vit_debug", patch_size=8), tmp_path / "encoder")
    asked = ["rgb", "rgb_patches", "random_patches", "held_mask", "untrained", "untrained:vit_debug", str(model)]
    trackers = build_trackers(asked)
    assert [each.name for each in trackers] == [*asked[:5], "untrained_vit_debug", "trained"]
    assert [each.patch_size for each in trackers if each.source] == [8, 8, 8, 8, 16, 8]
    clip = torch.zeros(1, 3, 1, 32, 48, dtype=torch.uint8)
    for each in trackers:
        if each.source:
            grid = (1, 1, 32 // each.patch_size, 48 // each.patch_size)
            assert each.source.tokens(clip).shape[:4] == grid


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "rgb", "topk=3"], "topk"),
        (["--model", "rgb", "temperature=0"], "temperature=0"),
        (["--model", "vit_large"], "--model vit_large: no such file or folder, nor one of the references"),
        (["--model", "untrained:vit_smal"], "there is no 'vit_smal'; sizes"),
        (["--model", "rgb", "--model", "rgb"], "come twice"),
        (["--model", "rgb", "--sequences", "gone"], "no gone in its val; there are late, moving, still"),
    ],
)
def test_what_is_wrong_with_a_command_is_said(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    fixed = ["--data", str(data), "--dataset", "folder", "--out", str(tmp_path)]
    assert main(["run", *fixed, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_masks_are_drawn_over_the_frame_in_the_colours_of_their_ids() -> None:
    frame, ids = draw({2: (32, 48, 64, 64)})
    picture = tint(frame, ids)
    assert (picture[ids == 0] == frame[ids == 0]).all()
    inside = (1 - TINT) * frame[60, 80] + TINT * np.array([0, 128, 0])
    assert np.abs(picture[60, 80] - inside).max() <= 0.5
    assert picture[95, 80].tolist() == [0, 128, 0], "the outline has the colour alone"
