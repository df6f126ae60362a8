"""What `data.augment_on=device` saves a worker and sends: `python -m tests.benchmarks.augment_on_device SHARDS`.

Every clip is decoded once, then cropped both ways, in turns, with the same randomness; a group of clips is stacked and
copied once more, as it is into shared memory. CPU milliseconds a clip (this process's own), best round of each group;
where there is a GPU, also how long it takes for the copy and the resize.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.clips import random_view_times
from data_pipeline.config import ClipConfig
from data_pipeline.crop_later import CropLater, CropsLater, cut_view
from data_pipeline.decode import frames_at, open_decoder
from data_pipeline.shards import Shards
from data_pipeline.transforms import make_view

GROUP = 12  # clips of a micro-batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="a folder of video shards")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 224, 256, 384])
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shards = Shards(options.shards, "video")
    _frames(shards, 0, ClipConfig())  # imports and first calls
    print("| size | decode ms | crop ms | cut ms | saved ms | of decode + crop | bytes sent | made on the device, ms |")
    print("|---|---|---|---|---|---|---|---|")
    for size in options.sizes:
        groups = range(0, min(options.clips, len(shards)) // GROUP * GROUP, GROUP)
        figures = np.mean([_group(shards, first, ClipConfig(size=size), options.rounds) for first in groups], axis=0)
        decode, crop, cut, sent, made = figures
        print(
            f"| {size} | {decode:.1f} | {crop:.2f} | {cut:.2f} | {crop - cut:.2f} | "
            f"{(crop - cut) / (decode + crop):.1%} | {sent:.0%} | {made:.2f} |"
        )


def _group(shards: Shards, first: int, config: ClipConfig, rounds: int) -> list[float]:
    """Of one group of clips: milliseconds to decode, crop, cut; bytes sent, as a share; milliseconds to make."""
    began = time.process_time()
    clips = [_frames(shards, first + i, config) for i in range(GROUP)]
    decode = (time.process_time() - began) * 1000 / GROUP

    def with_randomness(make: Callable[..., Any]) -> list[Any]:
        return [make(frames, config, np.random.default_rng(first + i)) for i, frames in enumerate(clips)]

    def crop() -> Tensor:
        return torch.stack(with_randomness(make_view)).clone()

    def cut() -> CropsLater:
        later = CropLater.stack(with_randomness(cut_view))
        later.pixels.clone()
        return later

    later = cut()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    took = [[_ms(crop), _ms(cut), _ms(lambda: later.to(device), is_wall=True)] for _ in range(rounds)]
    cropped, cut_ms, made = np.min(took, axis=0)
    return [decode, cropped, cut_ms, later.pixels.numel() / later.shape.numel(), made]


def _frames(shards: Shards, index: int, config: ClipConfig) -> Tensor:
    data, _ = shards.read(index)
    decoder = open_decoder(data, "video")
    times, spans = random_view_times(decoder.info, config.crops(), "shared", np.random.default_rng(index))
    return frames_at(decoder, times)[spans[0]]


def _ms(work: Callable[[], object], *, is_wall: bool = False) -> float:
    """Milliseconds a clip: of this process's CPU, or of the clock until a GPU is done."""
    clock = time.perf_counter if is_wall and torch.cuda.is_available() else time.process_time
    began = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (clock() - began) * 1000 / GROUP


if __name__ == "__main__":
    main()
