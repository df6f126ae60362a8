"""Opens what evaluations read: a video, an image, or a folder that holds a video's frames as images."""

from __future__ import annotations

import mimetypes
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipeline.decode import DecodeError, Decoder, MediaInfo, frames_at, open_decoder
from evals.cache import file_digest

FOLDER_FPS = 12.0  # of frames in a folder, which do not say: those of Jester
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv")


def open_media(path: Path) -> Decoder:
    """A decoder for a file or a folder of frames; DecodeError for bytes that are damaged, OSError for no file."""
    if path.is_dir():
        return FrameFolder.open(path)
    return open_decoder(path.read_bytes(), "image" if is_image(path) else "video")


def is_image(path: Path) -> bool:
    return (mimetypes.guess_type(path.name)[0] or "").startswith("image/")


def content_digest(path: Path) -> str:
    """Of the bytes of a file, or of all frames in a folder."""
    files = sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]
    return " ".join(map(file_digest, files))


def stamp(path: Path) -> str:
    """Size and time of a file: whoever writes it anew changes them."""
    found = path.stat()
    return f"{found.st_size}@{found.st_mtime_ns}"


def list_media(root: Path, *, frame_folders: bool = False) -> list[Path]:
    """All videos and images below a folder by their endings, hidden ones left out, in the order of their paths.

    With `frame_folders` a folder that holds images stands for them: a video. Links are followed, each folder once.
    """
    found: set[Path] = set()
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link to a folder above would be walked again and again
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(folder) / name for name in names if not name.startswith(".")):
            suffix = path.suffix.lower()
            if suffix in VIDEO_SUFFIXES or (suffix in IMAGE_SUFFIXES and not frame_folders):
                found.add(path)
            elif suffix in IMAGE_SUFFIXES:
                found.add(path.parent)
    return sorted(found)


@dataclass
class FrameFolder:
    """A video as numbered images of one size, in the order of their names."""

    info: MediaInfo
    folder: Path
    names: tuple[str, ...]  # and no Paths: a kitchen of EPIC has 100,000 frames, and is opened for every clip

    @classmethod
    def open(cls, folder: Path, *, fps: float = FOLDER_FPS) -> FrameFolder:
        names = tuple(sorted(name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES)))
        if not names:
            raise DecodeError(f"{folder} holds no frames ({', '.join(IMAGE_SUFFIXES)})")
        first = open_decoder((folder / names[0]).read_bytes(), "image").info
        info = MediaInfo(len(names), fps, 0.0, len(names) / fps, first.width, first.height, first.codec)
        return cls(info, folder, names)

    def frames_at(self, times: np.ndarray) -> Tensor:
        """The frames shown at `times` [T]: uint8 [T, C, H, W]."""
        numbers = np.clip(np.floor(times * self.info.fps), 0, len(self.names) - 1).astype(int)
        frames = {n: self._frame(self.folder / self.names[n]) for n in sorted(set(numbers.tolist()))}
        return torch.stack([frames[n] for n in numbers.tolist()])

    def _frame(self, file: Path) -> Tensor:
        """uint8 [C, H, W]; DecodeError naming the file where it is damaged or of another size than the first."""
        try:
            image = open_decoder(file.read_bytes(), "image")
            frame = frames_at(image, np.array([image.info.begin]))[0]
        except DecodeError as error:
            raise DecodeError(f"frame {file.name}: {error}") from error
        if tuple(frame.shape[1:]) != (self.info.height, self.info.width):
            raise DecodeError(
                f"frame {file.name} is {list(frame.shape[1:])}, the first {[self.info.height, self.info.width]}"
            )
        return frame
