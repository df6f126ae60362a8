"""Claims: clips are taken by time; short, slow, uneven and rotated videos give the right frames from every decoder."""

from pathlib import Path

import numpy as np
import pytest
import torch
from made_videos import ramp, which, write_video
from PIL import Image

from data_pipeline.clips import clip_times, random_clip_times
from data_pipeline.config import Backend
from data_pipeline.decode import DecodeError, choose_backend, frames_at, open_decoder
from data_pipeline.media import MediaInfo

BACKENDS: list[Backend] = ["torchcodec", "pyav"]
INFO = MediaInfo(frames=100, fps=10.0, begin=2.0, end=12.0, width=64, height=48, codec="h264")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "torchcodec" and choose_backend("auto") != "torchcodec":
        pytest.skip("torchcodec does not load on this machine (FFmpeg is missing)")
    return request.param


def shown(path: Path, times: list[float], backend: Backend) -> list[int]:
    decoder = open_decoder(path.read_bytes(), "video", backend=backend)
    return which(frames_at(decoder, np.array(times)).numpy())


def test_a_clip_lies_inside_the_video_wherever_it_starts():
    for position in (0.0, 0.3, 1.0):
        times = clip_times(INFO, 16, 4.0, position)
        assert np.allclose(np.diff(times), 0.25)
        assert times[0] >= 2.0
        assert times[-1] < 12.0
    assert clip_times(INFO, 16, 4.0, 0.0)[0] == 2.0
    assert clip_times(INFO, 16, 4.0, 1.0)[0] == 8.0


def test_random_positions_come_from_the_generator_alone():
    def draw() -> np.ndarray:
        return random_clip_times(INFO, 8, 4.0, np.random.default_rng(5))

    assert (draw() == draw()).all()


def test_a_short_video_repeats_its_last_frame(tmp_path: Path, backend: Backend):
    path = write_video(tmp_path / "short.mp4", ramp(5), fps=5)
    decoder = open_decoder(path.read_bytes(), "video", backend=backend)
    times = clip_times(decoder.info, 8, 5.0, 0.7)
    assert which(frames_at(decoder, times).numpy()) == [0, 1, 2, 3, 4, 4, 4, 4]


def test_a_slow_video_repeats_frames_by_time(tmp_path: Path, backend: Backend):
    path = write_video(tmp_path / "slow.mp4", ramp(4), fps=2)
    assert shown(path, [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75], backend) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_variable_frame_rate_is_sampled_by_time(tmp_path: Path, backend: Backend):
    at = [0.0, 0.1, 0.2, 0.3, 1.0, 1.1, 2.0, 2.5]
    path = write_video(tmp_path / "vfr.mp4", ramp(8), times=at)
    assert shown(path, [0.05, 0.25, 0.9, 1.05, 1.95, 2.4, 2.5], backend) == [0, 2, 3, 4, 5, 6, 7]


def test_times_outside_the_video_give_its_first_and_last_frame(tmp_path: Path, backend: Backend):
    path = write_video(tmp_path / "clip.mp4", ramp(10), fps=10)
    assert shown(path, [-5.0, 0.0, 0.999, 1.0, 50.0], backend) == [0, 0, 9, 9, 9]


@pytest.mark.parametrize(
    "name",
    [
        "sam2__01_dog.mp4",
        "co-tracker__teddy.mp4",
        "decord__flipping_a_pancake.mkv",
        "moviepy__no_duration.webm",
        "torchcodec__nasa_13013.mp4",
        "moviepy__fire2.mp4",
        "odd/vfr.mp4",
        "odd/rot90.mp4",
        "odd/rot_90.mov",
        "odd/editlist.mp4",
    ],
)
def test_torchcodec_and_pyav_give_the_same_frames_of_real_videos(clips: Path, name: str):
    if choose_backend("auto") != "torchcodec":
        pytest.skip("torchcodec does not load on this machine (FFmpeg is missing)")
    data = (clips / name).read_bytes()
    ours, theirs = (open_decoder(data, "video", backend=backend) for backend in BACKENDS)
    assert (ours.info.frames, ours.info.width, ours.info.height) == (
        theirs.info.frames,
        theirs.info.width,
        theirs.info.height,
    )
    assert ours.info.begin == pytest.approx(theirs.info.begin, abs=1e-6)
    times = clip_times(ours.info, 7, 3.0, 0.37)
    difference = (frames_at(ours, times).float() - frames_at(theirs, times).float()).abs()
    assert difference.mean(dim=(1, 2, 3)).max() < 1.0  # grey values; neighbouring frames differ by more


def test_a_rotated_video_comes_upright(clips: Path, backend: Backend):
    info = open_decoder((clips / "odd/rot90.mp4").read_bytes(), "video", backend=backend).info
    assert (info.width, info.height) == (240, 320)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", bytes(range(256)) * 100])
@pytest.mark.parametrize("modality", ["video", "image"])
def test_bytes_that_are_no_media_give_one_kind_of_error(content: bytes, modality: str, backend: Backend):
    with pytest.raises(DecodeError) as caught:
        open_decoder(content, modality, backend=backend)
    assert "\n" not in str(caught.value)


def test_damaged_time_stamps_are_refused(clips: Path, backend: Backend):
    with pytest.raises(DecodeError):
        open_decoder((clips / "odd/audio_cover.mp3").read_bytes(), "video", backend=backend)


def test_a_frame_above_the_limit_is_refused(tmp_path: Path, backend: Backend):
    data = write_video(tmp_path / "clip.mp4", ramp(2)).read_bytes()
    with pytest.raises(DecodeError, match="64x48 pixels: more than max_pixels=1000"):
        open_decoder(data, "video", backend=backend, max_pixels=1000)


def test_an_image_is_turned_by_its_exif_orientation(tmp_path: Path):
    picture = Image.new("RGB", (40, 20), (255, 0, 0))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    decoder = open_decoder((tmp_path / "turned.jpg").read_bytes(), "image")
    frames = frames_at(decoder, np.zeros(1))
    assert frames.shape == (1, 3, 40, 20)
    assert frames.dtype == torch.uint8


def test_a_16_bit_image_keeps_its_grey_values(tmp_path: Path):
    Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(tmp_path / "deep.png")
    decoder = open_decoder((tmp_path / "deep.png").read_bytes(), "image")
    assert frames_at(decoder, np.zeros(1)).unique().tolist() == [0x80]
