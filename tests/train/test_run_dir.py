"""A run directory belongs to one process and one run, and is cut back to its checkpoint on resume."""

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from vjepa.train import run_dir
from vjepa.train.run_dir import RunDir, RunDirError, write_text

HOLD = """
import sys, time
from vjepa.train.run_dir import RunDir
run = RunDir(sys.argv[1])
run.lock()
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir, "LOCK_PATIENCE_S", 0.5)


def write_rows(path: Path, *rows: object, tail: str = "") -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def rows(path: Path) -> list[object]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("impatient")
def test_a_second_process_is_refused_and_told_who_holds_the_run(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(RunDirError, match=rf"in use by another process \(pid {holder.pid} on .*another run_dir"):
            RunDir(tmp_path).lock()
    finally:
        holder.kill()
        holder.communicate()
    with closing(RunDir(tmp_path)) as run:
        run.lock()  # a lock dies with its process, however it went


@pytest.mark.parametrize("left", ["config.yaml", "checkpoints"])
def test_starting_over_an_existing_run_is_refused(tmp_path: Path, left: str) -> None:
    run = RunDir(tmp_path)
    run.refuse_existing()
    (tmp_path / left).mkdir()
    with pytest.raises(RunDirError, match=r"holds a run already: continue it with --resume, or choose another run_dir"):
        run.refuse_existing()


def test_rows_after_the_checkpoint_are_cut(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for path in (run.metrics, run.bad_samples):
        write_rows(path, {"step": 4}, {"step": 5}, {"step": 6})
    run.cut_back(5)
    assert rows(run.metrics) == rows(run.bad_samples) == [{"step": 4}, {"step": 5}]


@pytest.mark.parametrize("torn", ['{"step": 6, "lo', "\0\0\0\0", '{"step": 6, "loss": 0.1}'])
def test_a_last_line_torn_by_a_kill_is_no_obstacle(tmp_path: Path, torn: str) -> None:
    run = RunDir(tmp_path)
    write_rows(run.metrics, {"step": 4}, {"step": 5}, tail=torn)
    run.cut_back(5)
    assert rows(run.metrics) == [{"step": 4}, {"step": 5}]
    assert run.metrics.read_text().endswith("\n")


@pytest.mark.parametrize("garbage", ["garbage", "7", '{"loss": 1.0}', "\udcff"])
def test_garbage_in_the_middle_is_refused_by_file_and_line(tmp_path: Path, garbage: str) -> None:
    run = RunDir(tmp_path)
    text = '{"step": 4}\n' + garbage + '\n{"step": 5}\n'
    run.metrics.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RunDirError, match=r"metrics\.jsonl, line 2 is no row of a step.*remove"):
        run.cut_back(5)
    assert run.metrics.read_bytes() == text.encode(errors="surrogateescape")


def test_nothing_is_made_of_logs_that_are_not_there(tmp_path: Path) -> None:
    RunDir(tmp_path).cut_back(0)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_whole_or_keeps_its_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    write_text(path, "old")

    def fail(self: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_a_run_is_described_by_configuration_commands_and_source(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    repository = Path(__file__).resolve().parents[2]
    run.describe("train: {}\n", repository)
    run.describe("train: {}\n", repository)
    assert run.config.read_text() == "train: {}\n"
    assert len((tmp_path / "command.txt").read_text().splitlines()) == 2  # one per segment
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert len(environment["git_sha"]) == 40
    assert environment["packages"]["torch"]
    assert {"git_diff", "devices", "python", "platform"} <= environment.keys()
