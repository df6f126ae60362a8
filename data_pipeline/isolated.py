"""Decoding in a process of its own: a file that crashes or hangs a decoder costs that file and nothing else.

decord always works so (it dies of 4 % of damaged files); `data.decode_isolated` asks for it for the others. Each
process that decodes has one such child per backend, started at first use, kept over files and replaced when it has
died, hung or grown.
"""

import atexit
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.decoder_child import HEAD
from data_pipeline.media import DecodeError, MediaInfo
from data_pipeline.per_process import PerProcess

_START_SECONDS = 300.0
"""Within which a child must come to life: its imports, on a machine that is overloaded."""
_MOST_GROWTH = 1_000_000_000
"""Bytes that a child may grow by over its files before it is replaced: decord leaks (dmlc/decord #197, #208)."""
_number = itertools.count(1)


class IsolatedDecoder:
    """Any backend, in the child of this process: see `Decoder`. Several may be open; the child then opens files again.

    Raises DecodeError where the child dies or takes longer than `timeout` seconds to open the file or to decode. One
    that dies after it has had other files is replaced and tried once more: their damage must not cost this file.
    """

    def __init__(self, data: bytes, max_pixels: int, *, backend: str, timeout: float):
        self.data, self.max_pixels, self.timeout = data, max_pixels, timeout
        self.number = next(_number)
        self._seat = _seats.setdefault(backend, PerProcess()).get(lambda: _Seat(backend))
        self.info: MediaInfo = self._seat.work(self, None)

    def frames_at(self, times: np.ndarray) -> Tensor:
        """See `Decoder.frames_at`."""
        return self._seat.work(self, times).permute(0, 3, 1, 2)  # [T, C, H, W], stored as channels last


class _Ended(Exception):
    """The child is no more."""

    def __init__(self, reason: str, *, is_final: bool):
        super().__init__(reason)
        self.is_final = is_final  # trying again would take as long again


class _Seat:
    """This process's place for one backend's child, occupied or not."""

    def __init__(self, backend: str):
        self._backend = backend
        self._lock = threading.Lock()
        self.child: _Child | None = None
        atexit.register(self.clear)

    def work(self, file: IsolatedDecoder, times: np.ndarray | None) -> Any:
        """The file's MediaInfo, or its frames at `times`: uint8 `[T, H, W, C]`."""
        with self._lock:
            if self.child and self.child.has_grown and self.child.holds != file.number:
                self.clear()
            while True:
                self.child = self.child or _Child(self._backend)
                had_others = self.child.files > (1 if self.child.holds == file.number else 0)
                try:
                    return self._ask(self.child, file, times)
                except DecodeError:
                    raise
                except _Ended as ended:
                    self.clear()
                    if ended.is_final or not had_others:
                        raise DecodeError(f"{self._backend} {ended}") from None
                except BaseException:  # Ctrl-C: half a reply must not be taken for the next one's beginning
                    self.clear()
                    raise

    def _ask(self, child: "_Child", file: IsolatedDecoder, times: np.ndarray | None) -> Any:
        info = child.open(file) if child.holds != file.number else file.info
        return info if times is None else child.frames(times, info, file.timeout)

    def clear(self) -> None:
        """End the child, if there is one."""
        child, self.child = self.child, None
        if child:
            child.stop()


_seats: dict[str, PerProcess[_Seat]] = {}


def cpu_seconds() -> float:
    """CPU time that the living children of this process have used so far (Linux)."""
    children = [seat.child for each in _seats.values() if (seat := each.made()) and seat.child]
    pids = [child.pid for child in children if child.is_alive]
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)  # the kernel's name for a process's CPU clock


