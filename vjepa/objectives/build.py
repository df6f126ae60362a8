"""From a recipe's settings to the objective with all its networks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from vjepa.config import ModelConfig, PredictorSettings
from vjepa.hub import encoder_config, from_pretrained, load_strict
from vjepa.nn.attention import BackendName
from vjepa.nn.encoder import Encoder, EncoderConfig
from vjepa.nn.init import WEIGHT_STD
from vjepa.nn.predictor import PredictorConfig
from vjepa.objectives.config import ObjectiveConfig, TeacherConfig
from vjepa.objectives.jepa import JEPA
from vjepa.objectives.targets import FrozenTarget, target_shape, teacher_levels
from vjepa.objectives.teacher_cache import CACHE_DTYPES, TeacherCache, weights_sha256
from vjepa.registry import create_encoder, create_predictor


def build_objective(
    config: ObjectiveConfig, model: ModelConfig, predictor: PredictorSettings, *, seed: int, device: Any = None
) -> JEPA:
    """The objective as configured, initialised from the seed ("meta": shapes only).

    On "meta" a frozen teacher has no weights either: `load_teacher` fills it once there is memory.
    """
    encoder = model.encoder_config()
    return objective_of(
        config,
        encoder,
        predictor_for(config, predictor, encoder),
        attention=model.attention,
        seed=seed,
        weight_std=model.init_std,
        device=device,
    )


def objective_of(
    config: ObjectiveConfig,
    encoder: EncoderConfig,
    predictor: PredictorConfig | None,
    *,
    attention: BackendName = "auto",
    seed: int = 0,
    weight_std: float = WEIGHT_STD,
    device: Any = None,
) -> JEPA:
    """The same from the networks' own configurations."""
    how: dict[str, Any] = {"attention": attention, "seed": seed, "weight_std": weight_std, "device": device}
    student = create_encoder(encoder, **how)
    reader = None if predictor is None else create_predictor(predictor, **how)
    teacher = _teacher(config, attention, device)
    with torch.device("meta") if _is_meta(device) else nullcontext():  # for the heads
        return JEPA(config, student, reader, teacher=teacher)


def predictor_for(
    config: ObjectiveConfig, settings: PredictorSettings, encoder: EncoderConfig
) -> PredictorConfig | None:
    """The predictor's configuration, as wide as the targets and the latent are; None where nothing is predicted."""
    shape = target_shape(config.target, config.teacher, encoder, teacher_config(config))
    if shape is None:
        return None
    return replace(settings.predictor_config(encoder), target_dim=shape.width, latent_dim=config.latent.width)


def teacher_config(config: ObjectiveConfig) -> EncoderConfig | None:
    """The frozen teacher's configuration, read from where its weights lie."""
    return None if config.teacher.path is None else encoder_config(config.teacher.path)


def load_teacher(objective: JEPA, *, clips: Mapping[str, Mapping[str, str]] | None = None) -> None:
    """Fill a frozen teacher, whole or in shards, from where the recipe says its weights lie.

    `clips`: for each modality what decides the pixels of an ordinal, which objective.teacher.cache needs.
    """
    settings, target = objective.config.teacher, objective.target
    if settings.path is None:
        return
    assert isinstance(target, FrozenTarget)
    loaded = from_pretrained(settings.path)
    load_strict(target.encoder, loaded.state_dict(), source=settings.path)
    if settings.cache is not None:
        if clips is None:
            raise ValueError(
                f"objective.teacher.cache={settings.cache} needs to be told which clips: load_teacher(clips=)"
            )
        objective.cache = _cache(settings, target, loaded, clips)


def _cache(
    settings: TeacherConfig, target: FrozenTarget, loaded: Encoder, clips: Mapping[str, Mapping[str, str]]
) -> TeacherCache:
    teacher = {
        "sha256 of the weights": weights_sha256(loaded),
        "encoder": str(loaded.config),
        "levels": str([level + 1 for level in target.shape.levels]),
        "weights in": str(next(target.encoder.parameters()).dtype),
    }
    return TeacherCache(str(settings.cache), teacher=teacher, clips=clips, dtype=CACHE_DTYPES[settings.cache_dtype])


def _is_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


def _teacher(config: ObjectiveConfig, attention: BackendName, device: Any) -> FrozenTarget | None:
    found = teacher_config(config)
    if found is None or config.teacher.path is None:
        return None
    if _is_meta(device):
        with torch.device("meta"):
            teacher = Encoder(found, attention=attention)
    else:
        teacher = from_pretrained(config.teacher.path, attention=attention, device=device)
    return FrozenTarget(teacher, teacher_levels(config.teacher, found), config.teacher.precision)
