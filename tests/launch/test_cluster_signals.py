"""SLURM signals every process of a step; only the training process may answer."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.benchmarks.campaign import (
    complete,
    last_logged,
    newest_checkpoint,
    poll,
    session_members,
    sessions_of,
    start,
)
from tests.benchmarks.kill_and_resume import COMMANDS

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.timeout(600),
]


def test_workers_and_decoders_outlive_the_clusters_signals_until_the_run_has_saved(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("train.steps=100000", "data.workers=2", "data.decode_isolated=true", "train.checkpoint.every=1000")
    process = start(COMMANDS["train"], run, settings)
    poll(process, lambda: last_logged(run) >= 3)
    before = {entry.pid: entry.command for entry in session_members(*sessions_of(process.pid))}
    others = set(before) - {process.pid}
    assert sum("decoder_child" in before[pid] for pid in others) == 2
    assert len(others) >= 4
    for signum in (signal.SIGUSR2, signal.SIGTERM):
        for pid in others:
            os.kill(pid, signum)
    seen = last_logged(run)
    poll(process, lambda: last_logged(run) >= seen + 20)  # more steps than were prepared
    assert others <= {entry.pid for entry in session_members(*sessions_of(process.pid))}
    for entry in session_members(*sessions_of(process.pid)):
        os.kill(entry.pid, signal.SIGUSR2)
    said = complete(process, status=128 + signal.SIGUSR2)
    assert "data worker" not in said  # none was lost
    assert "stopped by SIGUSR2 at step" in said
    assert newest_checkpoint(run) == last_logged(run)
