"""A file's bytes from first to last as they come: off a disk, out of a command, over HTTP; none waits for ever."""

import contextlib
import os
import select
import signal
import subprocess
from typing import Protocol

from data_pipeline.retries import RemoteConfig, Transient
from data_pipeline.web import Web

PIPE = "pipe:"


class Incoming(Protocol):
    """Bytes in order. `read` raises Transient where they fail to come, or where what sent them says that it failed."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end."""
        ...

    def close(self) -> None:
        """Let go of it, and of what has not been read."""
        ...


def open_incoming(url: str, web: Web, policy: RemoteConfig) -> Incoming:
    """The bytes of `http(s)://...`, `pipe:COMMAND` or a local path; Transient or Permanent where there are none."""
    if url.startswith(PIPE):
        return CommandOutput(url.removeprefix(PIPE), policy)
    if "://" in url:
        return web.open(url)
    try:
        return open(url, "rb", buffering=0)
    except OSError as error:
        raise Transient(f"{error.strerror}") from error


class CommandOutput:
    """What a shell command prints.

    Its processes are a group of their own and are killed on `close`, or where none of them prints a byte for the
    policy's time-out. A reader that is killed itself leaves them a broken pipe, which ends what writes to it.
    """

    def __init__(self, command: str, policy: RemoteConfig):
        self._timeout = policy.timeout
        self._process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdout
        self._output = self._process.stdout
        self._poll = select.poll()
        self._poll.register(self._output, select.POLLIN)

    def read(self, size: int) -> bytes:
        """See `Incoming`; the end of the output is one only if the command's exit status is 0."""
        if not self._poll.poll(1000 * self._timeout):
            raise Transient(f"the command printed nothing for {self._timeout:g} s")
        data = os.read(self._output.fileno(), size)
        if not data:
            self._finish()
        return data

    def close(self) -> None:
        """See `Incoming`."""
        if self._process.returncode is None:  # not waited for: the number is still this group's
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._output.close()

    def _finish(self) -> None:
        try:
            status = self._process.wait(self._timeout)
        except subprocess.TimeoutExpired as error:
            raise Transient(f"the command closed its output and ran on for {self._timeout:g} s") from error
        if status:
            raise Transient(f"the command ended with status {status}")
