"""`evals.embed`: which rows, at which times, whatever stops it, and in how much memory."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from torch import Tensor

import vjepa
from data_pipeline.decode import open_decoder
from evals import embed_rows, embed_windows, read_embedding
from evals.embed import main
from evals.embed_config import EmbedConfig, make_config
from evals.embed_windows import FrameStream, VideoWindows, WindowPlan, view_of
from evals.features import EncoderFeatures
from evals.models import load_model

DIE = Path(__file__).parent / "embed_and_die.py"
ROOT = Path(__file__).parents[2]
SHORT = ["--window=4", "--overlap=2", "--fps=10", "--size=32", "--device=cpu", "--batch=2"]


def write(path: Path, greys: list[int], times: list[float] | None = None, *, width: int = 48) -> Path:
    """A video of plain frames of these grey values, at 10 a second or at the given seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(10), options={"crf": "1", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = 32, width, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, grey in enumerate(greys):
            frame = av.VideoFrame.from_ndarray(np.full((32, width, 3), grey, np.uint8), format="rgb24")
            frame.time_base, frame.pts = Fraction(1, 1000), round(1000 * (times[i] if times else i / 10))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("video") / "a.mp4", [20 + 4 * i for i in range(41)])


def run(model: str, given: Path, out: Path, *more: str) -> int:
    return main(["--model", model, "--input", str(given), "--out", str(out), *SHORT, *more])


