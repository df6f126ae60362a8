"""One step of every objective of the recipes, on made clips: what each rank, or one process alone, computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

import vjepa
from launch.config import RunConfig, load_config
from vjepa.batch import Batch, Modality
from vjepa.masking.collate import MaskCollator
from vjepa.objectives import JEPA, build_objective
from vjepa.objectives.checks import freeze_unused
from vjepa.train.distributed import World, init_world
from vjepa.train.parallel import ParallelConfig, full, parallelise

BATCH = 8
LOCAL = ("data.video.clip.local.size=32", "data.image.clip.local.size=32")
# Options by name, each over the debug recipe, and what else it needs there. "v-jepa-2.1" is the recipe itself.
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "v-jepa-2.1": (),
    "vjepa2": (),
    "ijepa": (),
    "sigreg": (),
    "vicreg": (),
    "visreg": (),
    "lejepa": LOCAL,
    "levjepa": LOCAL,
    "salt_teacher": (),
    "salt": ("objective.teacher.path=TEACHER",),
    "distill": ("objective.teacher.path=TEACHER",),
    "latent": ("objective.terms.context_prediction=null",),  # which only sets in, so that the loss rises
}
Mode = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Case:
    objective: str
    mode: Mode
    built_before_the_group: bool

    def __str__(self) -> str:
        return f"{self.objective}-{self.mode}{'-early' if self.built_before_the_group else ''}"


@dataclass(frozen=True)
class Found:
    """The mean over ranks of the loss, and the averaged gradient."""

    loss: float
    gradient: Tensor


def options(name: str) -> list[str]:
    """Named options of an objective."""
    return [] if name == "v-jepa-2.1" else [name]


def overrides(name: str, teacher: Path) -> list[str]:
    """What an objective needs on the debug recipe."""
    return [value.replace("TEACHER", str(teacher)) for value in OBJECTIVES[name]]


def configure(name: str, teacher: Path) -> RunConfig:
    config = load_config("debug", "primary", ["run_dir=unused", *overrides(name, teacher)], options=options(name))
    batch = {m: BATCH if size else 0 for m, size in vars(config.train.batch).items()}
    return replace(config, train=replace(config.train, batch=replace(config.train.batch, **batch)))


def save_teacher(folder: Path) -> Path:
    """A teacher that is alive, of the debug encoder's grid."""
    return vjepa.hub.save_pretrained(vjepa.create_model("vit_debug", seed=9), folder)


@dataclass(frozen=True)
class MadeSample:
    """A clip of noise in blobs, with the views that a recipe asks for."""

    ordinal: int
    modality: str
    views: tuple[Tensor, ...]
    num_global: int
    source: str = "made"
    key: str = "clip"
    extra: dict[str, Any] = field(default_factory=dict)
    rejected: tuple[Any, ...] = ()


def make_sample(config: RunConfig, modality: Modality, ordinal: int) -> MadeSample:
    clip = config.data.video.clip if modality == "video" else config.data.image.clip
    generator = torch.Generator().manual_seed(1000 * ordinal + (modality == "image"))
    shapes = [(clip.frames, clip.size)] * clip.views + [(clip.frames, clip.local.size)] * clip.local.views
    views = tuple(torch.randint(256, (3, t, size, size), generator=generator).to(torch.uint8) for t, size in shapes)
    return MadeSample(ordinal, modality, views, clip.views)


def make_batch(config: RunConfig, ordinals: Sequence[int]) -> dict[Modality, Batch]:
    sizes = config.train.batch.as_dict()
    collate = MaskCollator(
        config.masks,
        seed=0,
        batch=sizes,
        patch_size=config.model.patch_size,
        tubelet_size=config.model.tubelet_size,
    )
    return {m: collate([make_sample(config, m, ordinal) for ordinal in ordinals]) for m in sizes}


def build(config: RunConfig) -> JEPA:
    objective = build_objective(config.objective, config.model, config.predictor, seed=0)
    freeze_unused(objective, list(config.train.batch.as_dict()))
    return objective


def alone(name: str, teacher: Path) -> Found:
    """One process with the whole batch."""
    config = configure(name, teacher)
    objective = build(config)
    return _step(objective, objective, make_batch(config, range(BATCH)))


def together(cases: Sequence[Case], teacher: Path) -> list[Found]:
    """All cases on this rank."""
    configs = {case.objective: configure(case.objective, teacher) for case in cases}
    early = {case: build(configs[case.objective]) for case in cases if case.built_before_the_group}
    with init_world("cpu") as world:
        return [_on_rank(case, configs[case.objective], early, world) for case in cases]


def _on_rank(case: Case, config: RunConfig, early: Mapping[Case, JEPA], world: World) -> Found:
    objective = early.get(case) or build(config)
    module = parallelise(objective, ParallelConfig(mode=case.mode), world, precision="fp32")
    share = BATCH // world.size
    return _step(objective, module, make_batch(config, range(world.rank * share, (world.rank + 1) * share)))


def _step(objective: JEPA, module: torch.nn.Module, batch: Mapping[Modality, Batch]) -> Found:
    loss = module(batch, 3).loss
    loss.backward()
    trained = [p for p in objective.parameters() if p.requires_grad]
    gradients = [full(p.grad).flatten() for p in trained if p.grad is not None]
    assert len(gradients) == len(trained), "a trained parameter got no gradient"
    mean = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return Found(mean.item(), torch.cat(gradients).clone())
