"""Claims: the stream is the same for any world, workers and starting step; bad samples are replaced in the open."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from data_pipeline.config import ClipConfig, DataConfig, ModalityConfig, SourceConfig
from data_pipeline.dataset import BadDataError, ClipDataset
from data_pipeline.digest import main
from data_pipeline.loader import Loader, build_loader
from data_pipeline.sample import Sample
from data_pipeline.shards import Shards


def config(shards: Path, workers: int = 0, **values: object) -> DataConfig:
    """Both modalities of one folder, tiny clips."""
    source = {"debug": SourceConfig(str(shards))}
    video = ModalityConfig(source, ClipConfig(frames=4, size=16))
    image = ModalityConfig(dict(source), ClipConfig(frames=1, size=24))
    return dataclasses.replace(DataConfig(video=video, image=image, workers=workers), **values)


def loader(
    shards: Path,
    *,
    workers: int = 0,
    steps: tuple[int, int] = (0, 4),
    world: int = 1,
    rank: int = 0,
    accumulate: int = 1,
) -> Loader:
    start, stop = steps
    return build_loader(
        config(shards, workers),
        seed=1,
        batch={"video": 6, "image": 12},
        world=world,
        rank=rank,
        accumulate=accumulate,
        start_step=start,
        stop_step=stop,
    )


def content(samples: list[Sample]) -> list[tuple[int, str, bytes]]:
    return [(sample.ordinal, sample.key, sample.clip.numpy().tobytes()) for sample in samples]


def stream(loader: Iterable[dict[str, list[Sample]]]) -> dict[str, list[tuple[int, str, bytes]]]:
    """Everything the loader yields, by modality."""
    found: dict[str, list[tuple[int, str, bytes]]] = {"video": [], "image": []}
    for item in loader:
        for modality, samples in item.items():
            found[modality] += content(samples)
    return found


def digest(shards: Path, capsys: pytest.CaptureFixture[str], **options: int) -> list[dict[str, list[str]]]:
    settings = {"batch": 6, "frames": 4, "size": 16, "steps": 4} | options
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    assert main(["digest", str(shards), *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_an_item_is_a_micro_batch_of_every_modality(shards: Path):
    items = list(loader(shards, accumulate=3))
    assert len(items) == len(loader(shards, accumulate=3)) == 12
    assert [len(items[0][modality]) for modality in ("video", "image")] == [2, 4]
    video, image = items[0]["video"][0], items[0]["image"][0]
    assert (video.clip.shape, image.clip.shape) == ((3, 4, 16, 16), (3, 1, 24, 24))
    assert video.clip.dtype == torch.uint8
    assert video.clip.is_contiguous()
    assert video.extra["timestamps"].shape == (4,)
    assert video.extra["labels"].keys() == {"direction", "shape"}
    assert video.extra["source_path"].startswith("video-")


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_the_stream(shards: Path, workers: int):
    assert stream(loader(shards, workers=workers)) == stream(loader(shards))


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (3, 2), (1, 6)])
def test_ranks_and_micro_batches_only_share_the_stream_out(shards: Path, world: int, accumulate: int):
    parts = [stream(loader(shards, world=world, rank=rank, accumulate=accumulate)) for rank in range(world)]
    for modality, whole in stream(loader(shards)).items():
        assert sorted(entry for part in parts for entry in part[modality]) == whole


def test_a_start_in_the_middle_of_an_epoch_gives_the_same_steps(shards: Path):
    whole, rest = stream(loader(shards)), stream(loader(shards, steps=(3, 4)))
    assert rest["video"] == whole["video"][18:]
    assert rest["image"] == whole["image"][36:]


def test_each_sample_comes_once_per_epoch(shards: Path):
    keys = [key for _, key, _ in stream(loader(shards, steps=(0, 5)))["video"]]
    assert len(keys) == 30
    for epoch in range(3):
        assert len(set(keys[10 * epoch : 10 * epoch + 10])) == 10


def test_the_same_record_is_cropped_anew_in_every_epoch(shards: Path):
    clips: dict[str, set[bytes]] = {}
    for _, key, pixels in stream(loader(shards, steps=(0, 5)))["video"]:
        clips.setdefault(key, set()).add(pixels)
    assert all(len(found) == 3 for found in clips.values())


def test_digest_is_the_same_for_any_workers_world_and_start(shards: Path, capsys: pytest.CaptureFixture[str]):
    whole = digest(shards, capsys)
    assert whole[2].keys() == {"step", "epoch", "ordinals", "keys", "sha256"}
    assert [row["epoch"] for row in whole] == [0, 0, 1, 1]
    assert digest(shards, capsys, workers=1) == digest(shards, capsys, workers=3) == whole
    assert digest(shards, capsys, start=2, steps=2) == whole[2:]
    for world in (2, 3):
        parts = [digest(shards, capsys, world=world, rank=rank) for rank in range(world)]
        for step, row in enumerate(whole):
            for name in ("ordinals", "keys", "sha256"):
                assert [value for part in parts for value in part[step][name]] == row[name]


def test_digest_runs_as_a_module_and_prints_nothing_else(shards: Path):
    command = [sys.executable, "-m", "data_pipeline.loader", "digest", str(shards), "--batch", "2", "--size", "16"]
    done = subprocess.run([*command, "--modality", "image", "--workers", "1"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)["sha256"]) == 2


def test_digest_reports_an_error_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["digest", str(tmp_path), "--batch", "2"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1


def test_a_mixture_keeps_its_shares_and_names_its_sources(shards: Path):
    sources = {"often": SourceConfig(str(shards), 3.0), "seldom": SourceConfig(str(shards), 1.0)}
    settings = DataConfig(image=ModalityConfig(sources, ClipConfig(frames=1, size=8)), workers=0)
    built = build_loader(settings, seed=0, batch={"image": 100}, stop_step=10)
    names = [sample.source for item in built for sample in item["image"]]
    assert names.count("often") == 750
    assert built.info["image"]["seldom"]["share"] == 0.25
    assert built.info["image"]["often"]["samples"] == 7


def corrupted(shards: Path, folder: Path, bad: set[int]) -> tuple[Path, set[str]]:
    """A copy in which some videos' bytes are overwritten, sizes kept; and their keys."""
    shutil.copytree(shards, folder)
    opened = Shards(folder, "video")
    rows = [opened.row(i) for i in sorted(bad)]
    for row in rows:
        path = folder / row["shard"]
        path.chmod(0o644)
        with path.open("r+b") as file:
            file.seek(row["offset"])
            file.write(b"\0" * row["size"])
    return folder, {row["key"] for row in rows}


