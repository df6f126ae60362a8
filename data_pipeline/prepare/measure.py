"""Clips per second and core of a shard folder: `python -m data_pipeline.prepare.measure SHARDS`."""

import argparse
import time

import numpy as np

from data_pipeline.config import ClipConfig, DataConfig, ModalityConfig, SourceConfig
from data_pipeline.dataset import ClipDataset


def measure(shards: str, *, modality: str, clip: ClipConfig, decoder: str, clips: int) -> dict[str, float]:
    """Load `clips` samples in this process, on one core; CPU milliseconds a clip and clips per CPU second."""
    part = ModalityConfig(sources={"shards": SourceConfig(path=shards)}, clip=clip)
    config = DataConfig(**{modality: part, "decoder": decoder, "workers": 0})
    dataset = ClipDataset(config, seed=0)
    for ordinal in range(3):  # imports, page cache
        dataset.sample(modality, ordinal)
    spent = []
    for ordinal in range(clips):
        start = time.process_time()
        dataset.sample(modality, ordinal)
        spent.append(time.process_time() - start)
    mean = float(np.mean(spent))
    return {"ms": 1000 * mean, "median_ms": 1000 * float(np.median(spent)), "clips_per_second": 1 / mean}


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.prepare.measure", description=__doc__)
    parser.add_argument("shards")
    parser.add_argument("--modality", choices=("video", "image"), default="video")
    parser.add_argument("--decoder", choices=("auto", "torchcodec", "pyav"), default="auto")
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--fps", type=float, default=4.0)
    parser.add_argument("--size", type=int, default=256)
    options = parser.parse_args()
    clip = ClipConfig(frames=1 if options.modality == "image" else options.frames, fps=options.fps, size=options.size)
    found = measure(options.shards, modality=options.modality, clip=clip, decoder=options.decoder, clips=options.clips)
    print(
        f"{found['ms']:.1f} ms of CPU a clip (median {found['median_ms']:.1f}), {found['clips_per_second']:.1f} clips/s"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
