"""The steps asked for are traced, no others, and a run that ends within them leaves what there is."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vjepa.train.profiling import ProfileConfig, Profiler

CPU = torch.device("cpu")


def train(profiler: Profiler, steps: range) -> list[Path]:
    """Steps of a small module, as the trainer takes them."""
    module, written = nn.Linear(4, 4), []
    for step in steps:
        written += profiler.step(step)
        module(torch.ones(2, 4)).sum().backward()
    return written


def events(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def spans(path: Path) -> list[str]:
    return [event["name"] for event in events(path) if event.get("cat") == "user_annotation"]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "profile").iterdir())


def test_the_steps_asked_for_are_traced_with_their_operators(tmp_path: Path) -> None:
    with Profiler(ProfileConfig(start=3, steps=2), tmp_path, 0, CPU) as profiler:
        assert train(profiler, range(1, 5)) == []
        written = train(profiler, range(5, 8))
    assert [path.name for path in written] == ["rank_0_steps_3-4.json.gz", "rank_0_steps_3-4_operators.txt"]
    assert files(tmp_path) == sorted(path.name for path in written)
    assert spans(written[0]) == ["step 3", "step 4"]
    assert [event["name"] for event in events(written[0])].count("aten::linear") == 2
    assert "aten::addmm" in written[1].read_text()
    assert "Self CPU Mem" not in written[1].read_text()


def test_off_or_on_another_rank_there_are_no_files(tmp_path: Path) -> None:
    for config, rank in ((ProfileConfig(), 0), (ProfileConfig(start=1, steps=1), 1)):
        with Profiler(config, tmp_path, rank, CPU) as profiler:
            assert train(profiler, range(1, 4)) == []
    assert list(tmp_path.iterdir()) == []
    with Profiler(ProfileConfig(start=1, steps=1, all_ranks=True), tmp_path, 1, CPU) as profiler:
        assert len(train(profiler, range(1, 4))) == 2


def test_a_run_that_ends_within_the_steps_leaves_those_it_came_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Profiler(ProfileConfig(start=2, steps=5), tmp_path, 0, CPU) as profiler:
        train(profiler, range(1, 4))
    assert files(tmp_path) == ["rank_0_steps_2-3.json.gz", "rank_0_steps_2-3_operators.txt"]
    assert "rank_0_steps_2-3.json.gz" in caplog.text


def test_a_failing_run_leaves_its_steps_and_its_own_error(tmp_path: Path) -> None:
    def failing() -> None:
        with Profiler(ProfileConfig(start=1), tmp_path, 0, CPU) as profiler:
            train(profiler, range(1, 3))
            raise torch.OutOfMemoryError("of the run")

    with pytest.raises(torch.OutOfMemoryError, match="of the run"):
        failing()
    assert spans(tmp_path / "profile" / "rank_0_steps_1-2.json.gz") == ["step 1", "step 2"]


def test_a_resumed_run_traces_what_is_left_or_says_that_nothing_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Profiler(ProfileConfig(start=3, steps=3), tmp_path, 0, CPU) as profiler:
        (trace, _) = train(profiler, range(5, 8))
    assert spans(trace) == ["step 5"]
    assert caplog.text == ""
    with Profiler(ProfileConfig(start=3, steps=3), tmp_path / "later", 0, CPU) as profiler:
        assert train(profiler, range(6, 9)) == []
    assert caplog.text.count("train.profile.start=3: nothing is traced") == 1


def test_a_second_trace_in_one_process_has_its_own_steps_only(tmp_path: Path) -> None:
    for start in (1, 4):
        with Profiler(ProfileConfig(start=start, steps=1), tmp_path, 0, CPU) as profiler:
            train(profiler, range(start, start + 2))
    assert spans(tmp_path / "profile" / "rank_0_steps_1-1.json.gz") == ["step 1"]
    assert spans(tmp_path / "profile" / "rank_0_steps_4-4.json.gz") == ["step 4"]


def test_memory_on_a_cpu_is_counted_per_operator(tmp_path: Path) -> None:
    with Profiler(ProfileConfig(start=1, steps=1, memory=True), tmp_path, 0, CPU) as profiler:
        trace, table = train(profiler, range(1, 3))
    assert "Self CPU Mem" in table.read_text()
    assert any(event["name"] == "[memory]" for event in events(trace))


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("a file in the way")
    with Profiler(ProfileConfig(start=1, steps=1), tmp_path, 0, CPU) as profiler:
        assert train(profiler, range(1, 4)) == []
    assert "profile of steps 1-1 was not written" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory snapshots need a CUDA device")
def test_memory_on_cuda_leaves_a_snapshot(tmp_path: Path) -> None:
    with Profiler(ProfileConfig(start=1, steps=1, memory=True), tmp_path, 0, torch.device("cuda", 0)) as profiler:
        profiler.step(1)
        torch.ones(1024, device="cuda").sum()
        written = profiler.step(2)
    assert [path.name for path in written][2] == "rank_0_steps_1-1_memory.pickle"


@pytest.mark.parametrize("field", ["start", "steps"])
def test_steps_that_are_none_are_refused(field: str) -> None:
    numbers = {"start": 1, "steps": 1} | {field: 0}
    with pytest.raises(ValueError, match=f"profile.{field}=0 must be at least 1"):
        ProfileConfig(start=numbers["start"], steps=numbers["steps"])


def test_a_run_traces_the_steps_it_is_asked_for_and_says_where(
    debug_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = debug_run(tmp_path / "run", "train.steps=6", "train.profile.start=3", "train.profile.steps=2")
    trace = run / "profile" / "rank_0_steps_3-4.json.gz"
    spans = {event.get("name") for event in events(trace)}
    assert {"step 3", "step 4"} <= spans
    assert not {"step 2", "step 5"} & spans
    assert f"profile: {trace}" in capsys.readouterr().out
