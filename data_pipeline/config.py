"""Every knob of the data room, with its rule. The dataclasses double as an OmegaConf structured schema."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from data_pipeline.cache import CacheConfig
from data_pipeline.folders import scheme
from data_pipeline.plan import Order
from data_pipeline.retries import RemoteConfig
from data_pipeline.stream import StreamConfig, is_stream

Backend = Literal["auto", "torchcodec", "pyav", "decord"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
DecodeDevice = Literal["cpu", "cuda"]
ViewTimes = Literal["shared", "own"]
AugmentOn = Literal["worker", "device"]


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    """Raise a ValueError that names the field, its value and the rule it breaks."""
    if not holds:
        raise ValueError(f"{name}={value!r}: {rule}")


@dataclass
class SourceClipConfig:
    """What one source's clips do otherwise than the modality's; null is as there.

    What gives a batch its shape (frames, size, views, local) is the modality's: a batch is one tensor.
    """

    fps: float | None = None
    """Frames per second."""
    scale_min: float | None = None
    """Smallest crop, as a share of the frame's area."""
    scale_max: float | None = None
    """Largest crop, as a share of the frame's area."""
    aspect_min: float | None = None
    """Narrowest crop: width over height."""
    aspect_max: float | None = None
    """Widest crop: width over height."""
    flip: float | None = None
    """Probability of a horizontal flip."""


@dataclass
class SourceConfig:
    """Where records come from, and their share of a mixture."""

    path: str
    """A folder written by `python -m data_pipeline.prepare.ingest` (or its manifest.json): a local path,
    `http(s)://HOST/FOLDER`, `s3://BUCKET/PREFIX` or `gs://BUCKET/PREFIX`. Or, for small sets, a local folder of media
    files (Hugging Face's VideoFolder layout among them) or a list with one `PATH LABEL` a line. Or plain WebDataset
    tars, whose resume is statistical: `/disk/x-{0000..0099}.tar`, `http(s)://HOST/x-{0000..0099}.tar`, `pipe:COMMAND`,
    several of these with `::` between."""
    weight: float = 1.0
    """Share of the samples, relative to the other sources of the same modality."""
    clip: SourceClipConfig = field(default_factory=SourceClipConfig)
    """What differs from the modality's clips."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """How plain WebDataset tars are read; of no use to other sources."""

    def __post_init__(self) -> None:
        _require(math.isfinite(self.weight) and self.weight > 0, "weight", self.weight, "must be a positive number")
        _require(
            is_stream(self.path) or self.stream == StreamConfig(),
            "stream",
            self.stream,
            f"is for plain WebDataset tars, and path={self.path} is none; remove it",
        )


def _require_scale(low: float, high: float, prefix: str = "") -> None:
    _require(0 < low <= 1, f"{prefix}scale_min", low, "must be in (0, 1]")
    _require(low <= high <= 1, f"{prefix}scale_max", high, f"must be between {prefix}scale_min={low} and 1")


@dataclass
class LocalConfig:
    """Local views of a clip: small crops of it (multi-crop); aspect and flip are the clip's."""

    views: int = 0
    """Local views of a sample, after the full-size ones; 0 switches them off."""
    size: int = 96
    """Height and width in pixels."""
    frames: int | None = None
    """Consecutive frames of a local view, at the clip's fps; null: as many as the clip has."""
    scale_min: float = 0.05
    """Smallest crop, as a share of the frame's area."""
    scale_max: float = 0.3
    """Largest crop, as a share of the frame's area."""

    def __post_init__(self) -> None:
        _require(self.views >= 0, "local.views", self.views, "must not be negative; 0 switches local views off")
        _require(self.size >= 1, "local.size", self.size, "must be at least 1 pixel")
        _require(self.frames is None or self.frames >= 1, "local.frames", self.frames, "a view needs at least 1 frame")
        _require_scale(self.scale_min, self.scale_max, "local.")


