"""A plan in words, for --dry-run, and the refusal of a recipe that does not fit."""

from __future__ import annotations

from launch.config import RunConfig
from launch.planner import (
    COMMON_GB,
    DEFAULT_CARD,
    DEFAULT_MFU,
    DEFAULT_RANKS,
    GIB,
    MOST_RANKS,
    RESERVE_GIB,
    RESERVE_SHARE,
    SAMPLED_GROUPS,
    Device,
    Planner,
    Setting,
    find_device,
    sold,
)
from vjepa.config import ConfigError
from vjepa.train.memory_trace import DeviceType
from vjepa.train.parallel import ParallelConfig

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
