"""Claims: filter, dedup, verify and inspect say of each record what is so, name their reasons, and work in parts."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_videos import write_video
from PIL import Image

from data_pipeline.prepare import dedup, filter, inspect, verify
from data_pipeline.prepare.ingest import ingest
from data_pipeline.prepare.measures import bar_share, black_share, movement
from data_pipeline.prepare.options import IngestOptions
from data_pipeline.shards import Shards

QUICK = IngestOptions(preset="ultrafast", shard_count=3)
SMALL = ["--min-short-side", "48", "--quiet"]


def texture(seed: int, height: int = 64, width: int = 96, detail: tuple[int, int] = (5, 7)) -> np.ndarray:
    """A smooth random picture of `detail` patches: uint8 `[H, W, 3]`."""
    coarse = np.random.default_rng(seed).integers(0, 256, (*detail, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def moving(seed: int, frames: int = 20) -> np.ndarray:
    """A texture that drifts: uint8 `[T, H, W, 3]`."""
    wide = texture(seed, width=192)
    return np.stack([wide[:, 2 * i : 2 * i + 96] for i in range(frames)])


def with_bars(pixels: np.ndarray) -> np.ndarray:
    """Black above and below, a quarter of the height in all."""
    barred = pixels.copy()
    barred[:, :8] = barred[:, -8:] = 0
    return barred


def rows(path: Path) -> dict[str, dict[str, Any]]:
    """A report's rows by key."""
    return {row["key"]: row for row in map(json.loads, path.read_text().splitlines())}


