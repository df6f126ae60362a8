"""`python -m data_pipeline.loader digest`: what one rank would be given, one JSON object per step on stdout.

Used to show that the stream is the same for any world size, number of workers and starting step.
"""

import argparse
import hashlib
import json
import sys
from typing import Any

from data_pipeline.config import BACKENDS, ClipConfig, DataConfig, ModalityConfig, SourceConfig
from data_pipeline.loader import build_loader
from data_pipeline.sample import Sample
from data_pipeline.sources import source_modalities


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        _digest(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _digest(options: argparse.Namespace) -> None:
    held = source_modalities(options.shards)
    if not held:
        raise ValueError(f"{options.shards}: the manifest lists no shards; ingest something")
    modality = options.modality or held[0]
    if modality not in held:
        raise ValueError(f"--modality {modality}: {options.shards} holds only {', '.join(held)}")
    loader = build_loader(
        _config(options, modality),
        seed=options.seed,
        batch={modality: options.batch},
        world=options.world,
        rank=options.rank,
        start_step=options.start,
        stop_step=options.start + options.steps,
    )
    for step, item in enumerate(loader, start=options.start):
        samples = item[modality]
        print(json.dumps({"step": step, "epoch": loader.epoch_of(modality, step)} | _row(samples)), flush=True)
        for bad in (bad for sample in samples for bad in sample.rejected):
            print(f"replaced {bad.source}/{bad.key} at ordinal {bad.ordinal}: {bad.reason}", file=sys.stderr)


def _config(options: argparse.Namespace, modality: str) -> DataConfig:
    frames = options.frames if modality == "video" else 1
    clip = ClipConfig(frames=frames, fps=options.fps, size=options.size)
    part = ModalityConfig(sources={"shards": SourceConfig(path=options.shards)}, clip=clip)
    common = {"decoder": options.decoder, "workers": options.workers}
    return DataConfig(video=part, **common) if modality == "video" else DataConfig(image=part, **common)


def _row(samples: list[Sample]) -> dict[str, Any]:
    digests = [hashlib.sha256(sample.clip.numpy().tobytes()).hexdigest() for sample in samples]
    return {
        "ordinals": [sample.ordinal for sample in samples],
        "keys": [sample.key for sample in samples],
        "sha256": digests,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.loader", description=__doc__)
    digest = parser.add_subparsers(required=True, metavar="digest").add_parser("digest", help="print the samples' sums")
    digest.add_argument("shards", help="shard folder or address, folder of media files, or list of their paths")
    digest.add_argument("--seed", type=int, default=0)
    digest.add_argument("--batch", type=int, required=True, help="GLOBAL batch size")
    digest.add_argument("--world", type=int, default=1)
    digest.add_argument("--rank", type=int, default=0)
    digest.add_argument("--workers", type=int, default=0)
    digest.add_argument("--start", type=int, default=0, help="first step")
    digest.add_argument("--steps", type=int, default=1)
    digest.add_argument("--frames", type=int, default=16)
    digest.add_argument("--fps", type=float, default=4.0)
    digest.add_argument("--size", type=int, default=112)
    digest.add_argument("--modality", choices=("video", "image"), help="default: video where the shards hold any")
    digest.add_argument("--decoder", choices=BACKENDS, default="auto")
    return parser
