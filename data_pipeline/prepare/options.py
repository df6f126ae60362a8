"""What an ingest may be told, and what it reports."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

_INDIFFERENT = {"jobs", "timeout", "overwrite", "restart"}  # options that do not change what is written


@dataclass(frozen=True)
class IngestOptions:
    """How inputs become samples. The defaults suit clips of 256 pixels and random access."""

    max_seconds: float = 30.0
    """Longer videos are cut into equal pieces no longer than this."""
    short_side: int = 256
    """Videos and images are scaled down (never up) to this many pixels on the short side."""
    fps: float = 30.0
    """Most frames per second kept; faster sources keep every 2nd, 3rd, ... frame."""
    gop: int = 30
    """Frames between key frames: small is fast to seek, large is small on disk."""
    crf: int = 23
    """x264's quality, 0 (lossless) to 51."""
    preset: str = "medium"
    """x264's speed preset."""
    jpeg_quality: int = 92
    """Pillow's, 1 to 95, of stills and of images that are scaled down."""
    copy: bool = False
    """Keep the original bytes of videos that are short enough, sound, and of a codec that seeks exactly."""
    stills: int = 0
    """Evenly spaced frames of every video that are also written as image samples."""
    shard_bytes: int = 512_000_000
    """A shard is closed when it has reached this size."""
    shard_count: int = 10_000
    """Most samples in a shard."""
    jobs: int = 1
    """Processes; 1 works in this process, without protection against a decoder that crashes."""
    min_seconds: float = 1.0
    """A damaged video keeps its intact beginning if that lasts at least this long ..."""
    min_frames: int = 16
    """... and has at least this many frames; otherwise it is rejected."""
    max_pixels: int = 8192 * 4320
    """Largest source frame, height x width."""
    timeout: float = 3600.0
    """Seconds for one file, after which its process is stopped and the file rejected; only with several jobs."""
    overwrite: bool = False
    """Replace an existing shard folder."""
    restart: bool = False
    """Throw away what an interrupted ingest has left, instead of going on with it."""

    def __post_init__(self) -> None:
        rules = {
            "max_seconds": self.max_seconds > 0,
            "short_side": self.short_side >= 2,
            "fps": math.isfinite(self.fps) and self.fps > 0,
            "gop": self.gop >= 1,
            "crf": 0 <= self.crf <= 51,
            "jpeg_quality": 1 <= self.jpeg_quality <= 95,
            "stills": self.stills >= 0,
            "shard_bytes": self.shard_bytes >= 1,
            "shard_count": self.shard_count >= 1,
            "jobs": self.jobs >= 1,
            "min_seconds": self.min_seconds >= 0,
            "min_frames": self.min_frames >= 1,
            "max_pixels": self.max_pixels >= 1,
            "timeout": self.timeout > 0,
        }
        for name, holds in rules.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r}: outside what ingest accepts; see --help")

    def decisive(self) -> dict[str, Any]:
        """The options that decide which bytes are written."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _INDIFFERENT}


@dataclass
class Record:
    """A sample on its way into a shard: its media lies in a scratch file until its shard is closed."""

    key: str
    ext: str
    modality: str
    scratch: str
    meta: dict[str, Any]


@dataclass
class Outcome:
    """What became of one input: its samples, and what was refused or lost."""

    records: list[Record] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    """Rows of rejected.jsonl: path, reason, status (`rejected`, `tail lost`, `frames lost` or `skipped`)."""


@dataclass
class Report:
    """The summary of an ingest."""

    out: str
    videos: int = 0
    """Video samples (pieces) written."""
    images: int = 0
    """Image samples written, stills included."""
    bytes: int = 0
    """Bytes of all tars."""
    notes: list[dict[str, Any]] = field(default_factory=list)
    """The rows of rejected.jsonl."""
    was_there: bool = False
    """Nothing was done: the same inputs had been ingested with the same options."""

    def count(self, status: str) -> int:
        """Rows with this status."""
        return sum(note["status"] == status for note in self.notes)

    def __str__(self) -> str:
        in_part = self.count("tail lost") + self.count("frames lost")
        lines = [
            f"{self.out}: {self.videos} video and {self.images} image samples, {self.bytes / 1e6:.1f} MB; "
            f"{self.count('rejected')} files rejected, {in_part} kept in part, "
            f"{self.count('skipped')} skipped" + ("; was there already, nothing was done" if self.was_there else "")
        ]
        lines += [f"  {note['status']}: {note['path']}: {note['reason']}" for note in self.notes]
        return "\n".join(lines)
