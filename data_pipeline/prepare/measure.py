"""Clips per second and core of a shard folder: `python -m data_pipeline.prepare.measure SHARDS`."""

import argparse
import time

import numpy as np
import torch

from data_pipeline.config import BACKENDS, ClipConfig, DataConfig, ModalityConfig, SourceConfig
from data_pipeline.dataset import ClipDataset
from data_pipeline.isolated import cpu_seconds

_WARM = 3  # clips loaded before the clock starts: imports, page cache


def measure(
    shards: str, *, modality: str, clip: ClipConfig, decoder: str, clips: int, first: int = 0, isolated: bool = False
) -> dict[str, float]:
    """Load `clips` samples from ordinal `first`, here and in its decoder's process; CPU and wall ms a clip."""
    torch.set_num_threads(1)  # as in the loader's workers
    part = ModalityConfig(sources={"shards": SourceConfig(path=shards)}, clip=clip)
    config = DataConfig(**{modality: part, "decoder": decoder, "decode_isolated": isolated, "workers": 0})
    dataset = ClipDataset(config, seed=0)
    for ordinal in range(_WARM):
        dataset.sample(modality, ordinal)
    spent, began = [], time.monotonic()
    for ordinal in range(first, first + clips):
        start = time.process_time() + cpu_seconds()
        dataset.sample(modality, ordinal)
        spent.append(time.process_time() + cpu_seconds() - start)
    mean = float(np.mean(spent))
    return {
        "ms": 1000 * mean,
        "median_ms": 1000 * float(np.median(spent)),
        "clips_per_second": 1 / mean,
        "wall_ms": 1000 * (time.monotonic() - began) / clips,
    }


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.prepare.measure", description=__doc__)
    parser.add_argument("shards")
    parser.add_argument("--modality", choices=("video", "image"), default="video")
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--isolated", action="store_true", help="decode in a process of its own")
    add_clip(parser)
    options = parser.parse_args()
    clip = clip_of(options, options.modality)
    found = measure(
        options.shards,
        modality=options.modality,
        clip=clip,
        decoder=options.decoder,
        clips=options.clips,
        isolated=options.isolated,
    )
    print(
        f"{found['ms']:.1f} ms of CPU a clip (median {found['median_ms']:.1f}), {found['clips_per_second']:.1f} clips/s"
    )
    return 0


def add_clip(parser: argparse.ArgumentParser) -> None:
    """`--decoder`, `--frames`, `--fps` and `--size`: what is loaded."""
    parser.add_argument("--decoder", choices=BACKENDS, default="auto")
    parser.add_argument("--frames", type=int, default=16, help="frames of a clip")
    parser.add_argument("--fps", type=float, default=4.0, help="frames per second of a clip")
    parser.add_argument("--size", type=int, default=256, help="height and width of a clip")


def clip_of(options: argparse.Namespace, modality: str) -> ClipConfig:
    """The clip that these arguments describe; an image has one frame."""
    return ClipConfig(frames=1 if modality == "image" else options.frames, fps=options.fps, size=options.size)


if __name__ == "__main__":
    raise SystemExit(main())
