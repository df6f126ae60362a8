"""Claims: an ingest killed at any point goes on to the same bytes; the parts of an array are one shard set."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from kill_points import content
from made_videos import ramp, write_video

from data_pipeline.prepare.convert import convert
from data_pipeline.prepare.find import Input
from data_pipeline.prepare.ingest import NothingIngested, ingest, main
from data_pipeline.prepare.journal import Task, convert_into_spool
from data_pipeline.prepare.options import IngestOptions, Outcome
from data_pipeline.prepare.slices import Slice
from data_pipeline.shards import Shards

OPTIONS = IngestOptions(shard_count=2, preset="ultrafast")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Five videos, one of them longer than a piece, and a broken one among them."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    for i in range(5):
        write_video(folder / f"{i}.mp4", ramp(4 + i))
    (folder / "2b.mp4").write_text("not a video")
    return folder


def keys(out: Path) -> list[str]:
    opened = Shards(out, "video")
    return [opened.row(i)["key"] for i in range(len(opened))]


def stop_at_the_last(task: Task) -> Outcome:
    """Ctrl-C, in the middle of the work."""
    if task.item.name == "4.mp4":
        raise KeyboardInterrupt
    return convert_into_spool(task)


def test_killed_at_any_step_on_disk_it_goes_on_to_the_same_bytes(inputs: Path, tmp_path: Path):
    work = tmp_path / "work"
    work.mkdir()
    for name in ("3.mp4", "4.mp4"):
        (inputs / name).unlink()
    command = [sys.executable, str(Path(__file__).with_name("kill_points.py")), str(inputs), str(work)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30


# The command, but that it stops to take results after the fourth: it is not done before it is killed.
HELD = """
import sys, time
from data_pipeline.prepare import ingest
take = ingest.in_order
def held(*arguments, **named):
    for number, result in enumerate(take(*arguments, **named)):
        if number == 4:
            time.sleep(3600)
        yield result
