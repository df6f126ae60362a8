"""Claims: a decoder in a process of its own gives the same frames; what kills or hangs it costs one file."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from made_videos import ramp, which, write_video

from data_pipeline import isolated
from data_pipeline.config import Backend, DataConfig, ModalityConfig, SourceConfig
from data_pipeline.decode import DecodeError, choose_backend, frames_at, open_decoder
from data_pipeline.loader import build_loader

pytestmark = pytest.mark.skipif(find_spec("decord") is None, reason="decord is not installed: x86-64 Linux only")
TIMES = np.array([0.05, 0.35, 0.35, 0.95])
SHOWN = [0, 3, 3, 9]


@pytest.fixture
def data(tmp_path: Path) -> bytes:
    return write_video(tmp_path / "clip.mp4", ramp(10), fps=10).read_bytes()


def shown(data: bytes, backend: Backend = "decord", timeout: float = 60.0) -> list[int]:
    decoder = open_decoder(data, "video", backend=backend, isolated=True, timeout=timeout)
    return which(frames_at(decoder, TIMES).numpy())


def child_of(backend: str) -> isolated._Child:
    seat = isolated._seats[backend].made()
    assert seat
    assert seat.child
    return seat.child


def test_a_decoder_in_its_own_process_gives_the_frames_asked_for(data: bytes):
    for backend in ("decord", "pyav"):
        decoder = open_decoder(data, "video", backend=backend, isolated=True)
        assert (decoder.info.frames, decoder.info.width, decoder.info.height) == (10, 64, 48)
        assert which(frames_at(decoder, TIMES).numpy()) == SHOWN
        assert which(frames_at(decoder, np.array([-5.0, 50.0])).numpy()) == [0, 9]


def test_isolation_changes_no_pixel(data: bytes):
    ours, theirs = (open_decoder(data, "video", backend="pyav", isolated=isolated) for isolated in (False, True))
    assert ours.info == theirs.info
    assert torch.equal(frames_at(ours, TIMES), frames_at(theirs, TIMES))


def test_the_process_is_kept_over_files_and_files_can_be_open_side_by_side(data: bytes, tmp_path: Path):
    shown(data)
    first = child_of("decord").pid
    one = open_decoder(data, "video", backend="decord")
    two = open_decoder(write_video(tmp_path / "b.mp4", ramp(3), fps=10).read_bytes(), "video", backend="decord")
    assert which(frames_at(one, TIMES).numpy()) == SHOWN
    assert which(frames_at(two, TIMES).numpy()) == [0, 2, 2, 2]
    assert which(frames_at(one, TIMES).numpy()) == SHOWN
    assert child_of("decord").pid == first


def test_a_file_that_crashes_decord_is_a_bad_file_by_name(clips: Path, data: bytes):
    shown(data)
    before = child_of("decord").pid
    for _ in range(2):
        with pytest.raises(DecodeError, match=r"^decord crashed \(SIGSEGV\)$"):
            open_decoder((clips / "odd/corrupt_stco.mp4").read_bytes(), "video", backend="decord")
    assert shown(data) == SHOWN
    assert child_of("decord").pid != before


def test_a_crash_that_another_file_has_left_behind_costs_nothing(data: bytes):
    decoder = open_decoder(data, "video", backend="decord")
    shown(data)
    before = child_of("decord").pid
    os.kill(before, signal.SIGSEGV)
    assert which(frames_at(decoder, TIMES).numpy()) == SHOWN
    assert child_of("decord").pid != before


def test_what_hangs_is_stopped_and_named(data: bytes):
    decoder = open_decoder(data, "video", backend="decord", timeout=60.0)
    assert isinstance(decoder, isolated.IsolatedDecoder)
    decoder.timeout = 0.3  # from now on: opening the file may take long on a busy machine
    hung = child_of("decord").pid
    os.kill(hung, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(DecodeError, match=r"^decord took longer than 0\.3 s and was stopped$"):
        frames_at(decoder, TIMES)
    assert time.monotonic() - began < 60
    assert not Path(f"/proc/{hung}").exists()
    assert shown(data) == SHOWN


def test_a_process_that_has_grown_is_replaced_before_the_next_file(data: bytes, monkeypatch: pytest.MonkeyPatch):
    shown(data)
    before = child_of("decord").pid
    shown(data)
    assert child_of("decord").pid == before
    monkeypatch.setattr(isolated, "_MOST_GROWTH", -(10**12))
    assert shown(data) == SHOWN
    assert child_of("decord").pid != before


def test_the_cpu_time_of_the_process_is_counted(data: bytes):
    shown(data)
    before = isolated.cpu_seconds()
    for _ in range(20):
        shown(data)
    assert 0 < isolated.cpu_seconds() - before < 20


def test_threads_share_the_process_one_after_the_other(data: bytes):
    results: list[list[int]] = []
    threads = [threading.Thread(target=lambda: results.extend(shown(data) for _ in range(5))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [SHOWN] * 15


def _in_fork(data: bytes, pipe: Connection) -> None:
    pipe.send((shown(data), child_of("decord").pid))


def test_a_forked_process_starts_one_of_its_own(data: bytes):
    shown(data)
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=_in_fork, args=(data, theirs))
    process.start()
    frames, pid = ours.recv()
    process.join()
    assert frames == SHOWN
    assert pid != child_of("decord").pid
    assert shown(data) == SHOWN


_HANGS = """
import time
from data_pipeline import decoder_child
decoder_child.DecordDecoder = lambda data, max_pixels: time.sleep(1000)
decoder_child.main("decord")
"""
_DIES = """
import os, signal, subprocess, sys, time
from data_pipeline.decoder_child import HEAD
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.read(HEAD.size)
request = b'{"size": 0, "max_pixels": 1}'
child.stdin.write(HEAD.pack(len(request)) + request)
child.stdin.flush()
time.sleep(0.3)
print(child.pid, child.poll(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_process_does_not_outlive_its_parent_even_where_it_hangs():
    done = subprocess.run([sys.executable, "-c", _DIES, _HANGS], capture_output=True, text=True, check=False)
    pid, ended = done.stdout.split()
    assert ended == "None", "it has to be in the middle of its work when its parent dies"
    deadline = time.monotonic() + 60
    while _is_alive(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_alive(int(pid))


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_loader_with_workers_reads_with_decord_and_replaces_what_crashes_it(clips: Path, tmp_path: Path):
    write_video(tmp_path / "good.mp4", ramp(10), fps=10)
    (tmp_path / "bad.mp4").symlink_to(clips / "odd/corrupt_stco.mp4")
    config = DataConfig(
        video=ModalityConfig(sources={"files": SourceConfig(path=str(tmp_path))}), decoder="decord", workers=2
    )
    loader = build_loader(config, seed=0, batch={"video": 2}, stop_step=4)
    samples = [sample for item in loader for sample in item["video"]]
    assert {sample.key for sample in samples} == {"good.mp4"}
    reasons = {(bad.key, bad.reason) for sample in samples for bad in sample.rejected}
    assert reasons == {("bad.mp4", "decord crashed (SIGSEGV)")}


def test_torchcodec_can_be_isolated_too(data: bytes):
    if choose_backend("auto") != "torchcodec":
        pytest.skip("torchcodec does not load on this machine (FFmpeg is missing)")
    assert shown(data, "torchcodec") == SHOWN
    child_of("torchcodec").stop()
