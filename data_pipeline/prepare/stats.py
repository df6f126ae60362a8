"""Counts over the records of a shard folder, out of their index rows; parts add up."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_SECONDS = (1, 2, 4, 8, 16, 32, 64)
_MOST_LINES = 12  # of a histogram; what is rarer is summed up


@dataclass
class Stats:
    """Of the records of one modality."""

    records: int = 0
    bytes: int = 0
    """Of the media, without the tars' own."""
    seconds: float = 0.0
    frames: int = 0
    sizes: Counter[str] = field(default_factory=Counter)
    """Width x height."""
    fps: Counter[str] = field(default_factory=Counter)
    codecs: Counter[str] = field(default_factory=Counter)
    lengths: Counter[str] = field(default_factory=Counter)
    """Seconds, in powers of two."""

    @classmethod
    def of(cls, held: Mapping[str, Any]) -> "Stats":
        """From its own `as_dict`."""
        made = cls()
        for name, value in held.items():
            setattr(made, name, Counter(value) if isinstance(value, dict) else value)
        return made

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(self).items()}

    def add(self, row: Mapping[str, Any]) -> None:
        """Count one index row."""
        self.records += 1
        self.bytes += row["size"]
        self.seconds += row["duration"]
        self.frames += row["frames"]
        self.sizes[f"{row['width']}x{row['height']}"] += 1
        self.codecs[row["codec"]] += 1
        if row["duration"]:
            self.fps[f"{row['fps']:.4g}"] += 1
            self.lengths[_length(row["duration"])] += 1

    def merge(self, other: "Stats") -> None:
        """Add another part's counts."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            setattr(self, name, mine + value)

    def lines(self) -> list[str]:
        """In words and as histograms."""
        each = max(1, self.records)
        words = [f"{self.records} records, {self.bytes / 1e9:.3f} GB ({self.bytes / each / 1e3:.0f} kB each)"]
        if self.seconds:
            mean = f"{self.seconds / each:.1f} s each, {self.bytes * 8 / self.seconds / 1e3:.0f} kbit/s"
            words.append(f"{self.seconds / 3600:.2f} hours, {self.frames} frames ({mean})")
        for name in ("sizes", "lengths", "fps", "codecs"):
            words += _histogram(name, getattr(self, name))
        return words


def _length(seconds: float) -> str:
    """The bin of a length: its bounds in seconds."""
    above = next((bound for bound in _SECONDS if seconds < bound), None)
    if above is None:
        return f"{_SECONDS[-1]}+ s"
    return f"{0 if above == 1 else above // 2}-{above} s"


def _histogram(name: str, counts: Counter[str]) -> list[str]:
    total = sum(counts.values())
    shown = counts.most_common(_MOST_LINES)
    rest = total - sum(count for _, count in shown)
    rows = [*shown, (f"{len(counts) - len(shown)} others", rest)] if rest else shown
    bars = [f"  {value:>12} {count:>9}  {'#' * round(40 * count / total)}" for value, count in rows]
    return [f"{name}:", *bars] if bars else []