def sums(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ------------------------------------------------------------------------------------------------------------ windows


@pytest.mark.parametrize("steps", [1, 2, 7, 8, 9, 20, 31])
@pytest.mark.parametrize(("length", "stride"), [(8, 4), (8, 8), (8, 1), (4, 3), (1, 1)])
def test_a_step_is_taken_once_from_the_window_in_which_it_lies_deepest(steps: int, length: int, stride: int) -> None:
    plan = WindowPlan(steps, length, stride)
    taken = [(step, start) for i, start in enumerate(plan.starts) for step in range(*plan.kept(i))]
    assert [step for step, _ in taken] == list(range(steps))

    def depth(step: int, start: int) -> int:
        return min(step - start, start + length - 1 - step)

    for step, start in taken:
        assert depth(step, start) == max(depth(step, other) for other in plan.starts)


def test_rows_are_those_of_the_encoder_on_their_window(model: str, video: Path, tmp_path: Path) -> None:
    assert run(model, video, tmp_path) == 0
    features, times = read_embedding(tmp_path, "a.mp4")
    assert features.shape[:3] == (21, 2, 2)
    assert times == pytest.approx([0.05 + 0.2 * i for i in range(20)] + [4.0])
    encoder = vjepa.from_pretrained(model)
    decoder = open_decoder(video, "video")
    view = view_of(decoder.info, EmbedConfig(size=32), 16)
    clip = FrameStream(decoder, np.arange(41) / 10, view).take(2, 6)
    tokens = EncoderFeatures("", encoder).tokens(clip[None])[0]
    assert np.allclose(features[2], tokens[1], atol=1e-5), "of two windows the earlier: steps 1 and 2"
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (facts,) = manifest["files"]
    assert facts["shape"] == list(features.shape)
    assert facts["sha256"] == hashlib.sha256(video.read_bytes()).hexdigest()
    assert (facts["source"]["frames"], facts["sampled"], facts["grid"]) == (41, 41, [2, 2, 2])


def test_a_window_gives_the_same_features_in_any_batch(model: str, video: Path, tmp_path: Path) -> None:
    run(model, video, tmp_path / "two")
    run(model, video, tmp_path / "seven", "--batch=7")
    two, seven = (read_embedding(tmp_path / name, "a.mp4").features for name in ("two", "seven"))
    assert np.abs(two - seven).max() < 1e-5


def test_pooled_rows_are_means(model: str, video: Path, tmp_path: Path) -> None:
    for pool in ("none", "frame", "clip"):
        run(model, video, tmp_path / pool, f"--pool={pool}")
    dense, frame, clip = (read_embedding(tmp_path / pool, "a.mp4") for pool in ("none", "frame", "clip"))
    assert np.allclose(dense.features.mean(axis=(1, 2)), frame.features, atol=1e-5)
    assert np.array_equal(dense.times, frame.times)
    assert clip.features.shape[0] == 20, "a vector for each window"
    assert clip.times[:2] == pytest.approx([0.15, 0.35]), "the middle of the window"


def test_times_follow_the_time_stamps_of_a_video_of_variable_rate(model: str, tmp_path: Path) -> None:
    """Frames at 0, .1, .2 and then 2 s: what is sampled at 1 s is the third, for as long as it is shown."""
    path = write(tmp_path / "vfr.mp4", [20, 60, 100, 200, 240], [0, 0.1, 0.2, 2.0, 2.1])
    decoder = open_decoder(path, "video")
    windows = VideoWindows.of(decoder.info, EmbedConfig(window=4, overlap=2, fps=10), 2, is_image=False)
    frames = FrameStream(decoder, windows.times, view_of(decoder.info, EmbedConfig(size=32), 16)).take(0, 22)
    shown = frames.float().mean(dim=(0, 2, 3)).tolist()
    assert len(windows.times) == pytest.approx(22, abs=1)
    assert shown == pytest.approx([20, 60] + [100] * 18 + [200, 240], abs=3)
    assert run(model, path, tmp_path / "out") == 0
    times = read_embedding(tmp_path / "out", "vfr.mp4").times
    assert times[[0, 9, 10]] == pytest.approx([0.05, 1.85, 2.05])


@pytest.mark.parametrize(("fit", "size"), [("crop", (32, 32)), ("whole", (32, 48)), ("stretch", (32, 32))])
def test_the_frame_is_cropped_kept_whole_or_stretched(model: str, video: Path, tmp_path: Path, fit: str, size) -> None:
    run(model, video, tmp_path, f"--fit={fit}")
    assert read_embedding(tmp_path, "a.mp4").features.shape[1:3] == (size[0] // 16, size[1] // 16)


# -------------------------------------------------------------------------------------------------- stopped, gone on


@pytest.mark.parametrize("batches", [0, 1, 7])
def test_killed_and_started_again_it_leaves_the_same_bytes(
    model: str, video: Path, tmp_path: Path, batches: int
) -> None:
    more = ["--format=parquet"] if batches == 7 else []
    run(model, video, tmp_path / "whole", *more)
    arguments = ["--model", model, "--input", str(video), "--out", str(tmp_path / "killed"), *SHORT, *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    died = subprocess.run([sys.executable, DIE, str(batches), *arguments], env=environment, check=False)
    assert died.returncode == -signal.SIGKILL
    assert main(arguments) == 0
    assert sums(tmp_path / "killed") == sums(tmp_path / "whole")


@pytest.mark.parametrize("last", ["write_times", "settle", "write_parquet", "write_whole"])
def test_stopped_while_it_finishes_a_file_it_leaves_the_same_bytes(
    model: str, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """Stopped behind the last row, before its file has a name, and before its record is there."""
    more = ["--format=parquet"] if last in ("write_parquet", "write_whole") else []
    run(model, video, tmp_path / "whole", *more)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"evals.embed.{last}", stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, video, tmp_path / "stopped", *more)
    with pytest.raises(ValueError, match="no finished"):
        read_embedding(tmp_path / "stopped", "a.mp4")
    assert run(model, video, tmp_path / "stopped", *more) == 0
    assert sums(tmp_path / "stopped") == sums(tmp_path / "whole")


def test_it_goes_on_behind_what_is_done(
    model: str, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after three batches of ten, seven are left; finished, none."""
    monkeypatch.setattr(embed_rows, "COMMIT_SECONDS", 0.0)
    seen: list[int] = []
    tokens = EncoderFeatures.tokens

    def counted(source: EncoderFeatures, clips: Tensor) -> Tensor:
        seen.append(len(clips))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return tokens(source, clips)

    monkeypatch.setattr(EncoderFeatures, "tokens", counted)
    with pytest.raises(KeyboardInterrupt):
        run(model, video, tmp_path)
    assert run(model, video, tmp_path) == 0
    assert len(seen) == 4 + 7
    assert run(model, video, tmp_path) == 0
    assert len(seen) == 4 + 7


def test_a_file_that_has_changed_is_embedded_anew(model: str, tmp_path: Path) -> None:
    path = write(tmp_path / "in" / "a.mp4", [20, 40, 60, 80])
    run(model, path, tmp_path / "out")
    before = np.array(read_embedding(tmp_path / "out", "a.mp4").features)
    write(path, [200, 40, 90, 10, 30, 200])
    run(model, path, tmp_path / "out")
    assert read_embedding(tmp_path / "out", "a.mp4").features.shape[0] == before.shape[0] + 1


def test_a_file_replaced_while_it_was_stopped_begins_anew(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal speaks of a wide picture; the file is a square one now."""
    path = tmp_path / "in" / "a.mp4"
    write(path, [20 + 4 * i for i in range(41)])
    monkeypatch.setattr(embed_rows, "COMMIT_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(embed_rows.RowWriter, "finish", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(model, path, tmp_path / "out", "--fit=whole")
    assert list(tmp_path.rglob("*.journal"))
    write(path, [200, 40, 90, 10, 30, 200], width=32)
    assert run(model, path, tmp_path / "out", "--fit=whole") == 0
    assert read_embedding(tmp_path / "out", "a.mp4").features.shape[:3] == (3, 2, 2)


def test_another_configuration_is_refused_by_name(
    model: str, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(model, video, tmp_path)
    assert run(model, video, tmp_path, "--size=48") == 2
    assert "size was 32 and is now 48" in capsys.readouterr().err
    assert run("untrained:vit_tiny", video, tmp_path) == 2
    assert "model was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--window=5", "window=5 must be a multiple"),
        ("--size=30", "size=30 must"),
        ("--overlap=1", "overlap=1 must be a multiple"),
        ("--overlap=4", "overlap=4 must be at"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    model: str, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, message: str
) -> None:
    assert run(model, video, tmp_path, more) == 2
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ folders


def test_a_damaged_file_is_named_and_the_others_go_on(model: str, tmp_path: Path) -> None:
    write(tmp_path / "in" / "deep" / "a.mp4", [20, 40, 60])
    (tmp_path / "in" / "bad.mp4").write_bytes(b"no video" * 100)
    Image.new("RGB", (50, 40), (200, 10, 10)).save(tmp_path / "in" / "red.png")
    assert run(model, tmp_path / "in", tmp_path / "out") == 1
    (failure,) = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert failure["name"] == "bad.mp4"
    assert failure["reason"]
    assert read_embedding(tmp_path / "out", "deep/a.mp4").features.shape[0] == 2
    features, times = read_embedding(tmp_path / "out", "red.png")
    assert (features.shape[0], times.tolist()) == (1, [0.0])
    with pytest.raises(ValueError, match=r"no finished 'bad.mp4'; it holds deep/a.mp4, red.png"):
        read_embedding(tmp_path / "out", "bad.mp4")


def test_odd_videos_are_embedded_or_named(shared: Path, model: str, tmp_path: Path) -> None:
    names = ("rot_90.mov", "vfr.mp4", "single_frame.mp4", "ts.ts", "editlist.mp4", "empty.mp4", "zero_frame.mp4")
    (tmp_path / "in").mkdir()
    for name in names:
        if not (shared / "clips" / "odd" / name).is_file():
            pytest.skip(f"shared/clips/odd/{name} is not there")
        (tmp_path / "in" / name).symlink_to(shared / "clips" / "odd" / name)
    assert run(model, tmp_path / "in", tmp_path / "out") == 1
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {failure["name"] for failure in manifest["failures"]} == {"empty.mp4", "zero_frame.mp4"}
    assert {facts["name"] for facts in manifest["files"]} == set(names[:5])
    assert read_embedding(tmp_path / "out", "ts.ts").times[0] > 1.4, "its clock does not begin at 0"


@pytest.mark.parametrize("more", [[], ["--pool=frame", "--dtype=fp16"]])
def test_parquet_holds_what_npy_holds(model: str, video: Path, tmp_path: Path, more: list[str]) -> None:
    pytest.importorskip("pyarrow")
    run(model, video, tmp_path / "npy", *more)
    run(model, video, tmp_path / "parquet", "--format=parquet", *more)
    npy, parquet = (read_embedding(tmp_path / name, "a.mp4") for name in ("npy", "parquet"))
    assert npy.features.dtype == parquet.features.dtype
    assert np.array_equal(npy.features, parquet.features)
    assert np.array_equal(npy.times, parquet.times)
    assert not list(tmp_path.rglob("*.partial")) + list(tmp_path.rglob("*.journal"))


def test_a_full_disk_says_what_to_do_and_keeps_what_is_done(
    model: str, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(embed_rows.RowWriter, "add", full)
        assert run(model, video, tmp_path) == 2
    assert "make room and run the same command again" in capsys.readouterr().err
    assert run(model, video, tmp_path) == 0


def test_memory_holds_the_frames_of_a_window_whatever_the_length(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted: frames that the stream holds, and frames asked of the decoder at once."""
    monkeypatch.setattr(embed_windows, "DECODED_BYTES", 3 * 32 * 48 * 3)
    asked: list[np.ndarray] = []
    frames_at = embed_windows.frames_at
    monkeypatch.setattr(
        embed_windows, "frames_at", lambda decoder, times: (asked.append(times), frames_at(decoder, times))[1]
    )
    decoder = open_decoder(video, "video")
    config = EmbedConfig(window=8, overlap=4, fps=10, size=32, batch=3)
    windows = VideoWindows.of(decoder.info, config, 2, is_image=False)
    stream = FrameStream(decoder, windows.times, view_of(decoder.info, config, 16))
    held = []
    for _ in windows.batches(stream, EncoderFeatures("", vjepa.create_model("vit_debug")), 0):
        held.append(stream.num_held)
    assert max(held) == 8
    assert max(map(len, asked)) == 3
    assert np.array_equal(np.concatenate(asked), windows.times), "every frame is decoded once, in order"


def test_settings_default_to_what_the_model_was_trained_on(tmp_path: Path) -> None:
    trained_on = {"frames": 8, "fps": 2.0, "size": 112}
    vjepa.hub.save_pretrained(vjepa.create_model("vit_debug"), tmp_path, extra={"pretraining": trained_on})
    for spec in (str(tmp_path), f"mine={tmp_path}"):
        config = make_config(load_model(spec), spec)
        assert (config.window, config.overlap, config.fps, config.size) == (8, 4, 2.0, 112)
    untrained = make_config(load_model("untrained:vit_debug"), "untrained:vit_debug", fps=3.0)
    assert (untrained.window, untrained.fps, untrained.size) == (16, 3.0, 256)


def test_an_encoder_of_transformers_is_embedded_at_its_own_size(video: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(image_size=32, patch_size=16, **sizes)
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    given = ["--model", f"hf:{tmp_path / 'vit'}", "--input", str(video), "--out", str(tmp_path / "out")]
    assert main([*given, "--window=4", "--overlap=2", "--fps=10", "--device=cpu"]) == 0
    assert read_embedding(tmp_path / "out", "a.mp4").features.shape == (41, 2, 2, 32)