@pytest.mark.parametrize("verify", [True, False])
def test_bad_samples_are_replaced_by_name_the_same_for_any_workers(shards: Path, tmp_path: Path, verify: bool):
    folder, keys = corrupted(shards, tmp_path / "bad", {2, 7})
    settings = dataclasses.replace(config(folder), verify_bytes=verify)
    runs = []
    for workers in (0, 2):
        built = build_loader(
            dataclasses.replace(settings, workers=workers), seed=1, batch={"video": 5, "image": 1}, stop_step=4
        )
        items = list(built)
        rejected = [bad for item in items for samples in item.values() for sample in samples for bad in sample.rejected]
        runs.append((stream(items), rejected))
    assert runs[0] == runs[1]
    samples, rejected = runs[0]
    assert {bad.key for bad in rejected} == keys
    assert len({bad.ordinal for bad in rejected}) == 4  # two bad records, two epochs
    assert all(bad.reason and bad.source == "debug" and bad.modality == "video" for bad in rejected)
    assert not keys & {key for _, key, _ in samples["video"]}
    good = {entry[0]: entry for entry in stream_of(shards, steps=4)}
    unharmed = [entry for entry in samples["video"] if entry[0] not in {bad.ordinal for bad in rejected}]
    assert unharmed == [good[entry[0]] for entry in unharmed]


