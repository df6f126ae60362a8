"""From a video to what a probe sees of it: segments x views clips (reference evaluation.md 1.1).

A video is cut into equal partitions, one clip each; clips are encoded independently and their tokens lie side by side.
Training sees one view, cropped at random; validation three crops along the long side, whose softmax is averaged.
Validation clips are the same every time, in the middle of their partitions: the reference draws them at random, which
makes its figures differ from run to run; `validation_offset: random` is that form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data_pipeline.decode import DecodeError, Decoder, MediaInfo, frames_at
from data_pipeline.transforms import Box, cut, random_resized_box, resize
from evals.augment import AugmentConfig, erase, rand_augment
from evals.features import FeatureSource
from evals.media import open_media

DECODED_BYTES = 64 * 2**20  # of frames at their own size that are held at once, a frame at least
SINGLE_VIEW_MARGIN = 256 / 224  # a centre crop is cut out of a frame whose short side is this much larger


@dataclass
class ClipProtocol:
    """How a video becomes clips (evaluation.md 1.1)."""

    frames: int = 16  # of a clip; of an image, how often it is repeated
    segments: int = 2  # equal partitions of the video, a clip each; their tokens lie side by side
    views: int = 3  # of validation: 1 (centre crop) or 3 (crops along the long side), softmax averaged
    frame_step: int | None = 4  # frames of the video from one of the clip to the next
    fps: float | None = None  # in place of frame_step: frames of the clip a second
    size: int = 256  # height and width in pixels
    validation_offset: Literal["centre", "random"] = "centre"  # of the clip in its partition; random: the reference's
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        if min(self.frames, self.segments, self.size) < 1:
            raise ValueError(
                f"clips: frames={self.frames}, segments={self.segments}, size={self.size} must be positive"
            )
        if self.views not in (1, 3):
            raise ValueError(f"clips.views={self.views}: choose 1 (centre crop) or 3 (crops along the long side)")
        if (self.frame_step is None) == (self.fps is None):
            raise ValueError(
                f"clips: give one of frame_step={self.frame_step} and fps={self.fps}, and set the other to null"
            )
        if (self.frame_step or self.fps or 0) <= 0:
            raise ValueError(f"clips: frame_step={self.frame_step} and fps={self.fps} must be positive")


# ------------------------------------------------------------------------------------------------------ which frames


def segment_frames(
    num_frames: int, native_fps: float, protocol: ClipProtocol, generator: np.random.Generator | None = None
) -> np.ndarray:
    """The frame numbers of every clip: int64 [S, T].

    A clip spans `frames` times the step. Where partitions are longer, it lies in the middle of its own, or at a place
    drawn by the generator; where they are shorter, clips overlap, evenly spread from the video's start to its end; a
    video shorter than one clip is padded with its last frame.
    """
    step = protocol.frame_step if protocol.fps is None else native_fps / protocol.fps
    assert step is not None
    offsets = np.arange(protocol.frames) * step
    span = protocol.frames * step
    partition = num_frames / protocol.segments
    if span < partition:
        slack = partition - span
        shares = np.full(protocol.segments, 0.5) if generator is None else generator.random(protocol.segments)
        starts = np.arange(protocol.segments) * partition + shares * slack
    elif protocol.segments > 1:
        starts = np.linspace(0, max(0.0, num_frames - span), protocol.segments)
    else:
        starts = np.array([max(0.0, num_frames - span) / 2])
    numbers = np.floor(starts[:, None] + 1e-6) + np.floor(offsets + 1e-6)[None]
    return np.minimum(numbers, num_frames - 1).astype(np.int64)


def frame_times(info: MediaInfo, numbers: np.ndarray) -> np.ndarray:
    """The times at which frames of these numbers are shown: the middle of each, in seconds, in the shape of `numbers`.

    Frames are taken as evenly spaced, also where a file says that its frame rate varies.
    """
    length = info.duration / info.frames
    return info.begin + (numbers + 0.5) * length


# ------------------------------------------------------------------------------------------------------ which pixels


def spatial_boxes(height: int, width: int, views: int, size: int) -> tuple[tuple[int, int], list[Box]]:
    """The size (height, width) to which a frame is resized, and the boxes of its views there.

    Three views: the short side becomes `size`, and boxes lie at start, middle and end of the long side, without a
    margin. One view: the short side becomes size * 256 / 224, and the box lies in the middle.
    """
    short = size if views == 3 else int(size * SINGLE_VIEW_MARGIN)
    scale = short / min(height, width)
    resized = max(short, round(height * scale)), max(short, round(width * scale))
    shares = (0.0, 0.5, 1.0) if views == 3 else (0.5,)
    if views == 3:  # along the long side only; the short one leaves no room
        boxes = [Box(int((resized[0] - size) * s), int((resized[1] - size) * s), size, size) for s in shares]
    else:
        boxes = [Box((resized[0] - size) // 2, (resized[1] - size) // 2, size, size)]
    return resized, boxes


def validation_clips(media: Decoder, protocol: ClipProtocol, generator: np.random.Generator | None = None) -> Tensor:
    """All views of a video for scoring: uint8 [V, S, C, T, size, size].

    The generator is only used where `validation_offset` is random. Decoding holds DECODED_BYTES at a time.
    """
    chosen = generator if protocol.validation_offset == "random" else None
    clips = [validation_views(media, times, protocol) for times in _clip_times(media, protocol, chosen)]
    return torch.stack(clips, dim=1)


def training_clips(media: Decoder, protocol: ClipProtocol, generator: np.random.Generator) -> Tensor:
    """One view of a video to train on: uint8 [1, S, C, T, size, size], every clip cropped and augmented by itself."""
    times = _clip_times(media, protocol, generator)
    return torch.stack([training_clip(media, clip, protocol, generator) for clip in times])[None]


def validation_views(media: Decoder, times: np.ndarray, protocol: ClipProtocol) -> Tensor:
    """The views of the clip at `times` [T]: uint8 [V, C, T, size, size]."""
    resized, boxes = spatial_boxes(media.info.height, media.info.width, protocol.views, protocol.size)

    def views(frames: Tensor) -> Tensor:
        frames = resize(frames, resized)
        return torch.stack([cut(frames, box) for box in boxes], dim=1)  # [T, V, C, size, size]

    return _transformed(media, times, views).permute(1, 2, 0, 3, 4).contiguous()


def training_clip(media: Decoder, times: np.ndarray, protocol: ClipProtocol, generator: np.random.Generator) -> Tensor:
    """The clip at `times` [T], cropped at random and augmented: uint8 [C, T, size, size]."""
    augment, size = protocol.augment, (protocol.size, protocol.size)
    scale, aspect = (augment.scale_min, augment.scale_max), (augment.aspect_min, augment.aspect_max)
    box = random_resized_box(media.info.height, media.info.width, generator, scale=scale, aspect=aspect)
    frames = _transformed(media, times, lambda decoded: resize(cut(decoded, box), size))
    clip = frames.transpose(0, 1).contiguous()  # [C, T, size, size]
    clip = clip.flip(-1) if generator.random() < augment.flip else clip
    return erase(rand_augment(clip, augment, generator), augment, generator)


def _clip_times(media: Decoder, protocol: ClipProtocol, generator: np.random.Generator | None) -> list[np.ndarray]:
    if media.info.frames == 1:  # an image: the same frame again and again
        return [np.full(protocol.frames, media.info.begin)] * protocol.segments
    numbers = segment_frames(media.info.frames, media.info.fps, protocol, generator)
    return list(frame_times(media.info, numbers))


def _transformed(media: Decoder, times: np.ndarray, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """The frames at `times`, transformed: [T, ...]. Few are held at their own size; what repeats is decoded once."""
    unique, places = np.unique(times, return_inverse=True)
    most = max(1, DECODED_BYTES // (3 * media.info.height * media.info.width))
    parts = [transform(frames_at(media, unique[i : i + most])) for i in range(0, len(unique), most)]
    return torch.cat(parts)[torch.from_numpy(places)]


# ---------------------------------------------------------------------------------------------------- files to tokens


@dataclass(frozen=True)
class ClipReader:
    """Clips of files; all that is random is a function of (seed, epoch, ordinal)."""

    protocol: ClipProtocol
    seed: int = 0

    def train(self, path: Path, *, ordinal: int, epoch: int) -> Tensor:
        """uint8 [1, S, C, T, H, W]; ValueError naming the file where it is damaged."""
        generator = np.random.default_rng((self.seed, epoch, ordinal))
        return _read(path, lambda media: training_clips(media, self.protocol, generator))

    def validate(self, path: Path, *, ordinal: int) -> Tensor:
        """uint8 [V, S, C, T, H, W]; ValueError naming the file where it is damaged."""
        generator = np.random.default_rng((self.seed, 0, ordinal))
        return _read(path, lambda media: validation_clips(media, self.protocol, generator))


def _read(path: Path, clips: Callable[[Decoder], Tensor]) -> Tensor:
    try:
        return clips(open_media(path))
    except DecodeError as error:
        raise DecodeError(f"{path}: {error}") from error


def encode_clips(source: FeatureSource, clips: Tensor, *, batch_size: int = 16) -> Tensor:
    """Tokens of clips [..., S, C, T, H, W], each encoded by itself, those of a video side by side: [..., S * N, D].

    `batch_size` bounds how many clips the source sees at a time.
    """
    *lead, segments = clips.shape[:-4]
    flat = clips.flatten(0, -5)
    tokens = torch.cat([source.tokens(part).flatten(1, 3) for part in flat.split(batch_size)])  # [clips, N, D]
    return tokens.view(*lead, segments * tokens.shape[1], tokens.shape[2])
