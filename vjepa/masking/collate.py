"""The door in: the loader's Samples become a Batch with its masks.

A Sample is anything with the fields below (data_pipeline's, or a user's own): this package imports no loader.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from vjepa.batch import MODALITIES, Batch, Grid, Mask, Modality
from vjepa.masking.blocks import BlockMaskConfig, Truncate, group_masks, kept_tokens, rng


class SampleLike(Protocol):
    """What the door asks of a sample; views are uint8 [C, T, H, W], the first `num_global` (0: all) global ones.

    What becomes a view on the device may stand for one: its class has a `stack`, which makes a ViewsLater of several.
    """

    @property
    def ordinal(self) -> int: ...
    @property
    def key(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def modality(self) -> str: ...
    @property
    def views(self) -> tuple[Tensor, ...]: ...
    @property
    def extra(self) -> dict[str, Any]: ...
    @property
    def rejected(self) -> tuple[Any, ...]: ...
    @property
    def num_global(self) -> int: ...


def _video_masks() -> dict[str, BlockMaskConfig | None]:
    return {"short": BlockMaskConfig(8, 0.15), "long": BlockMaskConfig(2, 0.7)}


def _image_masks() -> dict[str, BlockMaskConfig | None]:
    return {"image": BlockMaskConfig(10, 0.15)}


@dataclass
class GroupConfig:
    """Clips that share their token counts; the reference's per-rank batches, the whole batch where it is smaller."""

    video: int = 24
    image: int = 36

    def of(self, modality: Modality) -> int:
        return self.video if modality == "video" else self.image


@dataclass
class ViewsConfig:
    """What the encoder sees of a view that it encodes as a whole."""

    keep: float = 1.0  # share of its tokens, drawn at random for each clip and view (LeVJEPA: 0.05); 1: all

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"mask.views.keep={self.keep} must be above 0 and at most 1, which keeps all tokens")


@dataclass
class MaskConfig:
    """All masks of a run."""

    video: dict[str, BlockMaskConfig | None] = field(default_factory=_video_masks)  # of every clip; null drops a name
    image: dict[str, BlockMaskConfig | None] = field(default_factory=_image_masks)  # of every image; null drops a name
    group: GroupConfig = field(default_factory=GroupConfig)  # clips cut to the same token counts
    per_step: int | None = None  # masks used in one step, drawn from the named ones; null: all, as in V-JEPA
    truncate: Truncate = "random"  # how a clip is cut to its group's counts: random, or the reference's prefix
    views: ViewsConfig = field(default_factory=ViewsConfig)  # token drop

    def __post_init__(self) -> None:
        if self.per_step is not None and self.per_step < 1:
            raise ValueError(f"mask.per_step={self.per_step} must be at least 1; null uses all masks in every step")

    def of(self, modality: Modality) -> dict[str, BlockMaskConfig]:
        named = self.video if modality == "video" else self.image
        return {name: mask for name, mask in named.items() if mask is not None}


