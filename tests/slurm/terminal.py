"""A program on a terminal of its own, and what it has shown there."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parents[2]


class OnTerminal:
    """`python launch/submit.py WORDS`, begun; its output is read all the while."""

    def __init__(self, *words: str | Path) -> None:
        self._master, slave = pty.openpty()
        command = [sys.executable, str(ROOT / "launch" / "submit.py"), *map(str, words)]
        environment = os.environ | {"COLUMNS": "160", "LINES": "40", "TERM": "xterm"}
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave
        )
        os.close(slave)
        self._shown = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def shown(self) -> str:
        return self._shown.decode(errors="replace")

    def end(self, seconds: float) -> int:
        """Its status, when it has ended by itself."""
        try:
            status = self._process.wait(seconds)
            self._reader.join(seconds)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._master)
        return status

    def _read(self) -> None:
        while True:
            try:
                found = os.read(self._master, 1 << 16)
            except OSError:  # the program, and its end of the terminal, are gone
                return
            if not found:
                return
            self._shown += found
