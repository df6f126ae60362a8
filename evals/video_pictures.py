"""A whole video beside what an encoder sees of it, step by step: for films, and for a strip of a few steps.

Features come out of `evals.embed`'s windows by way of a temporary folder: length costs disk (two bytes a number)
and no memory.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.decode import open_decoder
from evals.embed import Embedder
from evals.embed_config import EmbedConfig
from evals.embed_folder import EmbedFolder, read_embedding
from evals.embed_windows import FrameStream, VideoWindows, view_of
from evals.media import is_image
from evals.models import EncoderModel, ForeignModel
from evals.pca import PcaBasis
from evals.similarity import SimilarityMap, enlarged

GIF_STEPS = 600  # pillow holds all of a GIF's pictures until it writes them

Painter = Callable[[int, np.ndarray, np.ndarray], np.ndarray]
"""(step, frame uint8 [H, W, 3], tokens [h, w, D]) -> the picture beside the frame, uint8 [H, W, 3]."""


@dataclass(frozen=True)
class VideoPictures:
    """A video, its features [T, h, w, D], and what is painted of them."""

    path: Path
    features: np.ndarray
    times: np.ndarray
    windows: VideoWindows
    patch_size: int

    def pca(self, *, foreground: bool = False) -> Painter:
        """Colours of one basis for all of the video."""
        basis = PcaBasis.fit(self.features, foreground=foreground)

        def paint(step: int, frame: np.ndarray, tokens: np.ndarray) -> np.ndarray:
            rgb = (255 * basis.colours(tokens[None])[0]).round().byte().numpy()
            return enlarged(rgb, frame.shape)

        return paint

    def similarity(self, patch: Sequence[float], *, tokens: bool) -> Painter:
        """Heat of similarity with a patch (T, Y, X): seconds and pixels of the picture, or numbers of the token."""
        place = (int(patch[0]), int(patch[1]), int(patch[2]))
        if not tokens:
            step = int(np.abs(self.times - patch[0]).argmin())
            place = (step, int(patch[1] // self.patch_size), int(patch[2] // self.patch_size))
        found = SimilarityMap.of(self.features, place)
        return lambda step, frame, seen: found.overlay(frame, seen, step=step)

    def pictures(self, paint: Painter, steps: Iterable[int] | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Frame (of the middle of the step, the later of two) and picture of each of these steps, which rise."""
        decoder = open_decoder(self.path, "image" if is_image(self.path) else "video")
        stream = FrameStream(decoder, self.windows.times, view_of(decoder.info, self.windows.config, self.patch_size))
        tubelet, last = self.windows.tubelet, len(self.windows.times) - 1
        for step in range(len(self.features)) if steps is None else steps:
            number = min(last, step * tubelet + tubelet // 2)
            frame = stream.take(number, number + 1)[:, 0].permute(1, 2, 0).numpy()
            yield frame, paint(step, frame, self.features[step])

    @property
    def fps(self) -> float:
        """Steps a second: shown at this rate the film has the video's pace."""
        return self.windows.config.fps / self.windows.tubelet


@contextlib.contextmanager
def video_pictures(model: EncoderModel | ForeignModel, config: EmbedConfig, path: Path) -> Iterator[VideoPictures]:
    """The features of a video in a folder that is gone afterwards; DecodeError where it is damaged."""
    with tempfile.TemporaryDirectory() as work:
        Embedder(model, config, EmbedFolder(Path(work))).embed(path.name, path)
        features, times = read_embedding(work, path.name)
        decoder = open_decoder(path, "image" if is_image(path) else "video")
        windows = VideoWindows.of(decoder.info, config, model.tubelet_size, is_image=is_image(path))
        yield VideoPictures(path, features, times, windows, model.patch_size)


def picture_strip(pictures: VideoPictures, paint: Painter, columns: int) -> tuple[Tensor, Tensor]:
    """Frames uint8 [T, H, W, 3] and pictures [T, H, W, 3] in 0..1 of up to so many steps, evenly spread."""
    count = len(pictures.features)
    steps = np.linspace(0, count - 1, min(columns, count)).round().astype(int).tolist()
    pairs = list(pictures.pictures(paint, steps))
    frames, painted = (torch.from_numpy(np.stack(each)) for each in zip(*pairs, strict=True))
    return frames, painted.float() / 255


def side_by_side(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[np.ndarray]:
    """Frame and picture as one, uint8 [H, 2 * W, 3]."""
    return (np.concatenate(pair, axis=1) for pair in pairs)


def write_mp4(path: Path, pairs: Iterable[tuple[np.ndarray, np.ndarray]], fps: float) -> None:
    """A film in H.264, picture by picture; odd heights lose a line, as its colours need even ones."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "18"})
        stream.pix_fmt = "yuv420p"
        for i, picture in enumerate(side_by_side(pairs)):
            height, width = (size // 2 * 2 for size in picture.shape[:2])
            if i == 0:
                stream.height, stream.width = height, width
            even = np.ascontiguousarray(picture[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode(None))


def write_gif(path: Path, pairs: Iterable[tuple[np.ndarray, np.ndarray]], fps: float, count: int) -> None:
    """A GIF of `count` pictures; ValueError for more than its writer may hold."""
    if count > GIF_STEPS:
        raise ValueError(
            f"{path}: {count} pictures are more than the {GIF_STEPS} of a GIF: write an .mp4, or lower --fps"
        )
    images = [Image.fromarray(picture) for picture in side_by_side(pairs)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=1000 / fps, loop=0)
