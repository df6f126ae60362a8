"""How near the loader comes to the bare decoder, and how far before a decord dataset:
`python -m tests.benchmarks.loader_goals CLIPS`.

CLIPS is a folder of videos; those of 9 to 11 s are taken. Contestants, all for 16 frames at 4 fps, one core a worker:

- bare: torchcodec on bytes that lie in memory, the very clips and times that the loader will ask for; nothing else.
- loader: `build_loader` on the same shards: read, sha256, decode, crop to 256 px, flip, uint8, handed to the training
  process; micro-batches stacked there as a trainer's collate function does.
- decord: a DataLoader over the files themselves, as the reference's dataset does it: VideoReader(num_threads=-1),
  get_batch, float32, random resized crop (bilinear), flip, normalise. Its process is bound to one core, which FFmpeg
  takes for the number of cores.

Worker i is bound to core i; bare runs on core 0. Rounds of all contestants alternate. Per contestant the best round
counts, by the clock and by the workers' CPU time; the latter is what other work on the machine disturbs less.
"""

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportPrivateImportUsage]

from data_pipeline.clips import random_clip_times
from data_pipeline.config import ClipConfig, DataConfig, ModalityConfig, SourceConfig
from data_pipeline.decode import open_decoder
from data_pipeline.loader import build_loader
from data_pipeline.plan import Plan, Source, hash64
from data_pipeline.prepare.ingest import IngestOptions, ingest
from data_pipeline.sample import Sample
from data_pipeline.shards import Shards
from data_pipeline.transforms import random_resized_box
from tests.benchmarks.children import children, cpu_seconds

