"""Rows of metrics reach the disk whole, or the run is told which file and why."""

import json
from contextlib import closing
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vjepa.train.metrics import MetricsWriter
from vjepa.train.run_dir import RunDir, RunDirError


def test_a_row_can_be_read_before_the_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with closing(MetricsWriter(path, start_step=0, tensorboard=False)) as writer:
        writer.write({"step": 1, "loss": 0.1 + 0.2})
        assert json.loads(path.read_text()) == {"step": 1, "loss": 0.30000000000000004}


def test_a_full_disk_is_named_with_file_and_step_and_the_rows_before_it_stay(small_disk: Path) -> None:
    run = RunDir(small_disk)
    row = {f"measure{i}": 0.123456789 for i in range(200)}
    told = r"metrics\.jsonl could not be written at step \d+ \(No space left"
    with closing(MetricsWriter(run.metrics, start_step=0, tensorboard=False)) as writer:

        def fill_the_disk() -> None:
            for step in range(1, 1000):
                writer.write({"step": step, **row})

        with pytest.raises(RunDirError, match=told) as full:
            fill_the_disk()
    assert "--resume" in str(full.value)
    text = run.metrics.read_text()
    whole = [json.loads(line)["step"] for line in text.splitlines(keepends=True) if line.endswith("\n")]
    assert whole == list(range(1, len(whole) + 1))
    assert len(whole) > 50


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    with closing(MetricsWriter(tmp_path / "metrics.jsonl", start_step=0, tensorboard=True)) as writer:
        writer.write({"step": 3, "loss": 0.5, "data/video/little/share": 0.25})
    read = EventAccumulator(str(tmp_path)).Reload()
    assert read.Tags()["scalars"] == ["loss", "data/video/little/share"]
    for name, value in (("loss", 0.5), ("data/video/little/share", 0.25)):
        assert [(event.step, event.value) for event in read.Scalars(name)] == [(3, value)]
