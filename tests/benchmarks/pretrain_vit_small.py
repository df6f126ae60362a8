"""A ViT-S trained from nothing on the unlabelled frames at hand, and what its features are worth.

    python -m tests.benchmarks.pretrain_vit_small --out DIR [--shared DIR] [--only camvid rgbd davis2016]
                                                  [--recipe vit_small | vit_small_cpu] [--compact] [key=value]

Makes shards in DIR/shards (videos of shared/clips; CamVid's training and validation frames; RGB-D frames of the
training split; no frame that is tested on, none of DAVIS), trains a recipe on them in DIR/run (vit_small where there
is a GPU, else vit_small_cpu; key=value are its settings, such as train.steps=500), and measures in DIR/evals what was
exported, the same encoder untrained and the pixels. --compact makes shards of 30 MB in place of 74, at 8 frames a
second, to be carried to another machine. Stopped, the same command goes on. evals/README.md quotes the tables.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import av
import torch
from PIL import Image

from data_pipeline.prepare.ingest import ingest
from data_pipeline.prepare.options import IngestOptions
from evals import run as evaluation

SHARED = Path(__file__).parents[3] / "shared"
SUITE = ("camvid", "rgbd", "davis2016")
RECIPES = ("vit_small", "vit_small_cpu")
LEFT_OUT = {
    "co-tracker__bear.mp4": "a sequence of DAVIS",
    "co-tracker__paragliding.mp4": "a sequence of DAVIS",
    "Megatron-Energon__sync_test.mp4": "a test pattern",
    "decord__corrupted.mp4": "damaged",
    "decord__unordered.mov": "four frames",
    "decord__video_90.mov": "three frames",
}
RGBD_TRAIN_END = 600  # frame numbers below it are the training split of evals/recipes/depth/rgbd.yaml
MIXTURE = {  # shares of the samples: clips, camvid, rgbd
    "video": (0.7, 0.2, 0.1),
    "image": (0.4, 0.4, 0.2),
}
TRACKING = ("davis2016.preset=dino", "davis2016.propagation.neighbourhood=circle", "davis2016.data.skip_missing=true")


FULL = IngestOptions(max_seconds=4.0, short_side=360, fps=15.0, gop=8)
COMPACT = IngestOptions(max_seconds=4.0, short_side=288, fps=8.0, gop=4, crf=28, jpeg_quality=82)


def make_shards(shared: Path, out: Path, *, jobs: int = 2, compact: bool = False) -> None:
    """Three shard folders in `out`, each with videos and images: clips, camvid and rgbd."""
    frames = replace(COMPACT if compact else FULL, jobs=jobs)
    clips = [path for path in sorted((shared / "clips").glob("*.*")) if path.suffix != ".json"]
    clips = [path for path in clips if path.name not in LEFT_OUT]
    seen = {"short_side": 256, "stills": 8} if compact else {"short_side": 288, "stills": 12}
    _ingest(clips, out / "clips", replace(frames, **seen))
    camvid, rgbd = shared / "data" / "camvid" / "images", rgbd_frames(shared)
    with tempfile.TemporaryDirectory() as scratch:
        film = _film(sorted((camvid / "val").glob("*.jpg")), Path(scratch) / "camvid_val.mp4", fps=15)
        _ingest([camvid / "train", camvid / "val", film], out / "camvid", frames)
        film = _film(rgbd, Path(scratch) / "rgbd_train.mp4", fps=4)  # every 8th frame of 30 a second
        _ingest([*rgbd, film], out / "rgbd", frames)


def rgbd_frames(shared: Path) -> list[Path]:
    """The colour frames of the training split."""
    frames = sorted((shared / "data" / "rgbd_7scenes" / "frames").glob("frame-*.color.jpg"))
    return [path for path in frames if int(path.name[6:12]) < RGBD_TRAIN_END]


def _film(pictures: Sequence[Path], out: Path, *, fps: int) -> Path:
    """Pictures of one size, in order, as a video that is hardly compressed."""
    images = [Image.open(path).convert("RGB") for path in pictures]
    with av.open(out, "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12"})
        stream.width, stream.height = images[0].size
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return out


def _ingest(inputs: Sequence[Path], out: Path, options: IngestOptions) -> None:
    print(ingest(inputs, out, options), flush=True)


def training_arguments(out: Path, recipe: str, overrides: Sequence[str]) -> list[str]:
    """What `launch.train` is asked for; a run that was begun goes on."""
    sources = [
        f"data.{modality}.sources.{name}.{setting}"
        for modality, shares in MIXTURE.items()
        for name, share in zip(("clips", "camvid", "rgbd"), shares, strict=True)
        for setting in (f"path={out / 'shards' / name}", f"weight={share}")
    ]
    rates = ["data.video.sources.rgbd.clip.fps=4.0"]
    resume = ["--resume"] if (out / "run" / "config.yaml").is_file() else []
    return ["--recipe", recipe, *resume, f"run_dir={out / 'run'}", *sources, *rates, *overrides]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.pretrain_vit_small", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for shards, the run and the results")
    parser.add_argument("--shared", type=Path, default=SHARED, help="with clips/ and data/ (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=SUITE, default=SUITE, help="which sets are measured on")
    parser.add_argument("--recipe", choices=RECIPES, default=RECIPES[0] if torch.cuda.is_available() else RECIPES[1])
    parser.add_argument("--compact", action="store_true", help="shards of 30 MB in place of 74")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings in place of the recipe's")
    options = parser.parse_intermixed_args(arguments)
    make_shards(options.shared, options.out / "shards", compact=options.compact)
    run = options.out / "run"
    if not (run / "summary.json").is_file():
        command = [
            sys.executable,
            "-m",
            "launch.train",
            *training_arguments(options.out, options.recipe, options.overrides),
        ]
        if status := subprocess.run(command, check=False).returncode:
            return status
    model = ["--model", str(run / "exports" / "primary"), "--suite", ",".join(options.only), "--report"]
    settings = [f"data.root={options.shared / 'data'}", *(TRACKING if "davis2016" in options.only else ())]
    return evaluation.main([*model, "--out", str(options.out / "evals"), *settings])


if __name__ == "__main__":
    sys.exit(main())
