"""Features of long videos and of folders of videos and images, by sliding windows; killed, it goes on.

    python -m evals.embed --model runs/demo/primary/exports/primary --input VIDEO_OR_FOLDER [...] --out DIR

Memory holds the frames and tokens of one batch of windows, whatever the length. See `embed_folder` for what is
written and `embed_windows` for how overlaps are settled. Status 1 where files failed, 2 for a wrong command.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from data_pipeline.decode import Decoder, open_decoder
from evals.cache import file_digest
from evals.dense_features import LevelFeatures
from evals.embed_config import Dtype, EmbedConfig, Fit, Format, Pool, embedding_key, make_config, model_sha256
from evals.embed_folder import Embedding, EmbedFolder, read_embedding
from evals.embed_progress import EmbedProgress
from evals.embed_rows import (
    FULL,
    RowWriter,
    journal_of,
    need_pyarrow,
    partial,
    said_of_full,
    settle,
    write_parquet,
    write_times,
    write_whole,
)
from evals.embed_windows import FrameStream, VideoWindows, view_of
from evals.features import FeatureSource
from evals.media import is_image, list_media
from evals.models import EncoderModel, ForeignModel, load_model
from vjepa.batch import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["Embedder", "Embedding", "embed", "main", "read_embedding"]
PREPROCESSING = {
    "crop": "short side to size, centred square",
    "whole": "short side to size, long side to the nearest whole patches",
    "stretch": "the whole frame made square",
}


@dataclass
class Embedder:
    """A model and settings, with the folder that they fill."""

    model: EncoderModel | ForeignModel
    config: EmbedConfig
    folder: EmbedFolder
    say: Callable[[str, int, int], None] = field(default=lambda name, done, frames: None)
    """Told the file, and how many of its sampled frames are done, of how many."""

    @property
    def source(self) -> FeatureSource:
        if self.config.level is None:
            return self.model.last()
        if isinstance(self.model, ForeignModel):
            raise ValueError(f"level={self.config.level} is a block of our encoders; of transformers' the last is read")
        return LevelFeatures(self.model.name, self.model.encoder, (self.config.level,))

    @cached_property
    def _model_sha256(self) -> str:
        return model_sha256(self.model)

    @property
    def _normalisation(self) -> dict[str, Any]:
        """Mean and standard deviation of channels in 0..1."""
        if isinstance(self.model, ForeignModel):
            return asdict(self.model.source.normalisation)
        return {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}

    def is_finished(self, name: str, path: Path) -> bool:
        """Whether the features of this very file are there. It is read again only where it is newer than they are."""
        facts, sidecar = self.folder.facts(name), self.folder.facts_path(name)
        if facts is None or facts["bytes"] != path.stat().st_size:
            return False
        return path.stat().st_mtime <= sidecar.stat().st_mtime or file_digest(path) == facts["sha256"]

    def embed(self, name: str, path: Path) -> None:
        """Write all of a file's rows, from where an earlier run was stopped; DecodeError for damaged bytes."""
        self.folder.facts_path(name).unlink(missing_ok=True)
        self.folder.facts_path(name).parent.mkdir(parents=True, exist_ok=True)
        still = is_image(path)
        content = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        decoder = open_decoder(path, "image" if still else "video")
        windows = VideoWindows.of(decoder.info, self.config, self.model.tubelet_size, is_image=still)
        shape = self._write_rows(name, decoder, windows, content)
        self._finish(name, windows)
        height, width = self.config.picture_size(decoder.info.height, decoder.info.width, self.model.patch_size)
        pixels = {"size": [height, width], "fit": PREPROCESSING[self.config.fit], "normalisation": self._normalisation}
        facts = {"name": name, "path": str(path), **content, "source": asdict(decoder.info), "preprocessing": pixels}
        facts |= {"sampled": len(windows.times), "windows": windows.num_windows, "shape": shape, "dim": shape[-1]}
        grid = [height // self.model.patch_size, width // self.model.patch_size]
        facts |= {"grid": [windows.plan.length, *grid], "model_sha256": self._model_sha256}
        write_whole(self.folder.facts_path(name), json.dumps(facts, indent=1).encode())
        journal_of(self.folder.features(name, "npy")).unlink(missing_ok=True)

    def _write_rows(self, name: str, decoder: Decoder, windows: VideoWindows, facts: dict[str, Any]) -> list[int]:
        stream = FrameStream(decoder, windows.times, view_of(decoder.info, self.config, self.model.patch_size))
        source, path = self.source, self.folder.features(name, "npy")
        writer: RowWriter | None = None
        try:
            row = self._noted_row(path, facts)
            first = 0
            if row is not None:
                writer = self._writer(path, windows, row, facts)
                first = writer.batches
            self.say(name, windows.frames_done(first), len(windows.times))
            for done, rows in windows.batches(stream, source, first):
                writer = writer or self._writer(path, windows, rows, facts)
                writer.add(rows)
                self.say(name, done, len(windows.times))
            assert writer is not None
            writer.finish()
            return list(writer.shape)
        finally:
            if writer is not None:
                writer.close()

    def _noted_row(self, path: Path, facts: dict[str, Any]) -> np.ndarray | None:
        """No rows, of the shape that a stopped run of the same input has noted."""
        try:
            noted = json.loads(journal_of(path).read_text())
        except (FileNotFoundError, ValueError):
            return None
        if noted["facts"] != facts:
            return None
        return np.empty((0, *noted["shape"][1:]), {"fp32": np.float32, "fp16": np.float16}[self.config.dtype])

    def _writer(self, path: Path, windows: VideoWindows, rows: np.ndarray, facts: dict[str, Any]) -> RowWriter:
        return RowWriter(path, (len(windows.row_times), *rows.shape[1:]), rows.dtype, facts)

    def _finish(self, name: str, windows: VideoWindows) -> None:
        """Rows that are all there under their name, in their format. May be stopped and done again at any point."""
        path, times = self.folder.features(name, "npy"), windows.row_times
        if self.config.format == "parquet":
            write_parquet(partial(path), times, self.folder.features(name, "parquet"))
            partial(path).unlink()
        else:
            write_times(self.folder.times_path(name), times)
            settle(partial(path), path)


def embed(embedder: Embedder, files: dict[str, Path], progress: EmbedProgress | None = None) -> list[dict[str, str]]:
    """Features of all files by their names; what failed, with reasons. Those that are finished are left as they are."""
    failures: list[dict[str, str]] = []
    folder = embedder.folder
    for number, (name, path) in enumerate(files.items()):
        if progress is not None:
            progress.begin(number, name)
        try:
            if not embedder.is_finished(name, path):
                embedder.embed(name, path)
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise next(said_of_full(error, folder.features(name, embedder.config.format))) from error
            if isinstance(error, ValueError):  # the file's fault; a disk or network may be better the next time
                folder.clear(name)
            failures.append({"name": name, "path": str(path), "reason": str(error)})
            folder.write_failures(failures)
            if progress is not None:
                progress.message(f"failed: {path}: {error}")
    folder.write_failures(failures)
    folder.write_manifest(list(files), failures)
    return failures


def name_files(inputs: Sequence[Path]) -> dict[str, Path]:
    """Every video and image of the inputs by its name in the output: its path below the folder that was given."""
    found: dict[str, Path] = {}
    for given in inputs:
        if not given.exists():
            raise ValueError(f"--input {given}: no such file or folder")
        files = list_media(given) if given.is_dir() else [given]
        if not files:
            raise ValueError(f"--input {given}: no videos or images below it, by their endings")
        for path in files:
            name = path.relative_to(given).as_posix() if given.is_dir() else path.name
            if name in found and found[name].resolve() != path.resolve():
                raise ValueError(f"--input: {found[name]} and {path} would both be {name}; give them different --out")
            found[name] = path
    return found


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evals.embed", description=(__doc__ or "").splitlines()[0])
    kinds = "folder of an exported encoder, a released .pt, hf:FOLDER of transformers or untrained:SIZE"
    parser.add_argument("--model", required=True, help=kinds)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="videos, images, folders of them")
    parser.add_argument("--out", type=Path, required=True, help="folder to fill, or to go on filling")
    parser.add_argument("--window", type=int, help="frames the encoder sees at once (default: as trained, else 16)")
    parser.add_argument("--overlap", type=int, help="frames that neighbours share (default: half a window)")
    parser.add_argument("--fps", type=float, help="frames sampled a second (default: as trained, else 4)")
    parser.add_argument("--size", type=int, help="pixels of the short side (default: as trained, else 256)")
    parser.add_argument("--fit", choices=get_args(Fit), help=f"{PREPROCESSING} (default: crop)")
    parser.add_argument("--pool", choices=get_args(Pool), help="mean of a time step or of a window (default: none)")
    parser.add_argument("--format", choices=get_args(Format), help="default: npy")
    parser.add_argument("--dtype", choices=get_args(Dtype), help="of what is stored (default: fp32)")
    parser.add_argument("--level", type=int, help="0-based block to keep, one with a level norm (default: the last)")
    parser.add_argument("--batch", type=int, help="windows in one pass (default: 4)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if any"
    )
    return parser


def run(options: argparse.Namespace) -> int:
    files, folder = name_files(options.input), EmbedFolder(options.out)
    asked = {name: getattr(options, name) for name in EmbedConfig.__dataclass_fields__}
    model = load_model(options.model, device=options.device)
    config = make_config(model, options.model, **asked)
    if config.format == "parquet":
        need_pyarrow()
    with folder.locked():
        folder.claim(embedding_key(model, config, options.device))
        with EmbedProgress(len(files)) as progress:
            failures = embed(Embedder(model, config, folder, say=progress.update), files, progress)
    print(f"{len(files) - len(failures)} of {len(files)} files are in {options.out}; {len(failures)} failed")
    return 1 if failures else 0


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        return run(build_parser().parse_args(arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