def stream_of(shards: Path, steps: int) -> list[tuple[int, str, bytes]]:
    built = build_loader(config(shards), seed=1, batch={"video": 5, "image": 1}, stop_step=steps)
    return stream(built)["video"]


def test_too_many_bad_records_in_a_row_stop_the_loader_and_are_named(shards: Path, tmp_path: Path):
    folder, keys = corrupted(shards, tmp_path / "bad", set(range(10)))
    dataset = ClipDataset(config(folder, bad_attempts=3), seed=0)
    with pytest.raises(BadDataError, match="4 records in a row are bad") as caught:
        dataset.sample("video", 0)
    assert any(key in str(caught.value) for key in keys)


def test_more_views_come_from_the_same_frames(shards: Path):
    one = config(shards)
    two = dataclasses.replace(one, video=ModalityConfig(one.video.sources, ClipConfig(frames=4, size=16, views=2)))
    single = ClipDataset(one, seed=0).sample("video", 3)
    double = ClipDataset(two, seed=0).sample("video", 3)
    assert (single.clip == double.clip).all()
    assert (double.extra["timestamps"] == single.extra["timestamps"]).all()
    assert len(double.views) == 2
    assert not (double.views[0] == double.views[1]).all()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"video": 6}, "image has sources but no global batch"),
        ({"video": 5, "image": 6}, "global batch 5 does not divide into 2 ranks"),
        ({"video": 6, "image": 6, "audio": 6}, "audio=6, but data.audio.sources is empty"),
    ],
)
def test_impossible_batches_are_refused_with_the_numbers(shards: Path, batch: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        build_loader(config(shards), seed=0, batch=batch, world=2, rank=0)


def test_a_modality_without_samples_is_refused(tmp_path: Path, shards: Path):
    from data_pipeline.prepare.synthetic import make_debug_shards

    only = make_debug_shards(tmp_path / "only", videos=0, images=2, size=16)
    with pytest.raises(ValueError, match=r"video\.sources\.debug: .*only holds no video samples"):
        build_loader(config(only), seed=0, batch={"video": 1, "image": 1})


def test_too_little_shared_memory_is_refused_with_the_numbers(shards: Path):
    settings = config(shards, workers=64, prefetch=1000)
    with pytest.raises(ValueError, match=r"64 workers x prefetch 1000 x .* MB .*/dev/shm"):
        build_loader(settings, seed=0, batch={"video": 10_000, "image": 10_000})


def test_pixels_without_the_decoder_asked_for_are_an_error_in_one_line(monkeypatch: pytest.MonkeyPatch):
    from data_pipeline.decode import choose_backend

    monkeypatch.setitem(sys.modules, "torchcodec", None)
    choose_backend.cache_clear()
    try:
        assert choose_backend("auto") == "pyav"
        with pytest.raises(ValueError, match=r"decoder=torchcodec does not load .*ffmpeg") as caught:
            choose_backend("torchcodec")
        assert "\n" not in str(caught.value)
    finally:
        choose_backend.cache_clear()


TRAINER = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
from collections.abc import Iterable
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_loader import config
from data_pipeline.loader import Loader, build_loader
import multiprocessing
built = build_loader(config(Path({shards!r}), workers=2), seed=0, batch={{"video": 2, "image": 2}})
for step, item in enumerate(built):
    if step == 1:  # made by the second worker: both have begun
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(0.02)
"""


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_workers_ignore_the_clusters_signals_and_go_with_their_parent(shards: Path, end: signal.Signals):
    code = TRAINER.format(tests=str(Path(__file__).parent), shards=str(shards))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        for worker in workers:
            os.kill(worker, name)
    time.sleep(0.3)
    assert process.poll() is None
    assert all(map(_is_running, workers))
    process.send_signal(end)
    process.communicate(timeout=120)
    deadline = time.monotonic() + 60
    while any(map(_is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_is_running, workers))