class MaskCollator:
    """Samples of one micro-batch -> Batch; masks depend on (seed, step, ordinal) and on nothing else.

    `batch` is the global batch per modality. The micro-batch must lie in one mask group; `check_groups` says which
    sizes do.
    """

    def __init__(
        self, config: MaskConfig, *, seed: int, batch: Mapping[Modality, int], patch_size: int, tubelet_size: int
    ) -> None:
        self.config, self.seed, self.batch = config, seed, dict(batch)
        self.patch_size, self.tubelet_size = patch_size, tubelet_size

    def __call__(self, samples: Sequence[SampleLike]) -> Batch:
        """Stack the views of consecutive ordinals of one modality and draw their masks."""
        first = samples[0]
        modality: Modality = "video" if first.modality == "video" else "image"
        ordinals = tuple(sample.ordinal for sample in samples)
        step = ordinals[0] // self.batch[modality]
        views = tuple(_stack(view) for view in zip(*(sample.views for sample in samples), strict=True))
        grid = self._grid(views[0])
        return Batch(
            modality=modality,
            step=step,
            ordinals=ordinals,
            keys=tuple(f"{sample.source}/{sample.key}" for sample in samples),
            views=views,
            masks=self.masks(modality, step, ordinals, grid),
            grid=grid,
            extra={name: [sample.extra.get(name) for sample in samples] for name in _names(samples)},
            rejected=tuple(record for sample in samples for record in sample.rejected),
            num_global=first.num_global,
            view_contexts=self._view_contexts(modality, step, ordinals, views),
        )

    def masks(self, modality: Modality, step: int, ordinals: Sequence[int], grid: Grid) -> tuple[Mask, ...]:
        """The masks of these clips, in the order of the configuration's names; those of one name share a context."""
        group = self._group(modality, step, ordinals)
        masks: list[Mask] = []
        for name, config in self._chosen(modality, step).items():
            context, *predicted = group_masks(
                config,
                grid,
                seed=self.seed,
                step=step,
                name=name,
                group=group,
                wanted=ordinals,
                how=self.config.truncate,
            )
            visible, first = torch.from_numpy(context), len(masks)
            for masked in predicted:
                masks.append(Mask(visible, torch.from_numpy(masked), first if len(masks) > first else None))
        return tuple(masks)

    def _view_contexts(
        self, modality: Modality, step: int, ordinals: Sequence[int], views: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """Of every view the tokens that are kept; () where all are."""
        keep = self.config.views.keep
        if keep == 1:
            return ()
        kept = [
            kept_tokens(
                math.prod(self._grid(view)),
                keep,
                seed=self.seed,
                step=step,
                name=modality,
                view=number,
                wanted=ordinals,
            )
            for number, view in enumerate(views)
        ]
        return tuple(map(torch.from_numpy, kept))

    def _chosen(self, modality: Modality, step: int) -> dict[str, BlockMaskConfig]:
        """The masks of this step: all, or as many as per_step says, a function of (seed, modality, step)."""
        named, count = self.config.of(modality), self.config.per_step
        if count is None or count >= len(named):
            return named
        chosen = rng(self.seed, "mask", modality, step).choice(len(named), size=count, replace=False)
        return {name: config for i, (name, config) in enumerate(named.items()) if i in chosen}

    def _group(self, modality: Modality, step: int, ordinals: Sequence[int]) -> range:
        """All ordinals of the mask group that holds these; groups start anew each step."""
        batch = self.batch[modality]
        size = min(self.config.group.of(modality), batch)
        start = step * batch + (ordinals[0] - step * batch) // size * size
        group = range(start, start + size)
        if ordinals[0] not in group or ordinals[-1] not in group or ordinals[-1] >= (step + 1) * batch:
            raise ValueError(
                f"{modality} ordinals {ordinals[0]}..{ordinals[-1]} reach over the mask group {start}..{group[-1]} of "
                f"step {step}: the micro-batch must divide mask.group.{modality}={size}, and that the batch {batch}"
            )
        return group

    def _grid(self, clips: Tensor) -> Grid:
        frames, height, width = clips.shape[2:]
        return max(1, frames // self.tubelet_size), height // self.patch_size, width // self.patch_size


def _stack(views: Sequence[Any]) -> Tensor:
    """The same view of all clips, or what becomes it on the device: a ViewsLater."""
    return torch.stack(list(views)) if isinstance(views[0], Tensor) else type(views[0]).stack(views)


def _names(samples: Sequence[SampleLike]) -> list[str]:
    """All names in the samples' extras, in the order of their first appearance: sources differ in what they label."""
    return list(dict.fromkeys(name for sample in samples for name in sample.extra))


def check_groups(config: MaskConfig, *, batch: Mapping[Modality, int], micro_batch: Mapping[Modality, int]) -> None:
    """Refuse sizes with which losses would depend on the split: group | batch and micro-batch | group."""
    for modality in MODALITIES:
        if not batch.get(modality):
            continue
        whole, micro = batch[modality], micro_batch[modality]
        group = min(config.group.of(modality), whole)
        if whole % group:
            raise ValueError(f"mask.group.{modality}={group} must divide the global batch batch.{modality}={whole}")
        if group % micro:
            raise ValueError(
                f"the {modality} micro-batch of {micro} clips per rank must divide mask.group.{modality}={group}: "
                "set micro_batch, the batch or the group accordingly"
            )


def micro_batches_per_step(
    config: MaskConfig,
    *,
    batch: Mapping[Modality, int],
    world: int,
    micro_batch: Mapping[Modality, int | None],
) -> int:
    """How many micro-batches every rank runs per step: as asked for, or as few as the mask groups allow.

    Sizes that do not divide are refused with the numbers: a global batch never changes silently.
    """
    active: dict[Modality, int] = {modality: batch[modality] for modality in MODALITIES if batch.get(modality)}
    if not active:
        raise ValueError("batch.video and batch.image are both 0: nothing to train on")
    for modality, whole in active.items():
        if whole % world:
            raise ValueError(f"batch.{modality}={whole} is the global batch and must divide by the {world} ranks")
    shares: dict[Modality, int] = {modality: whole // world for modality, whole in active.items()}
    asked: dict[Modality, int] = {m: size for m in active for size in [micro_batch.get(m)] if size}
    if asked:
        count = _asked_count(shares, asked)
    else:
        groups: dict[Modality, int] = {
            modality: min(config.group.of(modality), whole) for modality, whole in active.items()
        }
        fitting = (a for a in range(1, max(shares.values()) + 1) if all(_fits(shares[m], a, groups[m]) for m in active))
        count = next(fitting, None)
        if count is None:
            check_groups(
                config, batch=batch, micro_batch=groups
            )  # a group that does not divide the batch is the reason
            raise ValueError(_no_count(shares, groups))
    micro: dict[Modality, int] = {modality: share // count for modality, share in shares.items()}
    check_groups(config, batch=batch, micro_batch=micro)
    return count


def _no_count(shares: Mapping[Modality, int], groups: Mapping[Modality, int]) -> str:
    """What to say where no number of micro-batches is one for every modality."""
    whole = " ".join(f"mask.group.{modality}={share}" for modality, share in shares.items())
    several = " and ".join(f"{groups[modality]} x N {modality}" for modality in shares)
    return (
        f"a rank's share of {dict(shares)} clips a step cannot be cut into micro-batches of all modalities whose sizes "
        f"divide mask.group={dict(groups)}: set {whole}, which makes one micro-batch a step, or batches of {several} "
        "clips a rank, which make N"
    )


def _fits(share: int, count: int, group: int) -> bool:
    return share % count == 0 and group % (share // count) == 0


def _asked_count(shares: Mapping[Modality, int], asked: Mapping[Modality, int]) -> int:
    for modality, micro in asked.items():
        if micro < 1 or shares[modality] % micro:
            raise ValueError(f"micro_batch.{modality}={micro} must divide a rank's share of {shares[modality]} clips")
    counts = {modality: shares[modality] // micro for modality, micro in asked.items()}
    count = next(iter(counts.values()))
    uneven = [modality for modality, share in shares.items() if share % count]
    if len(set(counts.values())) > 1 or uneven:
        raise ValueError(
            f"micro_batch gives {counts} micro-batches per step, but every micro-batch holds every modality and a "
            f"rank's shares are {dict(shares)}: choose sizes with one common number of micro-batches"
        )
    return count
