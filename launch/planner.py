"""What a recipe asks of GPUs before it runs: memory by part, operations, days, and settings that fit common cards.

Memory is that of the heaviest masks of a sample of mask groups, operations are their mean. Nothing is allocated.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import torch

from launch.config import RunConfig
from vjepa.batch import Grid, Modality
from vjepa.config import ConfigError
from vjepa.masking.collate import MaskCollator, check_groups
from vjepa.train.accounts import peak_flops
from vjepa.train.memory import Need, StepMemory
from vjepa.train.memory_trace import DeviceType, Load, fake_micro_batch
from vjepa.train.parallel import Activations, ParallelConfig

GIB = 2**30
SECONDS_A_DAY = 86_400
DEFAULT_RANKS, DEFAULT_CARD, DEFAULT_MFU = 8, "H100", 0.4
MEMORY_GB = {  # as sold; A100 and V100 in their larger sizes: --gpu-memory names another
    "A10": 24,
    "A100": 80,
    "B200": 180,
    "GB200": 186,
    "GH200": 96,
    "H100": 80,
    "H100 NVL": 94,
    "H100 PCIe": 80,
    "H20": 96,
    "H200": 141,
    "L4": 24,
    "L40S": 48,
    "RTX 4090": 24,
    "V100": 32,
}
COMMON_GB = (16, 24, 80, 141)
USABLE_SHARE = 0.98  # GiB that CUDA reports for each GB as sold: 78-79 of 80, 139-140 of 141
RESERVE_GIB, RESERVE_SHARE = 1.0, 0.05  # CUDA's context and libraries; the allocator's fragments
SAMPLED_GROUPS = 64  # mask groups per modality, each of another step
MOST_RANKS = 1024
ENOUGH = 4  # a micro-batch of a quarter of the largest possible keeps a GPU busy


@dataclass(frozen=True)
class Device:
    """One GPU."""

    name: str
    memory: int  # bytes that CUDA reports

    @property
    def usable(self) -> int:
        """Bytes for a step's tensors, the reserve left out."""
        return int(self.memory * (1 - RESERVE_SHARE) - RESERVE_GIB * GIB)

    @property
    def peak(self) -> float | None:
        return peak_flops(self.name)


def sold(gigabytes: float, name: str | None = None) -> Device:
    """A card by the gigabytes on its box."""
    if gigabytes <= 0:
        raise ConfigError(f"--gpu-memory {gigabytes:g} must be positive: the card's GB as sold, for example 80")
    return Device(name or f"{gigabytes:g} GB", int(gigabytes * USABLE_SHARE * GIB))


def find_device(card: str | None, gigabytes: float | None) -> Device:
    """The device of --card and --gpu-memory; a card that is not in the list is refused."""
    if card is None:
        return sold(MEMORY_GB[DEFAULT_CARD], DEFAULT_CARD) if gigabytes is None else sold(gigabytes)
    known = {name.lower(): name for name in MEMORY_GB}
    name = known.get(card.lower())
    if name is None:
        raise ConfigError(f"--card {card!r} is unknown: give --gpu-memory GB, or one of {', '.join(MEMORY_GB)}")
    return sold(MEMORY_GB[name] if gigabytes is None else gigabytes, name)


@dataclass(frozen=True)
class Setting:
    """One way to run the recipe, and what it needs."""

    micro_batch: Mapping[Modality, int]
    num_micro_batches: int
    parallel: ParallelConfig
    need: Need

    @property
    def overrides(self) -> str:
        """Ready to paste."""
        sizes = [f"train.micro_batch.{modality}={size}" for modality, size in self.micro_batch.items()]
        shards = "null" if self.parallel.shard_ranks is None else str(self.parallel.shard_ranks)
        settings = {"mode": self.parallel.mode, "shard_ranks": shards, "activations": self.parallel.activations}
        if self.parallel.reduce_each:
            settings["reduce_each"] = "true"
        return " ".join([*sizes, *(f"train.parallel.{name}={value}" for name, value in settings.items())])


