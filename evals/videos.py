"""Annotated videos on disk: the official trees of DAVIS and YouTube-VOS, and masks as PNGs of object ids.

Nothing is downloaded. A tree that is not there, or not whole, is named together with what it should look like.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from data_pipeline.decode import DecodeError, frames_at, open_decoder
from evals.jf import Protocol
from evals.protocol import NotThere
from evals.whole_files import writing

DatasetName = Literal["davis2016", "davis2017", "youtube_vos", "folder"]
PICTURES, MASKS = (".jpg", ".jpeg", ".png"), (".png",)
FOLDS = 5  # YouTube-VOS: one video in five of the training set is held out (80/20, reference evaluation.md 1.5)


class DatasetError(NotThere):
    """A data set or predictions that are not whole; the message says what is missing and how it should lie."""


@dataclass(frozen=True)
class AnnotatedVideo:
    """A video with true masks of some or all of its frames, files by frame name in order of time."""

    name: str
    masks: Mapping[str, Path]
    frames: Mapping[str, Path] = field(default_factory=dict)
    """Pictures; none where only masks are to be compared."""
    protocol: Protocol = "davis"
    merge: bool = False
    """All objects are one, as in DAVIS-2016."""
    void: int | None = None
    """The id of pixels that count nowhere."""
    entry_frames: Mapping[int, str] | None = None
    """Where each object's mask is given, if the set says so; otherwise it is given where the object first appears."""
    categories: Mapping[int, str] = field(default_factory=dict)

    def mask(self, frame: str) -> np.ndarray:
        """True ids of a frame, uint8 [H, W]."""
        ids = read_mask(self.masks[frame])
        return (ids != 0).astype(np.uint8) if self.merge else ids

    @cached_property
    def entries(self) -> dict[str, tuple[int, ...]]:
        """Frame -> the objects whose masks are given there. Reads every true mask where the set does not say."""
        if self.entry_frames is not None:
            first_seen = dict(self.entry_frames)
        elif self.protocol == "davis":  # all that is given is the first frame; what appears later is nobody's
            first_seen = dict.fromkeys(self._ids([next(iter(self.masks))]), next(iter(self.masks)))
        else:
            first_seen = self._ids(self.masks)
        found: dict[str, tuple[int, ...]] = {}
        for each, frame in sorted(first_seen.items()):
            found[frame] = (*found.get(frame, ()), each)
        return found

    @cached_property
    def object_ids(self) -> tuple[int, ...]:
        """The objects that are scored, ascending: on DAVIS those of the first mask, otherwise all that have one."""
        first = next(iter(self.masks), None)
        return tuple(sorted(self._ids([first] if self.protocol == "davis" and first is not None else self.masks)))

    def _ids(self, frames: Iterable[str]) -> dict[int, str]:
        """Object -> the first of these frames that shows it."""
        found: dict[int, str] = {}
        for frame in frames:
            for each in np.unique(self.mask(frame)).tolist():
                if each not in (0, self.void):
                    found.setdefault(each, frame)
        return found


def read_mask(path: Path) -> np.ndarray:
    """Object ids of a PNG, uint8 [H, W]: the palette's indices, or grey values. Raises DatasetError for colours."""
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture)
    except (OSError, SyntaxError) as error:  # pillow's words for a file that is not a whole PNG
        raise DatasetError(f"{path} is not a readable mask: {error}") from error
    if pixels.ndim == 3 and (pixels[..., :3] == pixels[..., :1]).all():  # some masks of DAVIS-2016 are grey as RGB
        pixels = pixels[..., 0]
    if pixels.ndim != 2 or pixels.dtype not in (np.uint8, np.bool_):
        raise DatasetError(f"{path} is {picture.mode}, not a mask of object ids: save 8-bit palette or grey PNGs")
    return pixels.astype(np.uint8)


def write_mask(path: Path, ids: np.ndarray) -> None:
    """Object ids, uint8 [H, W], as a PNG with the colours that DAVIS uses."""
    assert ids.dtype == np.uint8, f"object ids must be uint8, got {ids.dtype}"
    picture = Image.fromarray(ids)
    picture.putpalette(PALETTE.tobytes())  # makes it a palette picture
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