@dataclass
class ClipConfig:
    """Which frames are taken from a record and how they are cropped."""

    frames: int = 16
    """Frames per clip, T; 1 for images."""
    fps: float = 4.0
    """Frames per second of the clip, in the record's own time; ignored for images."""
    size: int = 256
    """Height and width of the clip in pixels."""
    scale_min: float = 0.3
    """Smallest crop, as a share of the frame's area."""
    scale_max: float = 1.0
    """Largest crop, as a share of the frame's area."""
    aspect_min: float = 0.75
    """Narrowest crop: width over height."""
    aspect_max: float = 1.35
    """Widest crop: width over height."""
    flip: float = 0.5
    """Probability of a horizontal flip (of the whole clip)."""
    views: int = 1
    """Independent full-size crops of a sample: its global views."""
    local: LocalConfig = field(default_factory=LocalConfig)
    """Smaller crops besides."""
    view_times: ViewTimes = "shared"
    """`shared`: all views show the same frames (a shorter local one some of them); `own`: each its own time."""

    def __post_init__(self) -> None:
        _require(self.frames >= 1, "frames", self.frames, "a clip needs at least 1 frame")
        _require(math.isfinite(self.fps) and self.fps > 0, "fps", self.fps, "must be positive")
        _require(self.size >= 1, "size", self.size, "must be at least 1 pixel")
        _require_scale(self.scale_min, self.scale_max)
        _require(self.aspect_min > 0, "aspect_min", self.aspect_min, "must be positive")
        _require(
            self.aspect_max >= self.aspect_min,
            "aspect_max",
            self.aspect_max,
            f"must not be below aspect_min={self.aspect_min}",
        )
        _require(0 <= self.flip <= 1, "flip", self.flip, "is a probability, between 0 and 1")
        _require(self.views >= 1, "views", self.views, "a sample needs at least 1 view")
        _require(
            (self.local.frames or 1) <= self.frames,
            "local.frames",
            self.local.frames,
            f"must not exceed the clip's frames={self.frames}",
        )
        _require(self.view_times in ("shared", "own"), "view_times", self.view_times, "shared or own")

    def crops(self) -> tuple["ClipConfig", ...]:
        """Each view as a clip of its own, global ones first."""
        whole, local = replace(self, views=1, local=LocalConfig()), self.local
        part = replace(
            whole,
            frames=local.frames or self.frames,
            size=local.size,
            scale_min=local.scale_min,
            scale_max=local.scale_max,
        )
        return (whole,) * self.views + (part,) * local.views


@dataclass
class ModalityConfig:
    """The sources of one modality and the clips taken from them; no sources means the modality is off."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Named shard folders; the name is part of the shuffle's seed."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """Clip geometry."""
    order: Order = "shuffle"
    """`shuffle`: every record once in each pass over its source; `replacement`: every sample is drawn by weight, with
    replacement, as in the V-JEPA reference."""

    def __post_init__(self) -> None:
        _require(self.order in ("shuffle", "replacement"), "order", self.order, "shuffle or replacement")
        for name in self.sources:
            self.clip_of(name)

    def clip_of(self, source: str) -> ClipConfig:
        """The clips of one source; ValueError where its own settings do not go with the modality's."""
        own = {name: value for name, value in vars(self.sources[source].clip).items() if value is not None}
        try:
            return replace(self.clip, **own)
        except ValueError as error:
            raise ValueError(f"sources.{source}.clip.{error}") from error


