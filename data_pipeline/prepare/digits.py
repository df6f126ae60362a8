"""A labelled set made on this machine: one handwritten digit moves, one stands still.

`python -m data_pipeline.prepare.digits OUT` writes OUT/train (no labels), OUT/probe_train and OUT/test (labelled), each
a shard folder, OUT/digits.json (what was made) and OUT/contact_sheet.png. The three splits share no glyph.

The videos are lossless RGB H.264, every frame a key frame: what is decoded is what was drawn, noise included. Lossy
4:2:0 costs the linear probes little (README, "Labelled digits") but changes pixels by up to 120 of 255.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from data_pipeline.prepare.digits_labels import scene_labels
from data_pipeline.prepare.digits_scene import DIRECTIONS, SPLITS, DigitsConfig, SplitPlan, draw, load_glyphs
from data_pipeline.prepare.digits_sheet import write_sheet
from data_pipeline.prepare.options import IngestOptions
from data_pipeline.prepare.writer import SeriesWriter, claim, write_manifest
from data_pipeline.shards import MANIFEST, Shards, unpack_masks

MADE_OF = "digits.json"
SHEET = "contact_sheet.png"
_FORMAT = 1  # counted up when the same configuration gives other bytes
_CODEC = {"crf": "0", "preset": "ultrafast", "g": "1"}  # CAVLC: decodes in a third of CABAC's time, for 30 % more bytes
_CHUNK = 64  # clips encoded at a time


def make_digits(out: str | Path, config: DigitsConfig | None = None) -> Path:
    """The labelled digits in the folder `out`; returns the folder.

    Does nothing where `out` holds the same set already. Nothing is left at `out` when it fails, and several processes
    may call it at once.

    Raises ValueError where `out` holds something else, ImportError without scikit-learn.
    """
    out, config = Path(out), config or DigitsConfig()
    if _is_made(out, config):
        return out
    glyphs = load_glyphs()
    plans = {split: SplitPlan(config, split, glyphs) for split in SPLITS}
    partial = out.with_name(f"{out.name}.digits-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for split, plan in plans.items():
            _write_split(partial / split, plan)
        write_sheet(partial / SHEET, [partial / split for split in SPLITS])
        contents = {split: _contents(partial / split, plan) for split, plan in plans.items()}
        (partial / MADE_OF).write_text(json.dumps(_made_of(config) | {"splits": contents}) + "\n")
        claim(partial, out, lambda: _is_made(out, config))
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _made_of(config: DigitsConfig) -> dict[str, Any]:
    return {"format": _FORMAT, "config": dataclasses.asdict(config)}


def _is_made(out: Path, config: DigitsConfig) -> bool:
    """Whether `out` holds this very set, whole; ValueError where it holds something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    made_of = out / MADE_OF
    held = json.loads(made_of.read_text()) if made_of.is_file() else {}
    if {name: held.get(name) for name in _made_of(config)} != _made_of(config):
        what = f"digits of {held['config']}" if "config" in held else "other files"
        raise ValueError(f"{out}: holds {what}, not digits of {dataclasses.asdict(config)}; give another folder")
    for split in SPLITS:
        manifest = out / split / MANIFEST
        if not manifest.is_file() or _sha256(manifest) != held["splits"][split]["manifest_sha256"]:
            raise ValueError(f"{manifest}: missing, or not the one that was made; remove {out} to make it again")
    return True


def _write_split(folder: Path, plan: SplitPlan) -> None:
    """One shard folder."""
    folder.mkdir(parents=True)
    limits = IngestOptions()
    series = SeriesWriter(folder, "video", shard_bytes=limits.shard_bytes, shard_count=limits.shard_count)
    try:
        for index, (data, meta) in enumerate(_clips(plan)):
            series.write(f"{plan.split}-{index:06d}", "mp4", data, meta)
        series.close()
    finally:
        series.abandon()
    write_manifest(folder, series.entries, notes=[])


