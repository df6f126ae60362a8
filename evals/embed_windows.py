"""A video as overlapping windows, decoded once and in order, and one row of features for every time step.

Rule of overlaps: a time step is taken from the window in which it lies furthest from that window's ends, of two the
earlier. Not their mean: a mean of outputs is none of the encoder's own, and each row would wait for two windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data_pipeline.decode import DecodeError, Decoder, MediaInfo, frames_at
from data_pipeline.transforms import make_eval_view, make_full_view
from evals.embed_config import EmbedConfig
from evals.features import FeatureSource

DECODED_BYTES = 64 * 2**20  # of frames at their own size that are held at once, a frame at least
_SLACK = 1e-6  # of a frame: a duration that is whole but for rounding has no frame behind its end


@dataclass(frozen=True)
class WindowPlan:
    """Which windows a video has, and which of their steps are kept. Counted in steps: tubelets of sampled frames."""

    steps: int
    """Of the video, the last one perhaps filled up with its last frame."""
    length: int
    """Of a window; a video that is shorter is filled up with its last frame."""
    stride: int

    @cached_property
    def starts(self) -> list[int]:
        """Of each window; the last ends where the video ends."""
        last = max(0, self.steps - self.length)
        return [*range(0, last, self.stride), last]

    def kept(self, number: int) -> tuple[int, int]:
        """First step of the video that is taken from this window, and the one behind the last."""
        starts = self.starts
        begin = 0 if number == 0 else self._border(starts[number - 1], starts[number])
        end = self.steps if number == len(starts) - 1 else self._border(starts[number], starts[number + 1])
        return begin, end

    def _border(self, earlier: int, later: int) -> int:
        """The first step that lies further inside the later window: distances to ends are equal in the middle."""
        return (earlier + self.length - 1 + later) // 2 + 1


@dataclass
class FrameStream:
    """The sampled frames of a video in order, as the encoder sees them; only those of the present batch are held."""

    decoder: Decoder
    times: np.ndarray
    """Seconds at which frames are asked for, [frames]."""
    view: Callable[[Tensor], Tensor]
    """uint8 [T, C, H0, W0] -> [C, T, H, W]."""
    _first: int = 0
    _held: list[Tensor] = field(default_factory=list)  # each [C, H, W], from frame `_first` on

    @property
    def num_held(self) -> int:
        return len(self._held)

    def take(self, begin: int, end: int) -> Tensor:
        """Frames begin..end-1, uint8 [C, T, H, W]; behind the last frame it stands still. Earlier ones are let go."""
        self.forget(begin)
        info = self.decoder.info
        most = max(1, DECODED_BYTES // (3 * info.height * info.width))
        last = min(end, len(self.times))
        for first in range(self._first + len(self._held), last, most):
            view = self.view(frames_at(self.decoder, self.times[first : min(first + most, last)]))
            self._held += [frame.clone() for frame in view.unbind(1)]
        found = self._held[: last - begin]
        return torch.stack(found + [found[-1]] * (end - begin - len(found)), dim=1)

    def forget(self, before: int) -> None:
        """Let go of the frames before this one."""
        if before >= self._first + len(self._held):
            self._first, self._held = before, []
        elif before > self._first:
            self._first, self._held = before, self._held[before - self._first :]


def sample_times(info: MediaInfo, fps: float, *, is_image: bool) -> np.ndarray:
    """Seconds at which frames are taken, from the first frame's own time to the last one's end: float64 [frames].

    They are even in time, and the decoder gives what its time stamps say is shown then: a video of variable rate keeps
    its pace, its long frames come again.
    """
    count = 1 if is_image else max(1, int(np.ceil(info.duration * fps - _SLACK)))
    return info.begin + np.arange(count) / fps


@dataclass(frozen=True)
class VideoWindows:
    """One file as windows: everything about its rows but their numbers."""

    plan: WindowPlan
    times: np.ndarray
    """Of the sampled frames, [frames]."""
    tubelet: int
    """Frames of a step; 1 for an image."""
    config: EmbedConfig

    @classmethod
    def of(cls, info: MediaInfo, config: EmbedConfig, tubelet: int, *, is_image: bool) -> VideoWindows:
        times = sample_times(info, config.fps, is_image=is_image)
        if is_image:
            return cls(WindowPlan(1, 1, 1), times, 1, config)
        plan = WindowPlan(-(-len(times) // tubelet), config.window // tubelet, config.stride // tubelet)
        return cls(plan, times, tubelet, config)

    @property
    def num_windows(self) -> int:
        return len(self.plan.starts)

    @cached_property
    def row_times(self) -> np.ndarray:
        """Seconds of every row: the mean time of the frames it was sampled from, without those that fill up."""
        if self.config.pool == "clip":
            spans = [(start, start + self.plan.length) for start in self.plan.starts]
        else:
            spans = [(step, step + 1) for step in range(self.plan.steps)]
        return np.array([self.times[begin * self.tubelet : end * self.tubelet].mean() for begin, end in spans])

    def batches(self, stream: FrameStream, source: FeatureSource, first: int) -> Iterator[tuple[int, np.ndarray]]:
        """Batches from number `first` on: how many sampled frames are done, and the rows that follow.

        Batches are the same wherever one starts, so that rows do not depend on where a stopped run goes on.
        """
        starts, dtype = self.plan.starts, {"fp32": np.float32, "fp16": np.float16}[self.config.dtype]
        for begin in range(first * self.config.batch, len(starts), self.config.batch):
            numbers = range(begin, min(begin + self.config.batch, len(starts)))
            tokens = source.tokens(torch.stack([self._window(stream, starts[number]) for number in numbers]))
            rows = torch.cat([self._rows(number, tokens[i]) for i, number in enumerate(numbers)]).numpy()
            with np.errstate(over="ignore"):
                rows = rows.astype(dtype)
            if not np.isfinite(rows).all():
                raise ValueError(f"features are not finite as {self.config.dtype}")
            yield self.frames_done(begin // self.config.batch + 1), rows

    def frames_done(self, batches: int) -> int:
        """Sampled frames whose rows are in the first so many batches."""
        last = min(batches * self.config.batch, self.num_windows) - 1
        return 0 if last < 0 else min(len(self.times), self.plan.kept(last)[1] * self.tubelet)

    def _window(self, stream: FrameStream, start: int) -> Tensor:
        """uint8 [C, T, H, W]."""
        return stream.take(start * self.tubelet, (start + self.plan.length) * self.tubelet)

    def _rows(self, number: int, tokens: Tensor) -> Tensor:
        """What is kept of a window's tokens [t, h, w, D]."""
        if self.config.pool == "clip":
            return tokens.mean(dim=(0, 1, 2))[None]
        begin, end = self.plan.kept(number)
        start = self.plan.starts[number]
        kept = tokens[begin - start : end - start]
        return kept if self.config.pool == "none" else kept.mean(dim=(1, 2))


def view_of(info: MediaInfo, config: EmbedConfig, patch_size: int) -> Callable[[Tensor], Tensor]:
    """What makes decoded frames what the encoder sees; DecodeError for a frame too narrow to be whole."""
    if config.fit == "crop":
        return lambda frames: make_eval_view(frames, config.size)
    size = config.picture_size(info.height, info.width, patch_size)
    if max(size) > 16 * config.size:
        raise DecodeError(f"frames of {info.width}x{info.height} would be {size[1]}x{size[0]} pixels with fit=whole")
    return lambda frames: make_full_view(frames, size)
