"""What is learned, as a recipe says it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Literal

from vjepa.batch import Modality
from vjepa.nn.latent import LatentConfig
from vjepa.objectives.embeddings import EmbeddingConfig

log = logging.getLogger(__name__)
USUAL_MOMENTUM = (0.99, 0.9999)

TargetName = Literal["ema", "frozen", "online", "pixels", "none"]
WeightPrecision = Literal["fp32", "bf16"]


def _default_terms() -> dict[str, Any]:
    return {"masked_prediction": {}, "context_prediction": {}}


@dataclass
class TeacherConfig:
    """The encoder whose features are predicted where objective.target=frozen."""

    path: str | None = None  # an exported folder (RUN/exports/STAGE) or a released .pt file
    levels: list[int] | None = None  # its blocks that are predicted, from 1; -1: the last; null: all of its levels
    precision: WeightPrecision = "fp32"  # of its weights; bf16 halves their memory, and they compute in bf16
    cache: str | None = None  # folder that keeps its targets, for other students and runs over the same clips
    cache_dtype: Literal["fp32", "bf16"] = "fp32"  # they are rounded to it, read or computed; bf16 halves the folder

    def __post_init__(self) -> None:
        if self.levels is not None and any(level < 1 and level != -1 for level in self.levels or [0]):
            raise ValueError(f"objective.teacher.levels={self.levels}: recipes count blocks from 1; -1 is the last one")


@dataclass
class ObjectiveConfig:
    """What is learned."""

    target: TargetName = "ema"  # who supplies the targets: see vjepa/objectives/targets.py
    stop_gradient: bool = False  # online only: no gradient through the targets; the others have none
    momentum: float = 0.99925  # of the EMA target at step 0
    momentum_end: float | None = None  # at the last step, linear in between; null keeps it constant
    average: float | None = None  # momentum of the encoder's average, the export; null: none; ema's target is its own
    teacher: TeacherConfig = field(default_factory=TeacherConfig)  # frozen only
    latent: LatentConfig = field(default_factory=LatentConfig)  # what the context cannot tell the predictor
    video_weight: float = 0.5  # share of video in the loss, as the reference's half of the ranks
    image_weight: float = 0.5  # share of images in the loss
    embeddings: dict[str, EmbeddingConfig] = field(default_factory=dict)  # NAME: for terms that say `shared: NAME`
    terms: dict[str, Any] = field(default_factory=_default_terms)  # NAME: options, see vjepa/objectives/terms.py

    def __post_init__(self) -> None:
        if self.stop_gradient and self.target != "online":
            raise ValueError(f"objective.stop_gradient=true is for target=online; {self.target} has no gradient anyway")
        for name in ("momentum", "momentum_end"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"objective.{name}={value} must be between 0 and 1")
        if self.target == "ema":
            self._warn_of_momentum()
        self._check_average()
        self._check_teacher()
        if self.target == "none" and self.latent.kind != "none":
            raise ValueError(
                f"objective.latent.kind={self.latent.kind} is for a predictor, and objective.target=none has none"
            )
        if min(self.video_weight, self.image_weight) < 0 or self.video_weight + self.image_weight == 0:
            raise ValueError("objective.video_weight and image_weight must not be negative, and not both 0")

    @property
    def exported(self) -> str:
        """Which module of the objective a run is made for; checkpoints name it so: model.EXPORTED.*."""
        if self.target == "ema":
            return "target.encoder"
        return "encoder" if self.average is None else "average"

    def _check_average(self) -> None:
        if self.average is None:
            return
        if self.target == "ema":
            raise ValueError(
                f"objective.average={self.average} is not for target=ema, which is an average of the encoder "
                "already, and is exported: set objective.momentum, and objective.average=null"
            )
        if not 0 <= self.average < 1:
            raise ValueError(
                f"objective.average={self.average} must be at least 0 and below 1; with 1 it would never move"
            )

    def _check_teacher(self) -> None:
        if self.target == "frozen" and self.teacher.path is None:
            raise ValueError(
                "objective.target=frozen needs objective.teacher.path: an exported folder (RUN/exports/STAGE) or a "
                "released .pt file"
            )
        if self.target != "frozen" and self.teacher.path is not None:
            raise ValueError(
                f"objective.teacher.path={self.teacher.path} is read with objective.target=frozen, not {self.target}"
            )
        if self.target != "frozen" and (self.teacher.cache, self.teacher.cache_dtype) != (None, "fp32"):
            raise ValueError(
                f"objective.teacher.cache={self.teacher.cache} and cache_dtype={self.teacher.cache_dtype} are for "
                f"objective.target=frozen, not {self.target}: its targets change, or cost nothing; leave them out"
            )

    def _warn_of_momentum(self) -> None:
        low, high = USUAL_MOMENTUM
        is_ramp = self.momentum_end is not None and self.momentum_end > self.momentum  # I-JEPA's ends at 1
        unusual = [value for value in (self.momentum, self.momentum_end) if value is not None and value < low]
        unusual += [self.momentum] if self.momentum > high and not is_ramp else []
        for value in unusual:
            log.warning(
                "objective.momentum=%g is outside %g to %g, where EMA targets are known to learn: explore 0.99 to "
                "0.9995, above 0.999 for video; larger batches bear lower values",
                *(value, low, high),
            )

    def modality_weight(self, modality: Modality) -> float:
        return self.video_weight if modality == "video" else self.image_weight