def _clips(plan: SplitPlan) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The media and the metadata of every clip, in order."""
    for start in range(0, len(plan), _CHUNK):
        frames, metas = [], []
        for index in range(start, min(start + _CHUNK, len(plan))):
            scene, generator = plan.scene(index)
            pixels, masks = draw(scene, plan.ink, plan.config, generator)
            frames.append(pixels)
            labels = {"labels": scene_labels(scene, masks)} if plan.is_labelled else {}
            metas.append(_facts(plan.config) | labels)
        yield from zip(encode(np.stack(frames), plan.config.fps), metas, strict=True)


def _facts(config: DigitsConfig) -> dict[str, Any]:
    return {
        "source_path": "scikit-learn/digits",
        "start": 0.0,
        "frames": config.frames,
        "fps": config.fps,
        "duration": config.frames / config.fps,
        "width": config.size,
        "height": config.size,
        "codec": "h264",
    }


def encode(clips: np.ndarray, fps: float) -> Iterator[bytes]:
    """RGB clips, uint8 `[N, T, H, W, 3]`, each as an H.264 MP4 that decodes to the same values.

    x264 takes 3 ms to open and 1 ms for a clip: all N are encoded as one video and cut apart, packet by packet, which
    is sound because every frame is a key frame.
    """
    together = io.BytesIO()
    with av.open(together, "w", format="mp4") as container:
        stream = container.add_stream("libx264rgb", rate=Fraction(fps).limit_denominator(1001), options=_CODEC)
        stream.height, stream.width = clips.shape[2:4]
        stream.pix_fmt = "rgb24"
        stream.codec_context.thread_count = 1
        for pixels in clips.reshape(-1, *clips.shape[2:]):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    together.seek(0)
    with av.open(together, "r", format="mp4") as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        assert len(packets) == clips.shape[0] * clips.shape[1]
        assert all(packet.is_keyframe for packet in packets)
        for start in range(0, len(packets), clips.shape[1]):
            yield _muxed(packets[start : start + clips.shape[1]], stream)


def _muxed(packets: list[av.Packet], template: av.VideoStream) -> bytes:
    """The packets as a file of their own, which begins at 0."""
    buffer = io.BytesIO()
    first = packets[0].pts or 0
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream_from_template(template)
        for packet in packets:
            packet.pts = packet.dts = (packet.pts or 0) - first
            packet.stream = stream
            container.mux(packet)
    return buffer.getvalue()


def _contents(folder: Path, plan: SplitPlan) -> dict[str, Any]:
    """What a split holds, for people and for `_is_made`."""
    shards = Shards(folder, "video")
    found: dict[str, Any] = {
        "clips": len(shards),
        "bytes": shards.total_bytes,
        "manifest_sha256": _sha256(folder / MANIFEST),
        "labelled": plan.is_labelled,
        "directions": dict(zip(DIRECTIONS, np.bincount(plan.directions, minlength=4).tolist(), strict=True)),
        "moving_digits": np.bincount(plan.moving_digits, minlength=10).tolist(),
        "static_digits": np.bincount(plan.static_digits, minlength=10).tolist(),
    }
    if plan.is_labelled:
        masks = [unpack_masks(shards.row(index)["labels"]["masks"]) for index in range(len(shards))]
        shares = np.bincount(np.concatenate(masks, axis=None), minlength=3) / sum(mask.size for mask in masks)
        found["pixel_shares"] = dict(zip(("background", "static", "moving"), shares.round(5).tolist(), strict=True))
    shards.close()
    return found | {"glyphs": plan.glyphs.tolist()}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parsed: dict[str, Any] = vars(_parser().parse_args(arguments))
    out = Path(parsed.pop("out"))
    try:
        make_digits(out, DigitsConfig(**parsed))
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    splits = json.loads((out / MADE_OF).read_text())["splits"]
    lines = [
        f"  {name}: {held['clips']} clips, {held['bytes'] / 1e6:.1f} MB, {len(held['glyphs'])} glyphs, "
        f"{'labelled' if held['labelled'] else 'no labels'}"
        for name, held in splits.items()
    ]
    print("\n".join([f"{out}: labelled digits; see {MADE_OF} and {SHEET}", *lines]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.prepare.digits",
        description="A labelled set of small videos: one handwritten digit moves, one stands still.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("out", metavar="OUT", help="folder to write; left alone where it holds the same set already")
    for field in dataclasses.fields(DigitsConfig):
        flag, kind = f"--{field.name.replace('_', '-')}", type(field.default)
        parser.add_argument(flag, type=kind, default=field.default, help="see DigitsConfig")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