class _Child:
    """One process (see decoder_child.py) and the pipes to it."""

    def __init__(self, backend: str):
        self._backend = backend
        here = str(Path(__file__).resolve().parents[1])
        paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "data_pipeline.decoder_child", backend],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self._process.stdin
        assert self._process.stdout
        self._requests, self._replies = self._process.stdin.fileno(), self._process.stdout.fileno()
        for pipe in (self._requests, self._replies):
            os.set_blocking(pipe, False)
        self.pid = self._process.pid
        self.holds = 0  # number of the file that is open there
        self.files = 0  # it has been given so far
        self._memory: list[int] = []  # bytes, before the first file and before the latest one
        try:
            self._receive(time.monotonic() + _START_SECONDS, _START_SECONDS)
        except _Ended as ended:
            self.stop()
            raise RuntimeError(f"the process for {backend} did not come to life: it {ended}; see above") from None

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def has_grown(self) -> bool:
        return bool(self._memory) and self._memory[-1] - self._memory[0] > _MOST_GROWTH

    def open(self, file: IsolatedDecoder) -> MediaInfo:
        """Hand a file over; DecodeError where it is refused."""
        self.holds, self.files = file.number, self.files + 1
        reply = self._exchange({"max_pixels": file.max_pixels}, file.data, file.timeout)
        self._memory = [*self._memory[:1], reply["memory"]]
        if "error" in reply:
            self.holds = 0
            raise DecodeError(reply["error"])
        return MediaInfo(**reply["info"])

    def frames(self, times: np.ndarray, info: MediaInfo, timeout: float) -> Tensor:
        """Of the file that is open: uint8 `[T, H, W, C]`."""
        deadline = time.monotonic() + timeout
        reply = self._exchange({"times": times.tolist()}, b"", timeout)
        if "error" in reply:
            raise DecodeError(reply["error"])
        shape = (len(times), info.height, info.width, 3)
        frames = np.empty(reply["shape"], np.uint8)
        self._read(frames.data.cast("B"), deadline, timeout)
        if tuple(reply["shape"]) != shape:
            raise DecodeError(f"frames of shape {reply['shape']}, expected {list(shape)}")
        return torch.from_numpy(frames)

    def _exchange(self, header: dict[str, Any], payload: bytes, timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        text = json.dumps({**header, "size": len(payload)}).encode()
        for part in (HEAD.pack(len(text)) + text, payload):
            self._write(memoryview(part), deadline, timeout)
        return self._receive(deadline, timeout)

    def _receive(self, deadline: float, timeout: float) -> dict[str, Any]:
        head = bytearray(HEAD.size)
        self._read(memoryview(head), deadline, timeout)
        text = bytearray(HEAD.unpack(head)[0])
        self._read(memoryview(text), deadline, timeout)
        return json.loads(text)

    def _write(self, data: memoryview, deadline: float, timeout: float) -> None:
        while data:
            self._wait(self._requests, select.POLLOUT, deadline, timeout)
            try:
                data = data[os.write(self._requests, data) :]
            except BlockingIOError:
                continue
            except OSError:
                raise self._ended() from None

    def _read(self, data: memoryview, deadline: float, timeout: float) -> None:
        while data:
            self._wait(self._replies, select.POLLIN, deadline, timeout)
            got = os.readv(self._replies, [data])
            if got == 0:
                raise self._ended()
            data = data[got:]

    def _wait(self, pipe: int, event: int, deadline: float, timeout: float) -> None:
        ready = select.poll()
        ready.register(pipe, event)
        if not ready.poll(1000 * max(0.0, deadline - time.monotonic())):
            raise _Ended(f"took longer than {timeout:g} s and was stopped", is_final=True)

    def _ended(self) -> _Ended:
        try:
            code = self._process.wait(5)  # it has closed its pipes
        except subprocess.TimeoutExpired:
            code = 0
        if code >= 0:
            return _Ended(f"ended with exit status {code}", is_final=False)
        how = "was killed" if code == -signal.SIGKILL else "crashed"
        return _Ended(f"{how} ({signal.Signals(-code).name})", is_final=False)

    def stop(self) -> None:
        """End it now, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            pipe.close()
