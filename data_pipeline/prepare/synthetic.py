"""Tiny rendered videos and images as shards, for tests and for the debug recipe: nothing to download, seconds to make.

A video shows one shape crossing a textured background; its labels are `direction` (0-7, counter-clockwise from right,
in steps of 45 degrees) and `shape` (0 square, 1 disc). An image shows one shape; its label is `shape`.
"""

import json
import math
import os
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from data_pipeline.prepare.ingest import ingest
from data_pipeline.prepare.options import IngestOptions
from data_pipeline.prepare.writer import claim

_MADE_OF = "debug.json"
"""The arguments a folder was made with."""


def make_debug_shards(
    out: str | Path,
    *,
    videos: int = 24,
    images: int = 24,
    seed: int = 0,
    size: int = 64,
    seconds: float = 2.0,
    fps: int = 16,
) -> Path:
    """Shards of `videos` and `images` rendered samples in the folder `out`; returns the folder.

    Does nothing where `out` already holds shards made with the same arguments. Several processes may call it at once:
    each renders, one wins, all return the same folder.

    Raises ValueError where `out` holds something else.
    """
    out = Path(out)
    arguments = {"videos": videos, "images": images, "seed": seed, "size": size, "seconds": seconds, "fps": fps}
    if videos < 0 or images < 0 or videos + images == 0:
        raise ValueError(f"videos={videos}, images={images}: at least one of them must be positive, none negative")
    if not _is_made(out, arguments):
        scratch = out.with_name(f"{out.name}.debug-{os.getpid()}")
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            _render_all(scratch / "media", arguments)
            ingest([scratch / "media"], scratch / "shards", IngestOptions(copy=True, short_side=max(2, size)))
            (scratch / "shards" / _MADE_OF).write_text(json.dumps(arguments))
            claim(scratch / "shards", out, lambda: _is_made(out, arguments))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return out


def _is_made(out: Path, arguments: dict[str, Any]) -> bool:
    """Whether `out` holds shards made with these arguments; ValueError where it holds something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    made_of = out / _MADE_OF
    held = json.loads(made_of.read_text()) if made_of.is_file() else None
    if held != arguments:
        raise ValueError(f"{out}: holds {held or 'other files'}, not debug shards of {arguments}; give another folder")
    return True


def _render_all(folder: Path, arguments: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    size, fps, seed = arguments["size"], arguments["fps"], arguments["seed"]
    frames = max(1, round(arguments["seconds"] * fps))
    for i in range(arguments["videos"]):
        generator = np.random.default_rng([seed, 0, i])
        shape, direction = i % 2, i // 2 % 8
        angle = math.radians(45 * direction)
        offsets = np.linspace(-0.3, 0.3, frames)[:, None] * [math.cos(angle), -math.sin(angle)]  # [T, 2] as x, y
        path = folder / f"video-{i:05d}.mp4"
        _encode(path, _render(size, shape, offsets + generator.uniform(-0.1, 0.1, 2), generator), fps)
        path.with_suffix(".json").write_text(json.dumps({"direction": direction, "shape": shape}))
    for i in range(arguments["images"]):
        generator = np.random.default_rng([seed, 1, i])
        pixels = _render(size, i % 2, generator.uniform(-0.3, 0.3, (1, 2)), generator)[0]
        path = folder / f"image-{i:05d}.png"
        Image.fromarray(pixels).save(path)
        path.with_suffix(".json").write_text(json.dumps({"shape": i % 2}))


def _render(size: int, shape: int, offsets: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A shape at each offset (x, y from the centre, in frame widths, `[T, 2]`): uint8 `[T, H, W, 3]`."""
    coarse = generator.integers(0, 160, (size // 8 + 1, size // 8 + 1, 3), dtype=np.uint8)
    background = coarse.repeat(8, 0).repeat(8, 1)[:size, :size]
    colour = generator.integers(160, 256, 3, dtype=np.uint8)
    y, x = np.mgrid[:size, :size] / size - 0.5
    dx, dy = x - offsets[:, 0, None, None], y - offsets[:, 1, None, None]  # [T, H, W]
    inside = dx**2 + dy**2 < 0.15**2 if shape else np.maximum(abs(dx), abs(dy)) < 0.13
    return np.where(inside[..., None], colour, background).astype(np.uint8)


def _encode(path: Path, frames: np.ndarray, fps: int) -> None:
    """uint8 `[T, H, W, 3]` to an H.264 MP4; sides are cut to even numbers."""
    height, width = (side // 2 * 2 for side in frames.shape[1:3])
    with av.open(str(path), "w", format="mp4") as container:
        settings = {"crf": "18", "preset": "ultrafast", "tune": "fastdecode"}
        stream = container.add_stream("libx264", rate=Fraction(fps), options=settings)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
