"""Length, batch, precision and bookkeeping of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vjepa.batch import Modality
from vjepa.train.checkpoint import CheckpointConfig
from vjepa.train.diagnostics import AlarmConfig
from vjepa.train.health import HealthConfig
from vjepa.train.optim import OptimConfig
from vjepa.train.parallel import ParallelConfig
from vjepa.train.probes import ProbeConfig
from vjepa.train.profiling import ProfileConfig
from vjepa.train.watchdog import WatchdogConfig


@dataclass
class BatchConfig:
    """Clips per step over all ranks: the global batch, never per GPU. 0 switches a modality off."""

    video: int = 3072
    image: int = 4608

    def __post_init__(self) -> None:
        if min(self.video, self.image) < 0 or self.video + self.image == 0:
            raise ValueError(f"batch: video={self.video} and image={self.image} must not be negative, and not both 0")

    def as_dict(self) -> dict[Modality, int]:
        """Sizes of the modalities that are on."""
        sizes: dict[Modality, int] = {"video": self.video, "image": self.image}
        return {modality: size for modality, size in sizes.items() if size}


@dataclass
class MicroBatchConfig:
    """Clips per rank and forward pass; null: a rank's share of the batch, or the mask group where that is smaller."""

    video: int | None = None
    image: int | None = None

    def as_dict(self) -> dict[Modality, int | None]:
        return {"video": self.video, "image": self.image}


@dataclass
class TrainConfig:
    """How a run is driven; what it learns from and learns is configured elsewhere."""

    steps: int = 135_000  # optimizer steps; 0: export what the run would start from
    seed: int = 0  # of initialisation, data order, crops and masks
    batch: BatchConfig = field(default_factory=BatchConfig)
    micro_batch: MicroBatchConfig = field(default_factory=MicroBatchConfig)
    precision: Literal["fp32", "bf16"] = "bf16"  # of the forward pass; parameters, losses and the target stay fp32
    device: str = "auto"  # auto is cuda where there is one, else cpu
    threads: int = 1  # CPU threads of each process; two on a loaded 2-core machine were up to 17 times slower
    log_every: int = 10  # steps between rows of metrics.jsonl
    diagnostics_every: int = 100  # steps between collapse diagnostics; the first step has them too
    collective_timeout_s: float = 600.0  # how long ranks wait for one another before they end with an error
    tensorboard: bool = True  # write TensorBoard events beside metrics.jsonl
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("log_every", 1), ("diagnostics_every", 1), ("threads", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"train.{name}={getattr(self, name)} must be at least {least}")
        if self.collective_timeout_s <= 0:
            raise ValueError(f"train.collective_timeout_s={self.collective_timeout_s} must be positive")
        self._check_probe()

    def _check_probe(self) -> None:
        clips = self.batch.as_dict().get(self.probe.modality, 0)
        if self.probe.label is not None and not 0 < clips <= self.probe.queue:
            raise ValueError(
                f"train.probe.modality={self.probe.modality}: train.batch.{self.probe.modality}={clips} must be 1 to "
                f"train.probe.queue={self.probe.queue}"
            )
