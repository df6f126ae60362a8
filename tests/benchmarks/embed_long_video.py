"""`evals.embed` on half an hour of video: `python -m tests.benchmarks.embed_long_video --clips ../shared/clips`.

A video of `--minutes` is made of the clips, 160 x 120 at 15 frames a second, by ffmpeg. Measured: peak memory beside
that of its first minute; seconds for a minute of video; two SIGKILLs at random moments, then the sha256 of all files
beside those of the run that nobody stopped; how features at one time differ between windows that contain it, and those
of one window between batches.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from data_pipeline.decode import open_decoder
from evals.embed_config import EmbedConfig
from evals.embed_windows import FrameStream, VideoWindows, view_of
from evals.models import load_model


def make_video(clips: Path, out: Path, minutes: float) -> Path:
    """All clips one after the other, again and again, small."""
    files = sorted(path for path in clips.glob("*.mp4") if "corrupt" not in path.name)
    parts = out.parent / "parts"
    parts.mkdir()
    lines = []
    shape = "scale=160:120:force_original_aspect_ratio=decrease,pad=160:120:(ow-iw)/2:(oh-ih)/2,fps=15,setsar=1"
    for i, path in enumerate(files):
        part = parts / f"{i}.mp4"
        command = ["ffmpeg", "-v", "error", "-y", "-i", path, "-t", "20", "-an", "-vf", shape, "-pix_fmt", "yuv420p"]
        if subprocess.run([*command, "-preset", "veryfast", part], check=False).returncode == 0:
            lines.append(f"file '{part}'")
    listing = out.parent / "list.txt"
    listing.write_text("\n".join(lines))
    joined = ["ffmpeg", "-v", "error", "-y", "-stream_loop", "-1", "-f", "concat", "-safe", "0", "-i", listing]
    subprocess.run([*joined, "-t", str(60 * minutes), "-preset", "veryfast", "-g", "60", out], check=True)
    return out


def command(model: str, video: Path, out: Path, *, size: int, pool: str) -> list[str]:
    named = {"--model": model, "--input": video, "--out": out, "--size": size, "--pool": pool, "--fps": 4}
    named |= {"--window": 16, "--overlap": 8, "--device": "cpu"}
    return [sys.executable, "-m", "evals.embed", *(str(part) for pair in named.items() for part in pair)]


def timed(arguments: list[str]) -> tuple[float, float, float]:
    """Seconds on the clock and of the processor, and peak memory in MiB, of a child."""
    begin = time.monotonic()
    child = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    assert status == 0, f"status {status}: {' '.join(arguments)}"
    return time.monotonic() - begin, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def sums(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def killed_twice(arguments: list[str], out: Path, generator: random.Random) -> list[float]:
    """Start, kill, start, kill, start; how much of all rows the journal had noted when each kill came."""
    shares = []
    for low, high in ((0.1, 0.4), (0.45, 0.7)):
        wanted = generator.uniform(low, high)
        child = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while noted_share(out) < wanted and child.poll() is None:
            time.sleep(0.05)
        time.sleep(generator.uniform(0, 0.5))
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, "it had ended before it was killed"
        shares.append(round(noted_share(out), 2))
    timed(arguments)
    return shares


def noted_share(out: Path) -> float:
    """Of all rows, those that the journal vouches for."""
    for path in out.rglob("*.journal"):
        noted = json.loads(path.read_text())
        return noted["rows"] / noted["shape"][0]
    return 0.0


def border_differences(spec: str, video: Path, *, size: int, windows: int = 24) -> list[dict[str, float]]:
    """Relative difference and cosine of the same time's tokens in a window and in the one a step later, by distance.

    The distance of a step is that to the nearer end of either window, counted in tubelets.
    """
    model = load_model(spec)
    config = EmbedConfig(window=16, overlap=16 - model.tubelet_size, size=size)
    decoder = open_decoder(video, "video")
    plan = VideoWindows.of(decoder.info, config, model.tubelet_size, is_image=False)
    stream = FrameStream(decoder, plan.times, view_of(decoder.info, config, model.patch_size))
    length = config.window // plan.tubelet
    found: dict[int, list[tuple[float, float]]] = {}
    before = None
    for start in range(windows):
        clip = stream.take(start * plan.tubelet, start * plan.tubelet + config.window)
        tokens = model.last().tokens(clip[None])[0]
        if before is not None:
            for step in range(1, length):
                a, b = before[step].flatten(0, 1), tokens[step - 1].flatten(0, 1)
                distance = min(step - 1, length - 1 - step)
                relative = ((a - b).norm(dim=1) / a.norm(dim=1)).mean().item()
                cosine = torch.nn.functional.cosine_similarity(a, b).mean().item()
                found.setdefault(distance, []).append((relative, cosine))
        before = tokens
    return [
        {
            "distance": distance,
            "relative": statistics.mean(r for r, _ in each),
            "cosine": statistics.mean(c for _, c in each),
        }
        for distance, each in sorted(found.items())
    ]


def batch_difference(spec: str, video: Path, *, size: int, windows: int = 8) -> float:
    """Largest |difference| of the features of windows that went through alone and together."""
    model = load_model(spec)
    config = EmbedConfig(window=16, overlap=8, size=size, batch=windows)
    decoder = open_decoder(video, "video")
    plan = VideoWindows.of(decoder.info, config, model.tubelet_size, is_image=False)
    stream = FrameStream(decoder, plan.times, view_of(decoder.info, config, model.patch_size))
    clips = torch.stack([stream.take(8 * number, 8 * number + 16) for number in range(windows)])
    source = model.last()
    alone = torch.cat([source.tokens(clip[None]) for clip in clips])
    return (alone - source.tokens(clips)).abs().max().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=Path("../shared/clips"))
    parser.add_argument("--model", default="untrained:vit_debug")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--pool", default="none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip-kills", action="store_true")
    parser.add_argument("--video", type=Path, help="an earlier run's video, in place of making one")
    options = parser.parse_args()
    settings = {"size": options.size, "pool": options.pool}
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        video = options.video or make_video(options.clips, root / "long.mp4", options.minutes)
        short = root / "short.mp4"
        subprocess.run(["ffmpeg", "-v", "error", "-i", video, "-t", "60", "-c", "copy", short], check=True)
        for name, path, minutes in (("short", short, 1.0), ("long", video, options.minutes)):
            clock, processor, memory = timed(command(options.model, path, root / name, **settings))
            row = {"seconds": clock, "processor_seconds_per_minute": processor / minutes, "peak_mib": memory}
            print(json.dumps({"run": name, "minutes": minutes} | {k: round(v, 1) for k, v in row.items()}), flush=True)
        for row in border_differences(options.model, video, size=options.size):
            print(json.dumps({key: round(value, 4) for key, value in row.items()}), flush=True)
        batches = batch_difference(options.model, video, size=options.size)
        print(json.dumps({"alone_and_together": f"{batches:.1e}"}), flush=True)
        if options.skip_kills:
            return 0
        arguments = command(options.model, video, root / "killed", **settings)
        shares = killed_twice(arguments, root / "killed", random.Random(options.seed))
        same = sums(root / "killed") == sums(root / "long")
        print(json.dumps({"killed_at": shares, "is_equal": same}), flush=True)
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
