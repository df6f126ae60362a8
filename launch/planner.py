"""What a recipe asks of GPUs before it runs: memory by part, operations, days, and settings that fit common cards.

Memory is that of the heaviest masks of a sample of mask groups, operations are their mean. Nothing is allocated.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import get_args

import torch

from data_pipeline.config import ClipConfig
from launch.config import RunConfig
from vjepa.batch import Grid, Modality
from vjepa.config import ConfigError
from vjepa.masking.blocks import num_kept
from vjepa.masking.collate import MaskCollator, check_groups
from vjepa.objectives.build import predictor_for
from vjepa.train.accounts import peak_flops
from vjepa.train.memory import Need, StepMemory
from vjepa.train.memory_trace import DeviceType, Load, ViewSize, fake_micro_batch
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
        self.predictor = predictor_for(config.objective, config.predictor, self.encoder)
        self._memories: dict[Activations, StepMemory] = {}

    # ------------------------------------------------------------------------------------------------ what is counted

    @cached_property
    def clips(self) -> dict[Modality, list[Load]]:
        """One clip with its masks and views, for each sampled group."""
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

    def _group(self, collate: MaskCollator, modality: Modality, step: int) -> Load:
        clip = self.config.data.video.clip if modality == "video" else self.config.data.image.clip
        masks = collate.masks(modality, step, (step * self.batch[modality],), self._grid(clip))
        return Load(
            clips=1,
            frames=clip.frames,
            size=clip.size,
            masks=tuple((mask.context.shape[1], mask.masked.shape[1]) for mask in masks),
            context_of=tuple(mask.context_of for mask in masks),
            views=tuple(self._view(crop) for crop in clip.crops()),
            num_global=clip.views,
        )

    def _grid(self, clip: ClipConfig) -> Grid:
        side = clip.size // self.encoder.patch_size
        return max(1, clip.frames // self.encoder.tubelet_size), side, side

    def _view(self, crop: ClipConfig) -> ViewSize:
        keep = self.config.mask.views.keep
        kept = None if keep == 1 else num_kept(math.prod(self._grid(crop)), keep)
        return ViewSize(crop.frames, crop.size, kept)

    def _flops(self, modality: Modality, clip: Load) -> int:
        """Of one clip, the target's forward pass included."""
        with torch.device("meta"):
            micro_batch = fake_micro_batch({modality: clip}, self.encoder)
        return self.memory(self.config.train.parallel.activations).objective.flops(micro_batch)

    @cached_property
    def flops_per_clip(self) -> dict[Modality, float]:
        """The mean over the sampled masks."""
        return {m: statistics.fmean(self._flops(m, clip) for clip in found) for m, found in self.clips.items()}

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
            heaviest = {m: max(found, key=_visible) for m, found in self.clips.items()}
            self._memories[activations] = StepMemory(
                *(self.encoder, self.predictor, self.config.objective),
                {m: replace(heaviest[m], clips=clips) for m, clips in self._unit.items()},
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


def _visible(clip: Load) -> int:
    """Context tokens of all masks, a shared context once."""
    return sum(count for (count, _), of in zip(clip.masks, clip.context_of, strict=True) if of is None)


def _parallel(ranks: int, is_compiled: bool) -> Iterator[ParallelConfig]:
    """Least recomputation first, and in it least sharding."""
    shards = [count for count in range(2, ranks + 1) if ranks % count == 0]
    for activations in get_args(Activations):
        yield ParallelConfig("ddp", None, activations, is_compiled)
        for count in shards:
            for reduce_each in (False, True):
                yield ParallelConfig("fsdp", None if count == ranks else count, activations, is_compiled, reduce_each)