@dataclass
class DataConfig:
    """Everything that decides which bytes become which clips, and how fast."""

    video: ModalityConfig = field(default_factory=ModalityConfig)
    """Video sources; off without sources."""
    image: ModalityConfig = field(default_factory=lambda: ModalityConfig(clip=ClipConfig(frames=1)))
    """Image sources (T = 1); off without sources."""
    decoder: Backend = "auto"
    """`torchcodec` (needs FFmpeg), `pyav`, `decord` (unmaintained; in a process of its own), or `auto`: torchcodec
    where it imports, PyAV otherwise."""
    decode_device: DecodeDevice = "cpu"
    """`cuda`: torchcodec decodes, crops and resizes videos on the rank's GPU (needs a torchcodec built with CUDA)."""
    decode_isolated: bool = False
    """Decode each worker's videos in a process of its own, whatever the decoder: a file that crashes or hangs it is one
    bad sample. For `workers=0`; workers are isolated and replaced anyway."""
    augment_on: AugmentOn = "worker"
    """Where a crop is resized and flipped: `worker`, or `device` (the training process's): less work for a worker, the
    same crops, in place of a CPU's rounding a GPU's (at most one grey level); README, "On the device"."""
    workers: int = 2
    """Worker processes of each rank; 0 decodes in the training process. Never changes the samples."""
    prefetch: int = 2
    """Micro-batches each worker prepares ahead."""
    sample_timeout: float = 60.0
    """Seconds for decoding and cropping one sample; then its worker is replaced and the sample tried once more, and the
    second time it is a bad sample; 0 waits for ever."""
    worker_timeout: float = 300.0
    """Seconds in which a worker may give no sign of life while it reads or collates; then the run stops (a disk that
    hangs); 0 waits for ever."""
    worker_growth_gb: float = 2.0
    """GB by which a worker's memory may grow before it is replaced between two micro-batches (a decoder that leaks);
    0: any."""
    max_bad_fraction: float = 0.05
    """Share of replaced samples above which the trainer stops the run."""
    bad_attempts: int = 10
    """Records tried in place of a bad one before the loader gives up."""
    max_pixels: int = 4096 * 2304
    """Largest frame that is decoded, height x width; a larger one is a bad sample."""
    verify_bytes: bool = True
    """Compare each record with the sha256 in the index; a difference is a bad sample (about 1 ms per MB)."""
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    """Time-outs, retries and parallelism of sources behind HTTP and S3."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Local cache of those sources; off without a folder."""

    def __post_init__(self) -> None:
        _require(self.decoder in BACKENDS, "decoder", self.decoder, f"must be one of {', '.join(BACKENDS)}")
        _require(self.augment_on in ("worker", "device"), "augment_on", self.augment_on, "worker or device")
        self._check_decoding()
        _require(self.workers >= 0, "workers", self.workers, "must not be negative")
        _require(self.prefetch >= 1, "prefetch", self.prefetch, "must be at least 1")
        _require(self.sample_timeout >= 0, "sample_timeout", self.sample_timeout, "must not be negative (seconds)")
        _require(self.worker_growth_gb >= 0, "worker_growth_gb", self.worker_growth_gb, "must not be negative (GB)")
        _require(self.worker_timeout >= 0, "worker_timeout", self.worker_timeout, "must not be negative (seconds)")
        _require(0 <= self.max_bad_fraction <= 1, "max_bad_fraction", self.max_bad_fraction, "must be in [0, 1]")
        _require(self.bad_attempts >= 1, "bad_attempts", self.bad_attempts, "must be at least 1")
        _require(self.max_pixels >= 1, "max_pixels", self.max_pixels, "must be positive")
        frames = self.image.clip.frames
        _require(frames == 1, "image.clip.frames", frames, "an image has 1 frame; use `video` for clips")
        times = self.image.clip.view_times
        _require(times == "shared", "image.clip.view_times", times, "an image has one time, which its views share")
        longest = self.remote.give_up + self.remote.timeout
        _require(
            not self.worker_timeout or not self.workers or longest < self.worker_timeout or not self._any_remote(),
            "worker_timeout",
            self.worker_timeout,
            f"must exceed remote.give_up + remote.timeout = {longest:g} s, or a dead server looks like a hung worker",
        )

    @property
    def needs_spawn(self) -> bool:
        """Whether workers must be spawned: CUDA does not work in a forked process."""
        return self.decode_device == "cuda" and bool(self.video.sources)

    @property
    def isolated_timeout(self) -> float:
        """Seconds for an isolated decoder to open a file, and again to decode: before the sample's own time is up."""
        return 0.4 * self.sample_timeout or math.inf

    def modalities(self) -> dict[str, ModalityConfig]:
        """The modalities that have sources, video first."""
        pairs = {"video": self.video, "image": self.image}
        return {name: config for name, config in pairs.items() if config.sources}

    def _check_decoding(self) -> None:
        device = self.decode_device
        _require(device in ("cpu", "cuda"), "decode_device", device, "must be cpu or cuda")
        by_cuda = self.decoder in ("auto", "torchcodec")
        _require(device == "cpu" or by_cuda, "decode_device", device, f"is for torchcodec, not decoder={self.decoder}")
        together = "cannot be isolated: use decode_isolated=false, or decode_device=cpu"
        _require(device == "cpu" or not self.decode_isolated, "decode_device", device, together)
        twice = "crops are made on the GPU that decoded them: use augment_on=worker, or decode_device=cpu"
        _require(device == "cpu" or self.augment_on == "worker", "decode_device", device, twice)

    def _any_remote(self) -> bool:
        paths = [source.path for part in self.modalities().values() for source in part.sources.values()]
        return any(is_stream(path) or scheme(path) for path in paths)
