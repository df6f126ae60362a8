"""What leaves this room: a Sample (one record turned into views) and a BadSample (a record that would not decode)."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class BadSample:
    """A record that failed and was replaced; it travels with its replacement so that the main process can count it."""

    ordinal: int
    """Place in the run's global order at which the record was wanted."""
    modality: str
    """`video` or `image`."""
    key: str
    """The record's key in its shard."""
    source: str
    """Name of the configured source."""
    reason: str
    """Why it failed, in one line."""


@dataclass(frozen=True)
class Sample:
    """One record, decoded and cropped.

    Every view is uint8 `[C, T, H, W]`, contiguous; the first `num_global` (0: all) are full-size crops, the
    others local ones. With `data.augment_on=device` a CropLater stands for each, which has the tensor's shape and
    becomes one on the training device.
    `extra` holds `timestamps` of the first view (float64 `[T]`, seconds inside the record), where views differ in
    time `view_timestamps` (one such array for each), and the record's own metadata: `start` (seconds inside the
    original file), `source_path`, labels.
    """

    ordinal: int
    key: str
    source: str
    modality: str
    views: tuple[Tensor, ...]
    extra: dict[str, Any] = field(default_factory=dict)
    rejected: tuple[BadSample, ...] = ()
    num_global: int = 0

    @property
    def clip(self) -> Tensor:
        """The first view, uint8 `[C, T, H, W]`."""
        return self.views[0]