class Planner:
    """Answers about one recipe; traces are made when first asked for and serve every card."""

    def __init__(self, config: RunConfig, device_type: DeviceType = "cuda") -> None:
        self.config = config
        self.device_type: DeviceType = device_type
        self.batch = config.train.batch.as_dict()
        self.encoder = config.model.encoder_config()
        self.predictor = config.predictor.predictor_config(self.encoder)
        self._memories: dict[Activations, StepMemory] = {}

    # ------------------------------------------------------------------------------------------------ what is counted

    @cached_property
    def masks(self) -> dict[Modality, list[tuple[tuple[int, int], ...]]]:
        """Context and masked tokens of every mask, for each sampled group."""
        collate = MaskCollator(
            self.config.mask,
            seed=self.config.train.seed,
            batch=self.batch,
            patch_size=self.config.model.patch_size,
            tubelet_size=self.config.model.tubelet_size,
        )
        return {
            modality: [self._group(collate, modality, step) for step in range(SAMPLED_GROUPS)]
            for modality in self.batch
        }

    def _group(self, collate: MaskCollator, modality: Modality, step: int) -> tuple[tuple[int, int], ...]:
        frames, size = self._clip(modality)
        side = size // self.encoder.patch_size
        grid: Grid = (max(1, frames // self.encoder.tubelet_size), side, side)
        masks = collate.masks(modality, step, (step * self.batch[modality],), grid)
        return tuple((mask.context.shape[1], mask.masked.shape[1]) for mask in masks)

    def _clip(self, modality: Modality) -> tuple[int, int]:
        clip = self.config.data.video.clip if modality == "video" else self.config.data.image.clip
        return (clip.frames if modality == "video" else 1), clip.size

    def _load(self, modality: Modality, clips: int, masks: tuple[tuple[int, int], ...]) -> Load:
        return Load(clips, *self._clip(modality), masks)

    def _flops(self, modality: Modality, masks: tuple[tuple[int, int], ...]) -> int:
        """Of one clip, the target's forward pass included."""
        with torch.device("meta"):
            clip = fake_micro_batch({modality: self._load(modality, 1, masks)}, self.encoder)
        return self.memory(self.config.train.parallel.activations).objective.flops(clip)

    @cached_property
    def flops_per_clip(self) -> dict[Modality, float]:
        """The mean over the sampled masks."""
        return {m: statistics.fmean(self._flops(m, masks) for masks in groups) for m, groups in self.masks.items()}

    @property
    def flops_per_step(self) -> float:
        """Of all ranks together."""
        return sum(size * self.flops_per_clip[modality] for modality, size in self.batch.items())

    def days(self, ranks: int, peak: float, mfu: float) -> float:
        """Days of the whole stage."""
        return self.config.train.steps * self.flops_per_step / (ranks * peak * mfu) / SECONDS_A_DAY

    # --------------------------------------------------------------------------------------------------------- memory

    @cached_property
    def _unit(self) -> dict[Modality, int]:
        """The smallest micro-batch with the batch's proportions."""
        divisor = math.gcd(*self.batch.values())
        return {modality: size // divisor for modality, size in self.batch.items()}

    def memory(self, activations: Activations) -> StepMemory:
        """Of micro-batches with the heaviest sampled masks, which are those with the most visible tokens."""
        if activations not in self._memories:
            heaviest = {m: max(found, key=lambda masks: sum(c for c, _ in masks)) for m, found in self.masks.items()}
            self._memories[activations] = StepMemory(
                *(self.encoder, self.predictor, self.config.objective),
                {m: self._load(m, clips, heaviest[m]) for m, clips in self._unit.items()},
                activations=activations,
                precision=self.config.train.precision,
                device_type=self.device_type,
            )
        return self._memories[activations]

    def setting(self, ranks: int, num_micro_batches: int, parallel: ParallelConfig) -> Setting:
        """What these settings need."""
        micro_batch: dict[Modality, int] = {
            modality: size // ranks // num_micro_batches for modality, size in self.batch.items()
        }
        modality = next(iter(micro_batch))
        multiple = micro_batch[modality] // self._unit[modality]
        need = self.memory(parallel.activations).need(multiple, parallel, ranks, num_micro_batches)
        return Setting(micro_batch, num_micro_batches, parallel, need)

    def configured(self, ranks: int) -> Setting:
        """What the recipe needs as it stands."""
        return self.setting(ranks, self.config.check(ranks, needs_sources=False), self.config.train.parallel)

    # ---------------------------------------------------------------------------------------------------- suggestions

    def suggest(self, device: Device, ranks: int) -> Setting | None:
        """The least recomputation, then the least sharding, then the largest micro-batch that fit; None: nothing fits.

        Gradients are reduced with each micro-batch only where they are too many to be accumulated whole.

        A micro-batch below a quarter of the largest possible is taken only where no larger one fits at all:
        accumulating costs little, small kernels do.
        """
        counts = self._counts(ranks)
        enough = [count for count in counts if count <= ENOUGH * counts[0]]
        for chosen in (enough, [count for count in counts if count not in enough]):
            for parallel in _parallel(ranks, self.config.train.parallel.compile):
                for count in chosen:
                    if parallel.reduce_each and count == 1:
                        continue  # the same as reducing once
                    setting = self.setting(ranks, count, parallel)
                    if setting.need.total <= device.usable:
                        return setting
        return None

    def ranks_that_fit(self, device: Device, ranks: int) -> int | None:
        """The fewest ranks, doubling, on which some setting fits this device."""
        while (ranks := 2 * ranks) <= MOST_RANKS:
            if self._counts(ranks) and self.suggest(device, ranks):
                return ranks
        return None

    def _counts(self, ranks: int) -> list[int]:
        """Micro-batches per step that the batch and the mask groups allow, fewest first."""
        if any(size % ranks for size in self.batch.values()):
            return []
        shares: dict[Modality, int] = {modality: size // ranks for modality, size in self.batch.items()}
        common = math.gcd(*shares.values())
        return [count for count in range(1, common + 1) if common % count == 0 and self._is_allowed(shares, count)]

    def _is_allowed(self, shares: Mapping[Modality, int], count: int) -> bool:
        micro: dict[Modality, int] = {modality: share // count for modality, share in shares.items()}
        try:
            check_groups(self.config.mask, batch=self.batch, micro_batch=micro)
        except ValueError:
            return False
        return True


def _parallel(ranks: int, is_compiled: bool) -> Iterator[ParallelConfig]:
    """Least recomputation first, and in it least sharding."""
    shards = [count for count in range(2, ranks + 1) if ranks % count == 0]
    for activations in get_args(Activations):
        yield ParallelConfig("ddp", None, activations, is_compiled)
        for count in shards:
            for reduce_each in (False, True):
                yield ParallelConfig("fsdp", None if count == ranks else count, activations, is_compiled, reduce_each)


# ------------------------------------------------------------------------------------------------------ what is printed


def describe_plan(planner: Planner, device: Device | None, ranks: int, mfu: float) -> str:
    """Memory by part, operations, days and settings that fit; of a run on CPUs (no device) the first two."""
    setting = planner.configured(ranks)
    return "\n".join(
        [
            *_memory_lines(setting, device, ranks),
            "",
            *_compute_lines(planner, device, ranks, mfu),
            *(["", *_suggestion_lines(planner, ranks)] if device is not None else []),
        ]
    )


def _memory_lines(setting: Setting, device: Device | None, ranks: int) -> list[str]:
    sizes = " + ".join(f"{size} {modality}" for modality, size in setting.micro_batch.items())
    where = f"{ranks} x {device.name}" if device else f"{ranks} CPU process(es)"
    need = setting.need
    lines = [
        f"memory of one rank on {where}, {_sharding(setting.parallel, ranks)}, "
        f"activations {setting.parallel.activations}, micro-batch {sizes}, "
        f"{setting.num_micro_batches} per step; fullest at: {need.moment}",
        *(f"  {name:<26}{size / GIB:8.2f} GiB" for name, size in need.parts.items()),
        f"  {'total':<26}{need.total / GIB:8.2f} GiB",
    ]
    if device is not None:
        lines.append(f"  {'there is':<26}{device.usable / GIB:8.2f} GiB ({_reserve(device)})")
    return lines


def _reserve(device: Device) -> str:
    return (
        f"{device.memory / GIB:.1f} GiB less {RESERVE_GIB:g} GiB for CUDA's context and {RESERVE_SHARE:.0%} for the "
        "allocator's fragments"
    )


def _sharding(parallel: ParallelConfig, ranks: int) -> str:
    if ranks == 1:
        return "nothing shared"
    if parallel.mode == "ddp":
        return "ddp"
    return f"fsdp over {parallel.shard_ranks or 'all'} ranks"


def _compute_lines(planner: Planner, device: Device | None, ranks: int, mfu: float) -> list[str]:
    steps = planner.config.train.steps
    clips = ", ".join(f"{flops / 1e12:.3g} TFLOP per {m} clip" for m, flops in planner.flops_per_clip.items())
    lines = [
        f"operations: {planner.flops_per_step / 1e15:,.3g} PFLOP a step ({clips}), target included, recomputation not; "
        f"mean of {SAMPLED_GROUPS} mask groups"
    ]
    if device is None:
        return lines
    if device.peak is None:
        return [*lines, f"days: the peak of {device.name} is not known; name a card, for example --card {DEFAULT_CARD}"]
    days = planner.days(ranks, device.peak, mfu)
    return [
        *lines,
        f"days: {days:,.3g} for {steps:,} steps on {ranks} x {device.name}, assuming an MFU of {mfu:g} of "
        f"{device.peak / 1e12:.0f} TFLOP/s (--mfu)",
    ]


def _suggestion_lines(planner: Planner, ranks: int) -> list[str]:
    lines = [f"settings that fit on {ranks} rank(s), with a share kept free as above:"]
    for gigabytes in COMMON_GB:
        device = sold(gigabytes)
        lines.append(f"  {device.name:>6}: {_suggestion(planner, device, ranks)}")
    return lines


def _suggestion(planner: Planner, device: Device, ranks: int) -> str:
    setting = planner.suggest(device, ranks)
    if setting is not None:
        return f"{setting.need.total / GIB:6.1f} GiB  {setting.overrides}"
    enough = planner.ranks_that_fit(device, ranks)
    return "does not fit" + (f"; fits on {enough} ranks" if enough else f", nor on up to {MOST_RANKS} ranks")


# ---------------------------------------------------------------------------------------------------------- refusing


def refuse(planner: Planner, device: Device, ranks: int) -> None:
    """ConfigError where the recipe as it stands needs more than the device has."""
    need = planner.configured(ranks).need
    if need.total <= device.usable:
        return
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in need.largest(3))
    setting = planner.suggest(device, ranks)
    remedy = f"These settings fit: {setting.overrides}" if setting else f"It {_suggestion(planner, device, ranks)}"
    raise ConfigError(
        f"recipe {planner.config.recipe}, stage {planner.config.stage}, needs {need.total / GIB:.1f} GiB on each of "
        f"{ranks} rank(s) (largest parts: {parts} GiB), but {device.name} has {device.usable / GIB:.1f} GiB "
        f"({_reserve(device)}). {remedy}"
    )


def refuse_if_too_large(config: RunConfig, world_size: int, device_memory_bytes: int) -> None:
    """At the start of a run: ConfigError where the first step would want more memory; it says what fits."""
    try:
        refuse(Planner(config), Device("this GPU", device_memory_bytes), world_size)
    except ConfigError as error:
        raise ConfigError(f"{error}. check_memory=false starts all the same") from None


def default_ranks(config: RunConfig) -> int:
    """Eight where the batch divides by it; one on a CPU."""
    if config.train.device == "cpu" or any(size % DEFAULT_RANKS for size in config.train.batch.as_dict().values()):
        return 1
    return DEFAULT_RANKS


def plan(
    config: RunConfig, *, gpus: int | None, card: str | None, gpu_memory: float | None, mfu: float = DEFAULT_MFU
) -> tuple[str, ConfigError | None]:
    """The text for --dry-run, and why the recipe is refused on the device shape asked for (None: it is not)."""
    if not 0 < mfu <= 1:
        raise ConfigError(
            f"--mfu {mfu:g} must be above 0 and at most 1: a share of the card's peak, usually 0.3 to 0.5"
        )
    if gpus is not None and gpus < 1:
        raise ConfigError(f"--gpus {gpus} must be at least 1")
    is_asked = card is not None or gpu_memory is not None
    on_cpu = config.train.device == "cpu" and not is_asked
    device = None if on_cpu else find_device(card, gpu_memory)
    ranks = default_ranks(config) if gpus is None else gpus
    device_type: DeviceType = "cpu" if on_cpu else "cuda"
    planner = Planner(config, device_type)
    text = describe_plan(planner, device, ranks, mfu)
    if device is not None and (is_asked or gpus is not None):
        try:
            refuse(planner, device, ranks)
        except ConfigError as error:
            return text, error
    return text, None
