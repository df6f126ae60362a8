"""EPIC-Kitchens-100: its action segments and videos as they lie on disk, for anticipation (`anticipation.py`)."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipeline.decode import Decoder
from evals.anticipation import QUESTIONS, AnticipationConfig, context_end, context_times, draw_aim
from evals.clip_protocol import ClipProtocol, training_clip, validation_views
from evals.labelled_files import DataMissing
from evals.labelled_layouts import Split
from evals.media import FrameFolder, open_media

log = logging.getLogger(__name__)
COLUMNS = ("video_id", "start_timestamp", "stop_timestamp", "verb_class", "noun_class")
EXPECTED = """Expected below data.root:
  EPIC_100_train.csv  EPIC_100_validation.csv  (or annotations/...)
  P01/videos/P01_01.MP4 (or videos/P01_01.MP4), or frames: P01/rgb_frames/P01_01/frame_0000000001.jpg
  EPIC_100_video_info.csv, where frames are read: their rate
Get it from https://epic-kitchens.github.io and github.com/epic-kitchens/epic-kitchens-100-annotations; nothing is
downloaded for you."""


@dataclass(frozen=True)
class Action:
    """One annotated action of a video."""

    video: str
    start: float  # seconds
    stop: float
    verb: int
    noun: int


@dataclass(frozen=True)
class ActionClasses:
    """The classes a probe answers with: verbs, nouns and pairs of both that occur in training, in rising order."""

    verbs: tuple[int, ...]
    nouns: tuple[int, ...]
    actions: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, actions: Sequence[Action]) -> ActionClasses:
        return cls(
            tuple(sorted({action.verb for action in actions})),
            tuple(sorted({action.noun for action in actions})),
            tuple(sorted({(action.verb, action.noun) for action in actions})),
        )

    @property
    def counts(self) -> dict[str, int]:
        """Classes of each question, for the heads."""
        return dict(zip(QUESTIONS, (len(self.verbs), len(self.nouns), len(self.actions)), strict=True))

    @cached_property
    def _places(self) -> tuple[dict[int, int], dict[int, int], dict[tuple[int, int], int]]:
        verbs, nouns = ({n: i for i, n in enumerate(names)} for names in (self.verbs, self.nouns))
        return verbs, nouns, {pair: i for i, pair in enumerate(self.actions)}

    def knows(self, action: Action) -> bool:
        """Whether this very pair of verb and noun occurred in training; others are dropped from validation."""
        return (action.verb, action.noun) in self._places[2]

    def labels(self, actions: Sequence[Action]) -> dict[str, Tensor]:
        """Question -> int64 [B]."""
        verbs, nouns, pairs = self._places
        found = [(verbs[a.verb], nouns[a.noun], pairs[a.verb, a.noun]) for a in actions]
        return dict(zip(QUESTIONS, torch.tensor(found).reshape(-1, 3).unbind(dim=1), strict=True))


def read_actions(root: Path | str, split: Split) -> list[Action]:
    """The actions of a split from EPIC_100_train.csv or EPIC_100_validation.csv; DataMissing, ValueError by line."""
    root = Path(root)
    places = (root / f"EPIC_100_{split}.csv", root / "annotations" / f"EPIC_100_{split}.csv")
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise DataMissing(f"ek100: {root} has no {places[0].name}. {EXPECTED}")
    actions = []
    with file.open(newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines), start=2):
            if missing := [name for name in COLUMNS if not row.get(name)]:
                raise ValueError(f"{file}, line {number}: no {', '.join(missing)}: not a table of EPIC-Kitchens-100")
            try:
                start, stop = seconds(row["start_timestamp"]), seconds(row["stop_timestamp"])
                context_end(start, stop, 0, 0, "start_relative")  # raises where it ends before it begins
                actions.append(Action(row["video_id"], start, stop, int(row["verb_class"]), int(row["noun_class"])))
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}: not a table of EPIC-Kitchens-100") from error
    return actions


def actions_on_disk(root: Path | str, split: Split, *, skip_missing: bool = False) -> list[Action]:
    """The actions of a split whose videos are there, or whose frames are and have a rate.

    Raises DataMissing where some are not, unless `skip_missing`: then their actions are left out, and the log says so.
    """
    actions, videos = read_actions(root, split), EpicVideos(Path(root))
    names = sorted({action.video for action in actions})
    missing: dict[str, DataMissing] = {}
    for name in names:
        try:
            videos.check(name)
        except DataMissing as error:
            missing[name] = error
    if not missing:
        return actions
    first, found = next(iter(missing.values())), f"{len(missing)} of {len(names)} videos of {split} are not there"
    if not skip_missing or len(missing) == len(names):
        raise DataMissing(f"{first}\n{found}. Set data.skip_missing=true to go on without them, if some are there.")
    log.warning("ek100: %s; their actions are left out, and the figures are those of the rest", found)
    return [action for action in actions if action.video not in missing]


def seconds(stamp: str) -> float:
    """HH:MM:SS.ss in seconds."""
    hours, minutes, rest = stamp.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(rest)


@dataclass
class EpicVideos:
    """The videos below a root, as files or as folders of frames."""

    root: Path

    def find(self, video: str) -> Path:
        """The file or folder of a video; DataMissing with the places looked at."""
        kitchen = video.partition("_")[0]
        folders = (self.root / kitchen / "videos", self.root / kitchen, self.root / "videos", self.root)
        frames = (self.root / kitchen / "rgb_frames" / video, self.root / "rgb_frames" / video)
        places = [folder / f"{video}{suffix}" for folder in folders for suffix in (".MP4", ".mp4")] + list(frames)
        if found := next((place for place in places if place.exists()), None):
            return found
        raise DataMissing(f"ek100: video {video} is not below {self.root}. {EXPECTED}")

    def check(self, video: str) -> None:
        """DataMissing where it is not there, or is frames without a rate."""
        if self.find(video).is_dir():
            self._frame_rate(video)

    def open(self, video: str) -> Decoder:
        """A decoder. A file is read whole: from the originals of several GB take frames, or cut them before."""
        path = self.find(video)
        return FrameFolder.open(path, fps=self._frame_rate(video)) if path.is_dir() else open_media(path)

    def _frame_rate(self, video: str) -> float:
        if video not in self._rates:
            raise DataMissing(f"ek100: no EPIC_100_video_info.csv in {self.root} has the rate of {video}'s frames")
        return self._rates[video]

    @cached_property
    def _rates(self) -> dict[str, float]:
        for file in (self.root / "EPIC_100_video_info.csv", self.root / "annotations/EPIC_100_video_info.csv"):
            if file.is_file():
                with file.open(newline="") as lines:
                    return {row["video_id"]: float(row["fps"]) for row in csv.DictReader(lines)}
        return {}


@dataclass(frozen=True)
class EpicReader:
    """Context clips of actions; all that is random is a function of (seed, epoch, ordinal)."""

    videos: EpicVideos
    clips: ClipProtocol
    anticipation: AnticipationConfig
    seed: int = 0

    def __post_init__(self) -> None:
        if self.clips.fps is None or self.clips.segments != 1:
            raise ValueError(
                f"anticipation takes one clip by its rate: set clips.fps, and clips.segments={self.clips.segments} to 1"
            )

    def train(self, action: Action, *, ordinal: int, epoch: int) -> tuple[Tensor, float]:
        """uint8 [1, C, T, H, W] and the anticipation time that was drawn, in seconds."""
        generator = np.random.default_rng((self.seed, epoch, ordinal))
        ahead, point = draw_aim(self.anticipation, generator)
        media, times = self._context(action, ahead, point)
        return training_clip(media, times, self.clips, generator)[None], ahead

    def validate(self, action: Action) -> tuple[Tensor, float]:
        """uint8 [V, C, T, H, W], the same every time, and the anticipation time of validation in seconds."""
        ahead, point = draw_aim(self.anticipation, None)
        media, times = self._context(action, ahead, point)
        return validation_views(media, times, self.clips), ahead

    def _context(self, action: Action, ahead: float, point: float) -> tuple[Decoder, np.ndarray]:
        """The video and the times of the clip before an action."""
        end = context_end(action.start, action.stop, ahead, point, self.anticipation.form)
        assert self.clips.fps is not None
        media = self.videos.open(action.video)
        half_a_frame = 0.5 / max(media.info.fps, self.clips.fps)  # where rounding cannot pick a frame's neighbour
        return media, media.info.begin + context_times(end, self.clips.frames, self.clips.fps) + half_a_frame
