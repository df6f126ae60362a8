"""A job of commands that finds other code than its own stops with a note, and runs nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import command_task
from launch.command_task import CommandTask
from launch.job_order import JobOrder
from launch.slurm_task import REFUSED


class Left(Exception):
    """In place of the end of the process."""


def test_other_code_is_refused_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = JobOrder(
        root=str(tmp_path), run_dir=str(tmp_path), stage="evals", recipe="debug", snapshot=str(tmp_path / "code"),
        code_hash="", profile="private_test", nodes=1, tasks_per_node=1, gpus_per_node=0, max_restarts=1,
        max_crashes=1, rendezvous_s=1.0, signal_delay_s=60,
    )  # fmt: skip
    order.write()
    notes: list[tuple[str, str]] = []

    def leave(status: int) -> None:
        raise Left(status)

    monkeypatch.setattr(command_task, "leave", leave)
    monkeypatch.setattr(command_task.signal, "signal", lambda *_: None)
    monkeypatch.setattr(CommandTask, "note", lambda self, kind, text, **_: notes.append((kind, text)))
    with pytest.raises(Left, match=str(REFUSED)):
        CommandTask(order.file("json"), [["touch", str(tmp_path / "ran")]])()
    assert [kind for kind, _ in notes] == ["refused"]
    assert str(tmp_path / "code") in notes[0][1]
    assert not (tmp_path / "ran").exists()