def _palette() -> np.ndarray:
    """The colour map of PASCAL VOC and DAVIS, uint8 [256, 3]: bits of the id dealt out to channels, high first."""
    ids = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((ids >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return colours


PALETTE = _palette()


def read_frame(path: Path) -> Tensor:
    """A picture, uint8 [1, C, H, W]. Raises DatasetError for damaged bytes."""
    try:
        return frames_at(open_decoder(path.read_bytes(), "image"), np.zeros(1))
    except DecodeError as error:
        raise DatasetError(f"{path} is no readable image: {error}") from error


# -------------------------------------------------------------------------------------------------- folders of masks


def mask_folders(folder: Path, *, sequences: Sequence[str] = (), void: int | None = None) -> list[AnnotatedVideo]:
    """The videos of FOLDER/SEQUENCE/*.png, or of a DAVIS tree's Annotations/480p; `sequences` picks some by name."""
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder; masks lie in it as SEQUENCE/00000.png")
    inside = folder / "Annotations" / "480p"
    folder = inside if inside.is_dir() else folder
    names = list(sequences) or sorted(path.name for path in folder.iterdir() if path.is_dir())
    found = [AnnotatedVideo(name, _files(folder / name, MASKS), void=void) for name in names]
    empty = [video.name for video in found if not video.masks]
    if empty or not found:
        what = f"no masks for {listing(empty)}" if empty else "no folder of masks"
        raise DatasetError(f"{folder} holds {what}; they lie in it as SEQUENCE/00000.png")
    return found


def _files(folder: Path, endings: Sequence[str]) -> dict[str, Path]:
    """Frame name -> file, in the order of the names; {} where the folder is missing."""
    if not folder.is_dir():
        return {}
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in endings}


def listing(names: Sequence[str], limit: int = 8) -> str:
    """Names for a message, not all of a great many."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# ---------------------------------------------------------------------------------------------------- sets by name


TREES: dict[DatasetName, str] = {
    "davis2016": "JPEGImages/480p/SEQUENCE/*.jpg, Annotations/480p/SEQUENCE/*.png, ImageSets/2016/val.txt (or "
    "ImageSets/480p/val.txt): DAVIS-2016, or DAVIS-2017-trainval-480p, from davischallenge.org",
    "davis2017": "JPEGImages/480p/SEQUENCE/*.jpg, Annotations/480p/SEQUENCE/*.png, ImageSets/2017/val.txt: "
    "DAVIS-2017-trainval-480p from davischallenge.org",
    "youtube_vos": "JPEGImages/VIDEO/*.jpg, Annotations/VIDEO/*.png, meta.json: the folder train/ of YouTube-VOS from "
    "youtube-vos.org",
    "folder": "JPEGImages/VIDEO/*.jpg, Annotations/VIDEO/*.png, object ids as values: videos of your own",
}


def open_dataset(
    name: DatasetName, root: Path, *, split: str = "val", sequences: Sequence[str] = (), skip_missing: bool = False
) -> list[AnnotatedVideo]:
    """The videos of a split in the official order, or those of `sequences`.

    `skip_missing` leaves out listed videos that are not on the disk. Raises DatasetError for what is not there.
    """
    if name not in TREES:
        raise DatasetError(f"dataset={name!r} is unknown: choose one of {', '.join(TREES)}")
    middle = "480p" if name.startswith("davis") else ""
    for part in ("JPEGImages", "Annotations"):
        if not (root / part / middle).is_dir():
            raise DatasetError(f"{name}: {root / part / middle} is missing. {root} must hold {TREES[name]}")
    facts: dict[str, dict[str, Any]] = {}
    if name == "youtube_vos":
        facts = _youtube_facts(root)
        names = _fold(sorted(facts), split)
    elif name == "folder":
        names = sorted(path.name for path in (root / "Annotations").iterdir() if path.is_dir())
    else:
        names = _davis_list(name, root, split)
    if unknown := sorted(set(sequences) - set(names)):
        raise DatasetError(f"{name}: no {listing(unknown)} in its {split}; there are {listing(names)}")
    settings = {each: facts.get(each, {}) | _rules(name) for each in sequences or names}
    videos = [_video(root, middle, each, extra) for each, extra in settings.items()]
    return _whole(name, root, videos, skip_missing=skip_missing)


def _rules(name: DatasetName) -> dict[str, Any]:
    """What of an AnnotatedVideo depends on the set."""
    return {
        "davis2016": {"merge": True},
        "davis2017": {"void": 255},
        "youtube_vos": {"protocol": "youtube_vos"},
        "folder": {"protocol": "youtube_vos"},
    }[name]


def _video(root: Path, middle: str, name: str, extra: Mapping[str, Any]) -> AnnotatedVideo:
    masks, frames = root / "Annotations" / middle / name, root / "JPEGImages" / middle / name
    return AnnotatedVideo(name, _files(masks, MASKS), _files(frames, PICTURES), **extra)


def _whole(
    name: DatasetName, root: Path, videos: Sequence[AnnotatedVideo], *, skip_missing: bool
) -> list[AnnotatedVideo]:
    """The videos, if all of them are there; a video has pictures, and one for each mask."""
    absent = [video.name for video in videos if not video.frames or not video.masks]
    if absent and not skip_missing:
        raise DatasetError(
            f"{name}: {len(absent)} of {len(videos)} videos lack frames or masks in {root}: {listing(absent)}. It must "
            f"hold {TREES[name]}. To measure the others alone: data.skip_missing=true, or --skip-missing of "
            "evals.tasks.tracking"
        )
    there = [video for video in videos if video.name not in absent]
    if not there:
        raise DatasetError(f"{name}: {root} holds none of the {len(videos)} videos. It must hold {TREES[name]}")
    for video in there:
        if without := [frame for frame in video.masks if frame not in video.frames]:
            raise DatasetError(f"{name}: {video.name} has masks but no pictures of frames {listing(without)}")
        if without := sorted(set((video.entry_frames or {}).values()) - set(video.masks)):
            raise DatasetError(f"{name}: {video.name} has no masks of frames {listing(without)}, where objects enter")
    return there


def _davis_list(name: DatasetName, root: Path, split: str) -> list[str]:
    """Names of the split; lists of DAVIS-2016 have a line `/JPEGImages/480p/NAME/00000.jpg ...` for each frame."""
    year = name.removeprefix("davis")
    candidates = [root / "ImageSets" / year / f"{split}.txt"]
    if year == "2016":
        candidates.append(root / "ImageSets" / "480p" / f"{split}.txt")
    for path in candidates:
        if path.is_file():
            lines = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
            return list(dict.fromkeys(Path(line).parent.name if "/" in line else line for line in lines))
    raise DatasetError(f"{name}: {candidates[0]} is missing. {root} must hold {TREES[name]}")


def _youtube_facts(root: Path) -> dict[str, dict[str, Any]]:
    """Video -> where its objects enter and their categories, from meta.json."""
    path = root / "meta.json"
    if not path.is_file():
        raise DatasetError(f"youtube_vos: {path} is missing. {root} must hold {TREES['youtube_vos']}")
    try:
        videos = json.loads(path.read_text())["videos"]
        return {
            name: {
                "entry_frames": {int(each): min(about["frames"]) for each, about in video["objects"].items()},
                "categories": {int(each): about.get("category", "") for each, about in video["objects"].items()},
            }
            for name, video in videos.items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DatasetError(f"youtube_vos: {path} is not the official meta.json ({error!r})") from error


def seen_categories(meta: Path) -> frozenset[str]:
    """All categories of a meta.json of YouTube-VOS: those of the training set are the seen ones."""
    if not meta.is_file():
        raise DatasetError(f"{meta} is missing: give the meta.json of the training set of YouTube-VOS")
    return frozenset(each for facts in _youtube_facts(meta.parent).values() for each in facts["categories"].values())


def _fold(names: Sequence[str], split: str) -> list[str]:
    """`val` is every fifth video by name, `train` the others, `all` all of them: our own choice of an 80/20 split."""
    if split not in ("val", "train", "all"):
        raise DatasetError(
            f"youtube_vos: split={split!r} is unknown: val (every fifth video), train (the others) or all"
        )
    return [name for i, name in enumerate(names) if split == "all" or (i % FOLDS == FOLDS - 1) == (split == "val")]
