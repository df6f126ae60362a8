"""Claims: what is good is ingested, what is broken is named with a reason, and there is never half an output."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from made_videos import ramp, which, write_video
from PIL import Image

from data_pipeline.decode import frames_at, open_decoder
from data_pipeline.prepare import writer
from data_pipeline.prepare.ingest import NothingIngested, ingest, main
from data_pipeline.prepare.journal import Task, convert_into_spool
from data_pipeline.prepare.options import IngestOptions, Outcome
from data_pipeline.prepare.synthetic import make_debug_shards
from data_pipeline.shards import Shards


def rows(out: Path) -> dict[str, dict[str, Any]]:
    """rejected.jsonl by path."""
    return {row["path"]: row for row in map(json.loads, (out / "rejected.jsonl").read_text().splitlines())}


def records(out: Path, modality: str = "video") -> dict[str, dict[str, Any]]:
    """The index rows by key."""
    opened = Shards(out, modality)
    return {row["key"]: row for row in map(opened.row, range(len(opened)))}


def faststart_video(path: Path, frames: int) -> bytes:
    """A video whose index stands before its frames, so that its beginning can be read alone."""
    noise = np.random.default_rng(0).integers(0, 256, (frames, 48, 64, 3), np.uint8)
    write_video(path.with_suffix(".plain.mp4"), noise)
    settings = {"movflags": "faststart"}
    with av.open(str(path.with_suffix(".plain.mp4"))) as source, av.open(str(path), "w", options=settings) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    path.with_suffix(".plain.mp4").unlink()
    return path.read_bytes()


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two good videos, a good image, and one of each kind of broken file."""
    folder = tmp_path / "inputs"
    (folder / "deep").mkdir(parents=True)
    good = write_video(folder / "good.mp4", ramp(20)).read_bytes()
    write_video(folder / "deep" / "good.mp4", ramp(30))
    Image.new("RGB", (40, 30), (200, 10, 10)).save(folder / "picture.png")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "page.mp4").write_text("<html>not found</html>")
    (folder / "garbage.webm").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "no_moov.mp4").write_bytes(good[: len(good) // 2])
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    (folder / "notes.txt").write_text("not media")
    return folder


def test_good_files_are_ingested_and_broken_ones_named_with_a_reason(mixed: Path, tmp_path: Path):
    report = ingest([mixed], tmp_path / "out")
    assert (report.videos, report.images) == (2, 1)
    found = rows(tmp_path / "out")
    assert {path: row["status"] for path, row in found.items()} == {
        "empty.mp4": "rejected",
        "page.mp4": "rejected",
        "garbage.webm": "rejected",
        "no_moov.mp4": "rejected",
        "torn.jpg": "rejected",
        "notes.txt": "skipped",
    }
    assert all(row["reason"] and "\n" not in row["reason"] for row in found.values())
    assert set(records(tmp_path / "out")) == {"good-0000", "deep_good-0000"}


def test_the_outcome_does_not_depend_on_the_number_of_jobs(mixed: Path, tmp_path: Path):
    ingest([mixed], tmp_path / "one", IngestOptions(jobs=1))
    ingest([mixed], tmp_path / "two", IngestOptions(jobs=2))
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {path.name for path in (tmp_path / "two").iterdir()}
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_long_video_is_cut_into_equal_pieces_that_start_at_zero(tmp_path: Path):
    write_video(tmp_path / "long.mp4", ramp(36))
    ingest([tmp_path / "long.mp4"], tmp_path / "out", IngestOptions(max_seconds=1.5, crf=1))
    opened = Shards(tmp_path / "out", "video")
    pieces = [opened.read(i) for i in range(len(opened))]
    assert [(row["start"], row["frames"]) for _, row in pieces] == [(0.0, 12), (1.2, 12), (2.4, 12)]
    for number, (data, _) in enumerate(pieces):
        decoder = open_decoder(data, "video", backend="pyav")
        assert (decoder.info.begin, decoder.info.frames) == (0.0, 12)
        assert which(frames_at(decoder, np.arange(12) / 10).numpy()) == list(range(12 * number, 12 * number + 12))


def test_an_uneven_source_is_written_evenly_by_time(tmp_path: Path):
    write_video(tmp_path / "vfr.mp4", ramp(6), times=[0.0, 0.1, 0.2, 0.5, 0.6, 1.0])
    ingest([tmp_path / "vfr.mp4"], tmp_path / "out", IngestOptions(crf=1))
    data, row = Shards(tmp_path / "out", "video").read(0)
    assert row["fps"] == 10.0
    frames = frames_at(open_decoder(data, "video", backend="pyav"), np.arange(11) / 10)
    assert which(frames.numpy()) == [0, 1, 2, 2, 2, 3, 4, 4, 4, 4, 5]


def test_a_fast_source_keeps_every_nth_frame_and_a_large_one_is_scaled_down(tmp_path: Path):
    write_video(tmp_path / "fast.mp4", ramp(24, height=96, width=130), fps=24)
    ingest([tmp_path / "fast.mp4"], tmp_path / "out", IngestOptions(fps=8, short_side=48, crf=1))
    data, row = Shards(tmp_path / "out", "video").read(0)
    assert (row["fps"], row["frames"], row["height"], row["width"]) == (8.0, 8, 48, 64)
    frames = frames_at(open_decoder(data, "video", backend="pyav"), np.arange(8) / 8)
    assert which(frames.numpy()) == [0, 3, 6, 9, 12, 15, 18, 21]


def test_a_length_that_is_no_multiple_of_the_step_leaves_no_scrap_behind(tmp_path: Path):
    write_video(tmp_path / "odd.mp4", ramp(25), fps=24)
    ingest([tmp_path / "odd.mp4"], tmp_path / "out", IngestOptions(fps=8))
    assert [row["frames"] for row in records(tmp_path / "out").values()] == [9]


def test_a_small_source_is_never_scaled_up(tmp_path: Path):
    write_video(tmp_path / "small.mp4", ramp(3))
    ingest([tmp_path / "small.mp4"], tmp_path / "out")
    assert records(tmp_path / "out")["small-0000"]["height"] == 48


def test_a_damaged_tail_is_cut_and_said(tmp_path: Path):
    data = faststart_video(tmp_path / "whole.mp4", 60)
    torn = tmp_path / "torn.mp4"
    torn.write_bytes(data[: len(data) * 2 // 3])
    ingest([torn], tmp_path / "out")
    (record,) = records(tmp_path / "out").values()
    assert 30 <= record["frames"] < 45
    note = rows(tmp_path / "out")["torn.mp4"]
    assert note["status"] == "tail lost"
    assert f"kept the first {record['duration']:.2f} s" in note["reason"]


def test_a_video_damaged_too_early_is_rejected(tmp_path: Path):
    data = faststart_video(tmp_path / "whole.mp4", 60)
    (tmp_path / "torn.mp4").write_bytes(data[: len(data) // 10])
    ingest([tmp_path / "torn.mp4", tmp_path / "whole.mp4"], tmp_path / "out")
    assert rows(tmp_path / "out")["torn.mp4"]["status"] == "rejected"
    assert set(records(tmp_path / "out")) == {"whole-0000"}


def test_copy_keeps_the_original_bytes(mixed: Path, tmp_path: Path):
    ingest([mixed / "good.mp4"], tmp_path / "out", IngestOptions(copy=True))
    data, row = Shards(tmp_path / "out", "video").read(0)
    assert data == (mixed / "good.mp4").read_bytes()
    assert (row["frames"], row["fps"], row["codec"]) == (20, 10.0, "h264")


def test_stills_are_evenly_spaced_frames_as_images(tmp_path: Path):
    write_video(tmp_path / "clip.mp4", ramp(30))
    ingest([tmp_path / "clip.mp4"], tmp_path / "out", IngestOptions(stills=3))
    opened = Shards(tmp_path / "out", "image")
    pictures = [open_decoder(opened.read(i)[0], "image") for i in range(3)]
    assert [which(frames_at(picture, np.zeros(1)).numpy()) for picture in pictures] == [[5], [15], [25]]
    assert [opened.row(i)["start"] for i in range(3)] == [0.5, 1.5, 2.5]


def test_the_quality_of_images_that_are_made_anew_is_asked_for(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "picture.jpg", quality=95)
    write_video(tmp_path / "clip.mp4", noise[None].repeat(20, axis=0), fps=10)
    made = {}
    for quality in (30, 90):
        out = tmp_path / str(quality)
        options = IngestOptions(short_side=48, stills=1, jpeg_quality=quality)
        ingest([tmp_path / "picture.jpg", tmp_path / "clip.mp4"], out, options)
        made[quality] = [len(Shards(str(out), "image").read(index)[0]) for index in range(2)]
    assert all(small < large / 1.5 for small, large in zip(made[30], made[90], strict=True))
    with pytest.raises(ValueError, match="jpeg_quality=0"):
        IngestOptions(jpeg_quality=0)


def test_labels_beside_a_file_travel_with_it(tmp_path: Path):
    write_video(tmp_path / "clip.mp4", ramp(5))
    (tmp_path / "clip.json").write_text('{"class": 3}')
    ingest([tmp_path], tmp_path / "out")
    assert records(tmp_path / "out")["clip-0000"]["labels"] == {"class": 3}
    assert rows(tmp_path / "out") == {}


def test_equal_names_get_different_keys(tmp_path: Path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_video(tmp_path / folder / "clip.v1.mp4", ramp(3))
        write_video(tmp_path / folder / "clip v1.mp4", ramp(4))
    ingest([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    keys = set(records(tmp_path / "out"))
    assert len(keys) == 4
    assert not any("." in key or "/" in key for key in keys)


def test_shards_are_closed_at_their_limits(tmp_path: Path):
    for i in range(5):
        write_video(tmp_path / f"{i}.mp4", ramp(3))
    ingest([tmp_path], tmp_path / "out", IngestOptions(shard_count=2))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [shard["samples"] for shard in manifest["shards"]] == [2, 2, 1]
    assert set(records(tmp_path / "out")) == {f"{i}-0000" for i in range(5)}


def test_existing_shards_are_replaced_only_when_asked(mixed: Path, tmp_path: Path):
    ingest([mixed / "good.mp4"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"already holds shards; .*--overwrite"):
        ingest([mixed / "deep"], tmp_path / "out")
    assert set(records(tmp_path / "out")) == {"good-0000"}
    ingest([mixed / "picture.png"], tmp_path / "out", IngestOptions(overwrite=True))
    assert len(Shards(tmp_path / "out", "video")) == 0
    assert len(Shards(tmp_path / "out", "image")) == 1


def test_a_folder_of_something_else_is_never_replaced(mixed: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="not a shard folder"):
        ingest([mixed / "good.mp4"], mixed, IngestOptions(overwrite=True))
    assert (mixed / "notes.txt").exists()


def test_a_full_disk_stops_the_ingest_and_the_same_command_goes_on(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_sync", full)
        with pytest.raises(ValueError, match="disk is full"):
            ingest([mixed], tmp_path / "results" / "out")
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["out.partial"]
    ingest([mixed], tmp_path / "results" / "out")
    assert set(records(tmp_path / "results" / "out")) == {"good-0000", "deep_good-0000"}
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["out"]


def test_only_broken_inputs_end_in_an_error_and_no_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(NothingIngested):
        ingest([tmp_path / "empty.mp4"], tmp_path / "out")
    assert main([str(tmp_path / "empty.mp4"), "--out", str(tmp_path / "out")]) == 1
    assert "empty.mp4: empty file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_input_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match=r"nowhere: no such file or folder"):
        ingest([tmp_path / "nowhere"], tmp_path / "out")


def _crash_on_bad(task: Task) -> Outcome:
    if task.item.name == "bad.mp4":
        os.kill(os.getpid(), 11)
    return convert_into_spool(task)


def test_a_file_that_crashes_the_decoder_is_rejected_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("data_pipeline.prepare.ingest.convert_into_spool", _crash_on_bad)
    paths = [write_video(tmp_path / f"{name}.mp4", ramp(3)) for name in ("a", "bad", "c")]
    ingest(paths, tmp_path / "out", IngestOptions(jobs=2))
    assert list(records(tmp_path / "out")) == ["a-0000", "c-0000"]
    note = rows(tmp_path / "out")["bad.mp4"]
    assert note["status"] == "rejected"
    assert "process died (SIGSEGV" in note["reason"]


REJECTED = {
    "audio_cover.mp3",
    "audio_only.m4a",
    "avi_trunc_noindex.avi",
    "corrupt_avcC.mp4",
    "corrupt_mdat_zeros.mp4",
    "corrupt_stco.mp4",
    "empty.mp4",
    "garbage.mp4",
    "html.mp4",
    "trunc_moov_missing.mp4",
    "zero_frame.mp4",
}
TAIL_LOST = {"fragmented_trunc.mp4", "trunc_faststart_half.mp4"}


def test_every_odd_file_is_ingested_or_named(clips: Path, tmp_path: Path):
    options = IngestOptions(preset="ultrafast", short_side=64)
    ingest([clips / "odd"], tmp_path / "out", options)
    found = rows(tmp_path / "out")
    assert {path for path, row in found.items() if row["status"] == "rejected"} == REJECTED
    assert {path for path, row in found.items() if row["status"] == "tail lost"} == TAIL_LOST
    good = {path.name for path in (clips / "odd").iterdir()} - REJECTED
    assert {row["source_path"] for row in records(tmp_path / "out").values()} == good


def test_debug_shards_are_made_once_and_by_one_winner(tmp_path: Path):
    make = "from data_pipeline.prepare.synthetic import make_debug_shards as m; m({!r}, videos=4, images=2, size=32)"
    out = tmp_path / "debug"
    processes = [subprocess.Popen([sys.executable, "-c", make.format(str(out))]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    made = (out / "manifest.json").stat().st_mtime_ns
    make_debug_shards(out, videos=4, images=2, size=32)
    assert (out / "manifest.json").stat().st_mtime_ns == made
    assert [path.name for path in tmp_path.iterdir()] == ["debug"]
    with pytest.raises(ValueError, match="not debug shards of"):
        make_debug_shards(out, videos=5, images=2, size=32)
