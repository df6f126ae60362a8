"""Which altered copies the perceptual hash finds: `python -m tests.benchmarks.dedup_copies CLIPS`.

CLIPS is a folder of videos that differ; it is ingested, every record of at least a second is altered and encoded in a
dozen ways, and the hashes are compared: copies with their originals, and strangers (every version of one video with
every version of another). Prints a table of the distances, and the nearest strangers.
"""

import argparse
import io
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.stream import VideoStream
from PIL import Image

from data_pipeline.avfile import open_bytes
from data_pipeline.prepare.ingest import ingest
from data_pipeline.prepare.options import IngestOptions
from data_pipeline.prepare.phash import distance, record_hash
from data_pipeline.shards import Shards

LIMITS = (0.1, 0.15, 0.2, 0.25)
Frames = np.ndarray
"""uint8 `[T, H, W, 3]`."""


def resized(frames: Frames, width: int, height: int) -> Frames:
    """All frames at another size, its sides even."""
    size = (max(2, width // 2 * 2), max(2, height // 2 * 2))
    return np.stack([np.asarray(Image.fromarray(frame).resize(size)) for frame in frames])


def cropped(frames: Frames, share: float) -> Frames:
    """Without `share` of the height and width, half of it on each side."""
    top, left = (round(side * share / 2) for side in frames.shape[1:3])
    return frames[:, top : frames.shape[1] - top, left : frames.shape[2] - left]


def with_logo(frames: Frames) -> Frames:
    """A white box of 1.5 % of the picture in the upper right corner."""
    marked, (height, width) = frames.copy(), frames.shape[1:3]
    marked[:, height // 20 : height * 3 // 20, width * 8 // 10 : width * 19 // 20] = 255
    return marked


def with_bars(frames: Frames) -> Frames:
    """Black bars added above and below, 15 % of the height each."""
    bar = frames.shape[1] * 15 // 100
    return np.pad(frames, ((0, 0), (bar, bar), (0, 0), (0, 0)))


def brighter(frames: Frames) -> Frames:
    """Contrast 1.15, and 20 grey levels more."""
    return np.clip(frames * 1.15 + 20, 0, 255).astype(np.uint8)


ALTERED: dict[str, tuple[Callable[[Frames, int], Frames], dict[str, str]]] = {
    "half the size, crf 35": (lambda f, _: resized(f, f.shape[2] // 2, f.shape[1] // 2), {"crf": "35"}),
    "VP9, 150 kbit/s": (lambda f, _: f, {"codec": "libvpx-vp9", "b": "150k", "deadline": "realtime", "cpu-used": "8"}),
    "MPEG-4, quantiser 8": (lambda f, _: f, {"codec": "mpeg4", "qmin": "8", "qmax": "8"}),
    "half the frames": (lambda f, _: f[::2], {"rate": "half"}),
    "square": (lambda f, _: resized(f, 256, 256), {}),
    "brighter": (lambda f, _: brighter(f), {}),
    "5 % cropped": (lambda f, _: cropped(f, 0.05), {}),
    "10 % cropped": (lambda f, _: cropped(f, 0.1), {}),
    "a logo": (lambda f, _: with_logo(f), {}),
    "begins 0.25 s later": (lambda f, fps: f[round(fps / 4) :], {}),
    "begins 1 s later": (lambda f, fps: f[fps:], {}),
    "letterboxed": (lambda f, _: with_bars(f), {}),
    "mirrored": (lambda f, _: f[:, :, ::-1], {}),
}


def encoded(frames: Frames, fps: Fraction, settings: dict[str, str]) -> bytes:
    """The frames as a file."""
    options = {"crf": "28", "preset": "ultrafast"} | settings
    codec, rate = options.pop("codec", "libx264"), options.pop("rate", "")
    height, width = (side // 2 * 2 for side in frames.shape[1:3])
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream(codec, rate=fps / 2 if rate else fps, options=options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for pixels in frames:
            picture = np.ascontiguousarray(pixels[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def versions(data: bytes, fps: float) -> dict[str, tuple[np.ndarray, int]]:
    """The hash of a video and of its altered copies."""
    with open_bytes(data) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    found = {"original": record_hash(data, "video")}
    for name, (alter, settings) in ALTERED.items():
        altered = alter(frames, round(fps))
        if len(altered) >= 2:
            rate = Fraction(fps).limit_denominator(1001)
            found[name] = record_hash(encoded(altered, rate, settings), "video")
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.dedup_copies", description=__doc__)
    parser.add_argument("clips", type=Path, help="folder of videos")
    with tempfile.TemporaryDirectory() as work:
        ingest([parser.parse_args().clips], Path(work, "shards"), IngestOptions(preset="ultrafast"))
        opened = Shards(Path(work, "shards"), "video")
        all_versions = {}
        for data, row in map(opened.read, range(len(opened))):
            if row["duration"] >= 1 and row["key"].endswith("-0000"):
                all_versions[row["key"]] = versions(data, row["fps"])
    names = [(key, how) for key, found in all_versions.items() for how in found]
    hashes = np.array([all_versions[key][how][0] for key, how in names])
    telling = np.array([all_versions[key][how][1] for key, how in names], np.uint8)
    place = {name: i for i, name in enumerate(names)}
    print(f"{len(all_versions)} videos\n\n| copy | median | largest | found at {' / '.join(map(str, LIMITS))} |")
    print("|---|---|---|---|")
    for how in ALTERED:
        right = np.array([place[key, how] for key in all_versions if (key, how) in place])
        left = np.array([place[names[i][0], "original"] for i in right])
        apart = distance(hashes, telling, left, right)
        apart = apart[apart < 1]  # flat ones are not compared
        shares = " / ".join(f"{np.mean(apart <= limit):.0%}" for limit in LIMITS)
        print(f"| {how} | {np.median(apart):.3f} | {apart.max():.3f} | {shares} |")
    strangers(names, hashes, telling)
    return 0


def strangers(names: list[tuple[str, str]], hashes: np.ndarray, telling: np.ndarray) -> None:
    """How near versions of different videos come."""
    left, right = np.triu_indices(len(names), 1)
    keys = np.array([key for key, _ in names])
    apart = distance(hashes, telling, left, right)
    other = keys[left] != keys[right]
    left, right, apart = left[other], right[other], apart[other]
    below = ", ".join(f"{np.sum(apart <= limit)} within {limit}" for limit in LIMITS)
    print(f"\n{len(apart)} pairs of strangers: {below}; the nearest:")
    seen: set[tuple[str, str]] = set()
    for i in np.argsort(apart):
        pair = (names[left[i]][0], names[right[i]][0])
        if pair not in seen:
            seen.add(pair)
            print(f"  {apart[i]:.3f} {' '.join(names[left[i]])} - {' '.join(names[right[i]])}")
        if len(seen) == 6:
            return


if __name__ == "__main__":
    raise SystemExit(main())
