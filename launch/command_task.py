"""What a SLURM job executes that trains nothing: commands, one after another, such as evaluations or a part of data.

A restart begins again with the first command: each of them passes over what it finds done. The standard library alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from launch.job_order import JobOrder
from launch.slurm_task import REFUSED, SIGNALS, SlurmTask, leave
from launch.snapshot import OtherCodeError, refuse_other_code

STEP_VARIABLE = "VJEPA_STEP"
"""In a command, `{VJEPA_STEP}` is this variable of the job: one script serves the checkpoints of a training."""


class CommandTask(SlurmTask):
    """Commands for one rank; the first that fails ends the job, which the supervisor may start again."""

    def __init__(self, order: Path | str, commands: Sequence[Sequence[str]]) -> None:
        super().__init__(order)
        self.commands = [list(command) for command in commands]
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> NoReturn:
        for signum in SIGNALS:
            signal.signal(signum, self.leave_early)
        order = JobOrder.read(self.order)
        try:
            refuse_other_code(order.snapshot)
        except OtherCodeError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            self.note("refused", str(error))
            leave(REFUSED)
        for command in self.commands:
            if status := self._run(command):
                self.note("error", f"status {status} of {' '.join(self._filled(command))}")
                leave(status)
        self.note("done", f"{len(self.commands)} commands")
        leave(0)

    def _run(self, command: Sequence[str]) -> int:
        filled = self._filled(command)
        print(f"running {' '.join(filled)}", flush=True)
        self._process = subprocess.Popen(filled)
        return self._process.wait()

    def _filled(self, command: Sequence[str]) -> list[str]:
        step = os.environ.get(STEP_VARIABLE, "")
        return [word.replace(f"{{{STEP_VARIABLE}}}", step) for word in command]

    def leave_early(self, signum: int, frame: FrameType | None) -> NoReturn:
        """SLURM ends the job, or is about to: the command is stopped; a restart begins with it again."""
        name = signal.Signals(signum).name
        print(f"stopped by {name}", flush=True)
        if self._process is not None:
            self._process.kill()
        self.note("interrupted", name, signum=signum)
        leave(128 + signum)