def keys(out: Path, modality: str = "video") -> list[str]:
    opened = Shards(out, modality)
    return [opened.row(i)["key"].removesuffix("-0000") for i in range(len(opened))]


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of videos, one of each kind that a filter is to find, and of two images."""
    folder = tmp_path_factory.mktemp("varied")
    media = folder / "media"
    media.mkdir()
    noise = np.random.default_rng(0).integers(-2, 3, (20, 64, 96, 3))
    slides = np.repeat(np.stack([texture(i) for i in (20, 21)]), 20, axis=0)
    videos = {
        "good": moving(1),
        "good_dark_corner": moving(2) // np.linspace(1, 8, 96).astype(np.uint8)[:, None],
        "short": moving(3, frames=6),
        "still": np.clip(texture(4) + noise, 0, 255).astype(np.uint8),
        "slides": slides,
        "black": moving(5) // 32,
        "letterboxed": with_bars(moving(6)),
    }
    for name, pixels in videos.items():
        write_video(media / f"{name}.mp4", pixels)
    Image.fromarray(texture(7)).save(media / "picture.png")
    Image.fromarray(texture(8) // 64).save(media / "dark.png")
    ingest([media], folder / "shards", QUICK)
    return folder / "shards"


# --- filter ----------------------------------------------------------------------------------------------------------


def test_each_fault_is_found_and_named_and_the_rest_is_kept(varied: Path, tmp_path: Path):
    assert filter.main([str(varied), "--out", str(tmp_path / "out"), "--max-still", "0.8", *SMALL]) == 0
    report = rows(tmp_path / "out" / "report.jsonl")
    reasons = {key.removesuffix("-0000"): (row["reason"] or "").split()[0:1] for key, row in report.items()}
    assert reasons == {
        "good": [],
        "good_dark_corner": [],
        "picture": [],
        "short": ["seconds"],
        "still": ["still"] if report["still-0000"]["motion"] >= 0.5 else ["motion"],
        "slides": ["still"],
        "black": ["motion"] if report["black-0000"]["motion"] < 0.5 else ["black"],
        "letterboxed": ["bars"],
        "dark": ["black"],
    }
    assert keys(tmp_path / "out") == ["good", "good_dark_corner"]
    assert keys(tmp_path / "out", "image") == ["picture"]


def test_measures_are_those_of_the_pixels():
    flat = np.full((4, 64, 96), 100, np.uint8)
    assert movement(flat) == (0.0, 1.0)
    steps = flat + np.array([0, 10, 10, 30], np.uint8)[:, None, None]
    assert movement(steps) == (10.0, pytest.approx(1 / 3))
    assert movement(flat[:1]) == (0.0, 1.0)
    assert black_share(flat * np.array([0, 1, 1, 1], np.uint8)[:, None, None]) == 0.25
    boxed = flat.copy()
    boxed[:, :8], boxed[:, -16:], boxed[:, :, :12], boxed[:, :, -12:] = 0, 0, 0, 0
    assert bar_share(boxed) == pytest.approx(1 - (48 / 64) * (72 / 96))
    boxed[0] = 100  # a single frame without bars
    assert bar_share(boxed) == 0.0
    one_sided = flat.copy()
    one_sided[:, :30] = 0
    assert bar_share(one_sided) == 0.0
    assert bar_share(flat * 0) == 0.0


def test_a_view_reads_the_same_bytes_and_a_copy_stands_alone(varied: Path, tmp_path: Path):
    shards = tmp_path / "shards"
    shutil.copytree(varied, shards)
    for name in ("view", "copy"):
        extra = ["--copy"] if name == "copy" else []
        assert filter.main([str(shards), "--out", str(tmp_path / name), *extra, *SMALL]) == 0
    view, copy = Shards(tmp_path / "view", "video"), Shards(tmp_path / "copy", "video")
    assert [view.read(i, verify=True)[0] for i in range(len(view))] == [
        copy.read(i, verify=True)[0] for i in range(len(copy))
    ]
    assert not list((tmp_path / "view").glob("*.tar"))
    shutil.rmtree(shards)
    with tarfile.open(tmp_path / "copy" / "video-000000.tar") as archive:
        assert [name for name in archive.getnames() if name.endswith(".mp4")] == [
            f"{key}-0000.mp4" for key in keys(tmp_path / "copy")
        ]
    with pytest.raises(ValueError, match="missing"):
        Shards(tmp_path / "view", "video")


def test_bounds_that_cannot_be_kept_are_refused(varied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = [str(varied), "--out", str(tmp_path / "out"), "--quiet"]
    assert filter.main([*arguments, "--min-seconds", "5", "--max-seconds", "4"]) == 1
    assert "--min-seconds 5 is above --max-seconds 4" in capsys.readouterr().err
    assert filter.main([*arguments, "--max-black", "-1"]) == 1
    assert "--max-black -1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_finished_part_that_is_started_again_has_nothing_to_do(varied: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    for index in (0, 1, 1):
        assert filter.main([str(varied), "--out", str(out), "--shard", f"{index}/2", "--jobs", "1", *SMALL]) == 0
        made = (out / "slice-000-of-002" / "report.jsonl").stat().st_mtime_ns
    assert filter.main([str(varied), "--out", str(out), "--shard", "0/2", "--jobs", "1", *SMALL]) == 0
    assert (out / "slice-000-of-002" / "report.jsonl").stat().st_mtime_ns == made
    assert len(rows(out / "report.jsonl")) == 9
    assert keys(out) == ["good", "good_dark_corner"]
    capsys.readouterr()
    assert filter.main([str(varied), "--out", str(out), "--shard", "0/2", "--max-bars", "1", *SMALL]) == 1
    assert "already holds shards" in capsys.readouterr().err


def damage(shards: Path, key: str) -> None:
    """Turn over a byte in the middle of a record."""
    opened = Shards(shards, "video")
    row = next(row for row in map(opened.row, range(len(opened))) if row["key"] == key)
    with (shards / row["shard"]).open("r+b") as file:
        file.seek(row["offset"] + row["size"] // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 255]))


def test_a_damaged_record_is_dropped_with_its_reason(varied: Path, tmp_path: Path):
    shutil.copytree(varied, tmp_path / "shards")
    damage(tmp_path / "shards", "good-0000")
    assert filter.main([str(tmp_path / "shards"), "--out", str(tmp_path / "out"), *SMALL]) == 0
    assert rows(tmp_path / "out" / "report.jsonl")["good-0000"]["reason"].startswith("damaged: bytes differ")


# --- dedup -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def doubled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of ten videos; of the first three a smaller copy, a coarser one, and one of half the frames."""
    folder = tmp_path_factory.mktemp("doubled")
    media = folder / "media"
    media.mkdir()
    for i in range(10):
        write_video(media / f"v{i}.mp4", moving(100 + i))
    small = np.stack([np.asarray(Image.fromarray(frame).resize((66, 48))) for frame in moving(100)])
    write_video(media / "v0_small.mp4", small)
    coarse = moving(101) // 24 * 24
    write_video(media / "v1_coarse.mp4", coarse)
    write_video(media / "v2_slow.mp4", moving(102)[::2], fps=5)
    picture = Image.fromarray(texture(1, detail=(16, 24)))
    picture.save(media / "a.png")
    picture.resize((72, 48)).save(media / "a_small.png")
    Image.fromarray(texture(2, detail=(16, 24))).save(media / "b.png")
    ingest([media], folder / "shards", QUICK)
    return folder / "shards"