ingest.in_order = held
ingest.main(sys.argv[1:])
"""


def test_killed_with_all_its_processes_at_work_it_goes_on_to_the_same_bytes(tmp_path: Path):
    folder = tmp_path / "inputs"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (12, 96, 128, 3), np.uint8)
    for i in range(8):
        write_video(folder / f"{i}.mp4", np.roll(noise, i, axis=2))
    ingest([folder], tmp_path / "undisturbed", IngestOptions(shard_count=3))
    out = tmp_path / "out"
    arguments = [str(folder), "--out", str(out), "--shard-count", "3", "--jobs", "2", "--quiet"]
    command = [sys.executable, "-m", "data_pipeline.prepare.ingest", *arguments]
    held = [sys.executable, "-c", HELD, *arguments]
    process = subprocess.Popen(held, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[2])
    while len(list(tmp_path.glob("out.partial/spool/[0-9]/outcome.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not out.exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[2])
    assert content(out) == content(tmp_path / "undisturbed")


def test_what_was_converted_before_the_kill_is_not_converted_again(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.prepare.ingest.convert_into_spool", stop_at_the_last)
        with pytest.raises(KeyboardInterrupt):
            ingest([inputs], tmp_path / "out", OPTIONS)
    converted = []

    def counted(item: Input, options: IngestOptions, scratch: Path) -> Outcome:
        converted.append(item.name)
        return convert(item, options, scratch)

    monkeypatch.setattr("data_pipeline.prepare.journal.convert", counted)
    ingest([inputs], tmp_path / "out", OPTIONS)
    assert converted == ["4.mp4"]
    assert keys(tmp_path / "out") == [f"{i}-0000" for i in range(5)]


def test_a_spooled_file_that_is_not_whole_is_made_again(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ingest([inputs], tmp_path / "undisturbed", OPTIONS)

    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.prepare.ingest.convert_into_spool", stop_at_the_last)
        with pytest.raises(KeyboardInterrupt):
            ingest([inputs], tmp_path / "out", IngestOptions(preset="ultrafast"))
    (torn,) = (tmp_path / "out.partial" / "spool" / "0").glob("*.mp4")
    torn.write_bytes(torn.read_bytes()[:100])
    ingest([inputs], tmp_path / "out", IngestOptions(preset="ultrafast"))
    assert keys(tmp_path / "out") == keys(tmp_path / "undisturbed")
    whole, again = Shards(tmp_path / "undisturbed", "video"), Shards(tmp_path / "out", "video")
    assert whole.read(0, verify=True)[0] == again.read(0, verify=True)[0]


def test_other_options_do_not_go_on_with_what_was_left(inputs: Path, tmp_path: Path, capsys):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    ingest([inputs], tmp_path / "other", OPTIONS)
    (partial / "ingest.json").write_text((tmp_path / "other" / "ingest.json").read_text())
    arguments = [str(inputs), "--out", str(tmp_path / "out"), "--preset", "ultrafast", "--jobs", "1"]
    assert main([*arguments, "--shard-count", "3"]) == 1
    assert "shard_count was 2, is 3" in capsys.readouterr().err
    assert main([*arguments, "--shard-count", "3", "--restart"]) == 0
    assert not partial.exists()


def test_two_ingests_do_not_write_one_folder(inputs: Path, tmp_path: Path):
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    (tmp_path / "out.partial").mkdir()
    command = [sys.executable, "-c", code, str(tmp_path / "out.partial" / "lock")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout
    holder.stdout.readline()
    try:
        with pytest.raises(ValueError, match="another ingest is writing there"):
            ingest([inputs], tmp_path / "out", OPTIONS)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()


def test_the_same_command_again_finds_its_work_done(inputs: Path, tmp_path: Path):
    first = ingest([inputs], tmp_path / "out", OPTIONS)
    again = ingest([inputs], tmp_path / "out", OPTIONS)
    assert not first.was_there
    assert again.was_there
    assert (again.videos, again.bytes, again.notes) == (first.videos, first.bytes, first.notes)


def test_the_parts_together_are_one_shard_set(inputs: Path, tmp_path: Path):
    out = tmp_path / "out"
    for index in (2, 0, 1):
        assert not (out / "manifest.json").exists()
        ingest([inputs], out, OPTIONS, part=Slice(index, 3))
    assert keys(out) == [f"{i}-0000" for i in (0, 1, 3, 2, 4)]  # part by part, the inputs dealt out in turn
    whole = ingest([inputs], tmp_path / "whole", OPTIONS)
    assert (out / "rejected.jsonl").read_text() == (tmp_path / "whole" / "rejected.jsonl").read_text()
    assert whole.videos == 5
    one, other = Shards(out, "video"), Shards(tmp_path / "whole", "video")
    by_key = {row["key"]: data for data, row in (other.read(i, verify=True) for i in range(len(other)))}
    assert all(by_key[row["key"]] == data for data, row in (one.read(i, verify=True) for i in range(len(one))))


def test_a_part_made_again_with_other_options_is_not_joined(inputs: Path, tmp_path: Path):
    out = tmp_path / "out"
    ingest([inputs], out, OPTIONS, part=Slice(0, 2))
    with pytest.raises(ValueError, match="not made of the same inputs with the same options"):
        ingest([inputs], out, IngestOptions(shard_count=3), part=Slice(1, 2))
    assert not (out / "manifest.json").exists()


def test_more_parts_than_inputs_is_no_error_and_no_inputs_at_all_is(inputs: Path, tmp_path: Path):
    for index in range(8):
        ingest([inputs], tmp_path / "out", OPTIONS, part=Slice(index, 8))
    assert len(keys(tmp_path / "out")) == 5
    bad = inputs / "2b.mp4"
    ingest([bad], tmp_path / "bad", OPTIONS, part=Slice(0, 2))
    with pytest.raises(NothingIngested):
        ingest([bad], tmp_path / "bad", OPTIONS, part=Slice(1, 2))


@pytest.mark.parametrize("text", ["2/2", "-1/2", "1", "0/0", "a/b"])
def test_a_part_that_cannot_be_is_refused(text: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["x", "--out", "y", f"--shard={text}"])
    assert "--shard" in capsys.readouterr().err


def test_parts_of_another_division_are_refused(inputs: Path, tmp_path: Path):
    ingest([inputs], tmp_path / "out", OPTIONS, part=Slice(0, 2))
    with pytest.raises(ValueError, match="is a part of 3"):
        ingest([inputs], tmp_path / "out", OPTIONS, part=Slice(0, 3))
    with pytest.raises(ValueError, match=r"holds slice-000-of-002"):
        ingest([inputs], tmp_path / "out", OPTIONS)


def test_the_command_line_cuts_long_videos_into_segments(inputs: Path, tmp_path: Path):
    command = [str(inputs / "4.mp4"), "--out", str(tmp_path / "out"), "--segment", "0.5", "--jobs", "1", "--quiet"]
    assert main(command) == 0
    opened = Shards(tmp_path / "out", "video")
    assert [(opened.row(i)["start"], opened.row(i)["frames"]) for i in range(len(opened))] == [(0.0, 4), (0.4, 4)]