CLIP = ClipConfig(frames=16, fps=4.0, size=256)
BATCH = 8  # clips of a micro-batch
SETS = {
    "copy": IngestOptions(copy=True),
    "default": IngestOptions(),
    "8 fps, gop 8": IngestOptions(fps=8.0, gop=8),
}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@dataclass(frozen=True)
class Result:
    """Of one contestant in one round."""

    clips_per_second: float
    worker_ms: float
    """CPU of the workers a clip (bare: of this process)."""
    main_ms: float
    """CPU of the training process a clip, which only takes the batches."""


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, help="folder of videos")
    parser.add_argument("--count", type=int, default=96, help="clips of a contestant in a round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        files = chosen(options.clips, Path(work))
        sets = {name: made(files, Path(work, str(i)), SETS[name]) for i, name in enumerate(SETS)}
        contestants: dict[str, Callable[[], Result]] = {}
        for name, folder in sets.items():
            contestants[f"bare, {name}"] = partial(bare, folder, options.count)
            contestants[f"loader, {name}"] = partial(loader, folder, options.count, 1)
        contestants["loader, 8 fps, gop 8, 2 workers"] = partial(loader, sets["8 fps, gop 8"], options.count, 2)
        contestants["decord, the files"] = partial(decord_files, files, options.count)
        print(f"{len(files)} videos, {options.count} clips, {options.rounds} rounds; load {os.getloadavg()[0]:.1f}")
        rounds = [{name: run() for name, run in contestants.items()} for _ in range(options.rounds)]
    report(rounds)
    return 0


def chosen(clips: Path, work: Path) -> list[Path]:
    """The files that are one record of 9 to 11 s and keep their bytes when they are ingested as they are."""
    files = sorted(path for path in clips.iterdir() if path.suffix in (".mp4", ".mkv", ".mov", ".webm"))
    ingest(files, work / "all", SETS["copy"])
    opened = Shards(work / "all", "video")
    rows = [opened.row(i) for i in range(len(opened))]
    held = {row["source_path"]: row for row in rows if 9 <= row["duration"] <= 11}
    return [path for path in files if path.name in held and held[path.name]["size"] == path.stat().st_size]


def made(files: list[Path], folder: Path, options: IngestOptions) -> Path:
    """The files as shards."""
    ingest(files, folder, options)
    return folder


def bare(folder: Path, count: int) -> Result:
    """The decoder alone on the bytes and times of the loader's first `count` samples."""
    opened = Shards(folder, "video")
    plan = Plan(0, [Source("shards", len(opened))])
    records = [opened.read(i)[0] for i in range(len(opened))]
    asked = []
    for ordinal in range(count):
        index = plan.locate(ordinal).index
        info = open_decoder(records[index], "video", backend="torchcodec").info
        times = random_clip_times(info, CLIP.frames, CLIP.fps, np.random.default_rng([0, hash64("video"), ordinal, 0]))
        asked.append((index, np.clip(times, info.begin, np.nextafter(info.end, info.begin)).tolist()))
    with on_core(0):
        began, cpu = time.perf_counter(), time.process_time()
        for index, times in asked:
            decoder = VideoDecoder(records[index], seek_mode="exact", num_ffmpeg_threads=1)
            decoder.get_frames_played_at(times)
        return Result(count / (time.perf_counter() - began), 1000 * (time.process_time() - cpu) / count, 0.0)


def loader(folder: Path, count: int, workers: int) -> Result:
    """The whole way, `workers` processes."""
    source = {"shards": SourceConfig(str(folder))}
    config = DataConfig(video=ModalityConfig(source, CLIP), decoder="torchcodec", workers=workers)
    return timed(iter(build_loader(config, seed=0, batch={"video": BATCH}, collate=stacked)), count)


def stacked(samples: list[Sample]) -> Tensor:
    """uint8 `[B, C, T, H, W]`, as a trainer's collate function stacks them."""
    return torch.stack([sample.clip for sample in samples])


def decord_files(files: list[Path], count: int) -> Result:
    """The reference's way, one worker process."""
    built = DataLoader(DecordFiles(files), batch_size=BATCH, num_workers=1)
    return timed(iter(built), count)


class DecordFiles(Dataset[Tensor]):
    """A file a sample, without end; float32 `[C, T, H, W]`, normalised."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, number: int) -> Tensor:
        import decord

        torch.set_num_threads(1)
        generator = np.random.default_rng(number)
        reader = decord.VideoReader(str(self.files[number % len(self.files)]), num_threads=-1, ctx=decord.cpu(0))
        stride = max(1, int(np.ceil(reader.get_avg_fps()) // CLIP.fps))
        first = int(generator.integers(0, max(1, len(reader) - stride * CLIP.frames + 1)))
        indices = np.minimum(first + stride * np.arange(CLIP.frames), len(reader) - 1)
        frames = reader.get_batch(indices).asnumpy()  # [T, H, W, C]
        clip = torch.from_numpy(frames).float().permute(3, 0, 1, 2)  # [C, T, H, W]
        return normalised(float_crop(clip, generator))


def float_crop(clip: Tensor, generator: np.random.Generator) -> Tensor:
    """The recipe's crop and flip on float frames `[C, T, H, W]`."""
    height, width = clip.shape[-2:]
    scale, aspect = (CLIP.scale_min, CLIP.scale_max), (CLIP.aspect_min, CLIP.aspect_max)
    top, left, high, wide = random_resized_box(height, width, generator, scale=scale, aspect=aspect)
    part = clip[:, :, top : top + high, left : left + wide]
    resized = F.interpolate(part, size=(CLIP.size, CLIP.size), mode="bilinear", align_corners=False)
    return resized.flip(-1) if generator.random() < CLIP.flip else resized


def normalised(clip: Tensor) -> Tensor:
    """In units of ImageNet's statistics."""
    return (clip / 255 - MEAN[:, None, None, None]) / STD[:, None, None, None]


def timed(items: Iterator[Any], count: int) -> Result:
    """Take micro-batches until `count` clips have come after the workers have warmed up; then stop them."""
    next(items)
    workers = children()
    for core, worker in enumerate(workers):
        os.sched_setaffinity(worker, {core % (os.cpu_count() or 1)})
    for _ in range(3 * len(workers)):  # what was begun before they were bound
        next(items)
    before = sum(map(cpu_seconds, workers))
    began, own = time.perf_counter(), time.process_time()
    for _ in range(count // BATCH):
        next(items)
    wall, own = time.perf_counter() - began, time.process_time() - own
    spent = sum(map(cpu_seconds, workers)) - before
    items.close() if hasattr(items, "close") else items._shutdown_workers()  # pyright: ignore
    clips = count // BATCH * BATCH
    return Result(clips / wall, 1000 * spent / clips, 1000 * own / clips)


@contextlib.contextmanager
def on_core(core: int) -> Iterator[None]:
    """This process on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def report(rounds: list[dict[str, Result]]) -> None:
    """The tables: every contestant, and the ratios that are the goals."""
    fastest = {name: max(each[name].clips_per_second for each in rounds) for name in rounds[0]}
    cheapest = {name: min(each[name].worker_ms for each in rounds) for name in rounds[0]}
    print("\n| | clips/s | ms of CPU a clip | in the training process |\n|---|---|---|---|")
    for name in rounds[0]:
        main_ms = min(each[name].main_ms for each in rounds)
        print(f"| {name} | {fastest[name]:.1f} | {cheapest[name]:.1f} | {main_ms:.2f} |")
    print("\n| ratio | by the clock | by CPU |\n|---|---|---|")
    pairs = [(f"loader, {name}", f"bare, {name}") for name in SETS]
    pairs += [(f"loader, {name}", "decord, the files") for name in SETS]
    for one, other in pairs:
        clock, cpu = fastest[one] / fastest[other], cheapest[other] / cheapest[one]
        print(f"| {one} : {other} | {clock:.2f} | {cpu:.2f} |")


if __name__ == "__main__":
    raise SystemExit(main())