def found(out: Path) -> dict[str, list[str]]:
    """The groups: the kept key and the dropped ones."""
    lines = map(json.loads, (out / "groups.jsonl").read_text().splitlines())
    return {
        line["kept"].removesuffix("-0000"): [row["key"].removesuffix("-0000") for row in line["dropped"]]
        for line in lines
    }


COPIES = {"v0": ["v0_small"], "v1": ["v1_coarse"], "v2": ["v2_slow"], "a": ["a_small"]}


def test_altered_copies_are_found_and_nothing_else(doubled: Path, tmp_path: Path):
    assert dedup.main([str(doubled), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert found(tmp_path / "out") == COPIES
    assert keys(tmp_path / "out") == [f"v{i}" for i in range(10)]
    assert keys(tmp_path / "out", "image") == ["a", "b"]


def test_parts_hash_and_the_last_one_compares_all(doubled: Path, tmp_path: Path):
    out = tmp_path / "out"
    for index in (1, 2, 0):
        assert not (out / "manifest.json").exists()
        arguments = [str(doubled), "--out", str(out), "--shard", f"{index}/3", "--jobs", "1", "--quiet"]
        assert dedup.main(arguments) == 0
    assert found(out) == COPIES
    assert keys(out) == [f"v{i}" for i in range(10)]


def test_features_of_the_caller_take_the_place_of_the_hash(doubled: Path, tmp_path: Path, capsys):
    ingested = tmp_path / "videos"
    assert filter.main([str(doubled), "--out", str(ingested), "--max-bars", "1", *SMALL]) == 0
    names = keys(ingested)
    features = np.random.default_rng(0).standard_normal((len(names), 32)).astype(np.float32)
    features[names.index("v5")] = features[names.index("v3")] * 2 + 0.01
    np.save(tmp_path / "features.npy", features)
    arguments = ["--features", str(tmp_path / "features.npy"), "--quiet", "--out", str(tmp_path / "out")]
    assert dedup.main([str(ingested), *arguments]) == 1
    assert "holds video, image" in capsys.readouterr().err
    manifest = json.loads((ingested / "manifest.json").read_text())
    manifest["shards"] = [entry for entry in manifest["shards"] if entry["modality"] == "video"]
    (ingested / "manifest.json").write_text(json.dumps(manifest))
    assert dedup.main([str(ingested), *arguments]) == 0
    assert found(tmp_path / "out") == {"v3": ["v5"]}
    shuffled = np.random.default_rng(1).permutation(len(names))
    full = np.array([f"{name}-0000" for name in names])
    np.savez(tmp_path / "keyed.npz", keys=full[shuffled], features=features[shuffled])
    arguments = ["--features", str(tmp_path / "keyed.npz"), "--quiet", "--out", str(tmp_path / "keyed")]
    assert dedup.main([str(ingested), *arguments]) == 0
    assert found(tmp_path / "keyed") == {"v3": ["v5"]}


def test_re_encoded_real_clips_are_found(clips: Path, tmp_path: Path):
    media = tmp_path / "media"
    media.mkdir()
    names = ["co-tracker__cat", "torchcodec__bt709_full_range", "decord__flipping_a_pancake", "co-tracker__bear"]
    for name in names:
        (path,) = clips.glob(f"{name}.*")
        (media / f"{name}{path.suffix}").symlink_to(path)
    ingest([media], tmp_path / "good", IngestOptions(preset="ultrafast", copy=True))
    ingest([media], tmp_path / "poor", IngestOptions(preset="ultrafast", crf=38, short_side=96, fps=10))
    both = tmp_path / "both"
    both.mkdir()
    for quality in ("good", "poor"):
        opened = Shards(tmp_path / quality, "video")
        for i in range(len(opened)):
            data, row = opened.read(i)
            (both / f"{row['key'].removesuffix('-0000')}@{quality}.{row['ext']}").write_bytes(data)
    ingest([both], tmp_path / "shards", IngestOptions(preset="ultrafast", copy=True))
    assert dedup.main([str(tmp_path / "shards"), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert found(tmp_path / "out") == {f"{name}_good": [f"{name}_poor"] for name in names}


# --- verify ----------------------------------------------------------------------------------------------------------


def test_sound_shards_pass_and_are_pictured(varied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert verify.main([str(varied), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert "no problems" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert report["video"]["records"] == 7
    assert report["image"]["sizes"] == {"96x64": 2}
    sheet = np.asarray(Image.open(tmp_path / "out" / "contact_sheet.png"))
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 1000  # frames, not an empty sheet


def _turn_a_byte(shards: Path) -> None:
    damage(shards, "slides-0000")


def _cut_a_tar(shards: Path) -> None:
    with (shards / "video-000001.tar").open("r+b") as file:
        file.truncate(9000)


def _break_a_header(shards: Path) -> None:
    with (shards / "video-000000.tar").open("r+b") as file:
        row = Shards(shards, "video").row(1)
        file.seek(row["offset"] - 512)
        file.write(b"\xff" * 512)


def _remove_a_tar(shards: Path) -> None:
    (shards / "video-000002.tar").unlink()


def _falsify_a_fact(shards: Path) -> None:
    index = shards / "video-000000.index.jsonl"
    index.write_text(index.read_text().replace('"frames": 20', '"frames": 21'))


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (_turn_a_byte, ["video-000001.tar/slides-0000: bytes differ"]),
        (_cut_a_tar, ["video-000001.tar: 9000 bytes, but the manifest says", "slides-0000: bytes differ"]),
        (
            _break_a_header,
            ["video-000000.tar: neither a member nor the end", "cannot be reached by reading the tar"],
        ),
        (_remove_a_tar, ["video-000002.tar: video-000002.tar is missing"]),
        (_falsify_a_fact, ["differs from the sha256 in the manifest", "frames 20, but the index says 21"]),
    ],
)
def test_every_kind_of_harm_is_named(
    harm: Callable[[Path], None], named: list[str], varied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(varied, tmp_path / "shards")
    harm(tmp_path / "shards")
    assert verify.main([str(tmp_path / "shards"), "--jobs", "1", "--quiet"]) == 1
    printed = capsys.readouterr().out
    assert all(words in printed for words in named), printed


def test_the_parts_of_a_verification_add_up(varied: Path, tmp_path: Path):
    shutil.copytree(varied, tmp_path / "shards")
    _turn_a_byte(tmp_path / "shards")
    _remove_a_tar(tmp_path / "shards")
    out = tmp_path / "out"
    arguments = [str(tmp_path / "shards"), "--out", str(out), "--jobs", "1", "--quiet"]
    assert sorted(verify.main([*arguments, "--shard", f"{i}/4"]) for i in range(4)) == [0, 0, 1, 1]
    assert len((out / "problems.jsonl").read_text().splitlines()) == 2
    report = json.loads((out / "verify.json").read_text())
    assert report["problems"] == 2
    assert (report["video"]["records"], report["image"]["records"]) == (6, 2)


def test_a_view_can_be_verified(varied: Path, tmp_path: Path):
    assert filter.main([str(varied), "--out", str(tmp_path / "view"), *SMALL]) == 0
    assert verify.main([str(tmp_path / "view"), "--jobs", "1", "--quiet"]) == 0


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_counts_measures_and_forecasts(varied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "inspect.json"
    recipe = ["--batch", "70", "--steps", "10", "--step-seconds", "2", "--frames", "4", "--size", "32"]
    assert inspect.main([str(varied), "--json", str(file), "--jobs", "1", "--clips", "2", "--quiet", *recipe]) == 0
    held = json.loads(file.read_text())["video"]
    assert held["statistics"]["records"] == 7
    assert held["statistics"]["lengths"] == {"2-4 s": 5, "0-1 s": 1, "4-8 s": 1}
    assert held["forecast"]["epochs"] == 100
    assert held["forecast"]["hours_of_video"] == pytest.approx(700 / 3600)
    assert held["forecast"]["cores"] == pytest.approx(35 / held["speed"]["clips_per_second_and_core"])
    assert "100.00 epochs" in capsys.readouterr().out


def test_inspect_counts_parts_without_decoding(varied: Path, tmp_path: Path):
    counts = []
    for i in range(2):
        file = tmp_path / f"{i}.json"
        assert inspect.main([str(varied), "--json", str(file), "--no-speed", "--shard", f"{i}/2", "--quiet"]) == 0
        counts.append(json.loads(file.read_text())["video"]["statistics"]["records"])
    assert counts == [3, 4]
