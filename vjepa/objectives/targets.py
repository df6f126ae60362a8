"""Who supplies the features to be predicted.

`ema`: a copy of the encoder that follows it by an exponential moving average (V-JEPA 2.1, reference 1.6 and 4.3).
`frozen`: another encoder, trained before, that never changes: distillation, and the second stage of SALT.
`pixels`: the clip itself, patch by patch: the first stage of SALT (arXiv 2509.24317), a masked autoencoder.
`online`: the encoder itself, in the same pass as its context views; gradient flows through the targets unless it is
stopped. Alone it collapses, with or without (collapse-prevention 5a): a term on the embeddings must hold it up.
`none`: nothing is predicted and there is no predictor; terms compare embeddings of several views (LeJEPA).

Targets are levels side by side, each layer-normed once more without affine parameters, in fp32 and without gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjepa.nn.encoder import Encoder, EncoderConfig, View
from vjepa.objectives.average import follower_of
from vjepa.objectives.config import TargetName, TeacherConfig, WeightPrecision

WEIGHT_DTYPES: dict[WeightPrecision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TargetShape:
    """What is predicted of each token: levels side by side, targets are [B, N, L*D]."""

    levels: tuple[int, ...]  # 0-based blocks; -1: the pixels before the first
    level_dim: int

    @property
    def num_levels(self) -> int:
        return len(self.levels)

    @property
    def width(self) -> int:
        return self.num_levels * self.level_dim


class EmaTarget(nn.Module):
    """The target encoder, a follower of the trained one: see average.py."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = follower_of(encoder)
        self.shape = TargetShape(encoder.levels, encoder.embed_dim)

    @torch.no_grad()
    def forward(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """Clips [B, C, T, H, W] float, one entry per modality -> targets [B, N, L*D] fp32, in one pass."""
        outputs = self.encoder.forward_levels([View(views) for views in clips])
        return [normalise_levels(levels[0], self.shape.num_levels) for levels in outputs]


class FrozenTarget(nn.Module):
    """A teacher of any width and depth on the student's token grid; `levels` are 0-based blocks that have a norm.

    Weights held in bf16 compute in bf16, under autocast or without; targets are normalised in fp32 all the same.
    """

    def __init__(self, teacher: Encoder, levels: Sequence[int], precision: WeightPrecision = "fp32") -> None:
        super().__init__()
        self.encoder = teacher.to(WEIGHT_DTYPES[precision]).requires_grad_(False)
        self.chosen = [teacher.levels.index(level) for level in levels]
        self.shape = TargetShape(tuple(levels), teacher.embed_dim)

    @torch.no_grad()
    def forward(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """Clips [B, C, T, H, W] float, one entry per modality -> targets [B, N, L*D] fp32, in one pass."""
        outputs = self.encoder.forward_levels([View(views) for views in clips])
        return [normalise_levels(self._choose(levels[0]), self.shape.num_levels) for levels in outputs]

    def _choose(self, tokens: Tensor) -> Tensor:
        parts = tokens.chunk(len(self.encoder.levels), dim=-1)
        return torch.cat([parts[index] for index in self.chosen], dim=-1)


class PixelTarget(nn.Module):
    """The pixels of each token's tubelet, normalised by its own mean and deviation (arXiv 2203.12602, section 3.2)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.patch_size, self.tubelet_size = config.patch_size, config.tubelet_size
        self.shape = TargetShape((-1,), config.in_chans * config.tubelet_size * config.patch_size**2)

    @torch.no_grad()
    def forward(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """Clips [B, C, T, H, W] float, one entry per modality -> targets [B, N, C * tubelet * patch^2] fp32."""
        return [normalise_levels(self._patches(views), 1) for views in clips]

    def _patches(self, clips: Tensor) -> Tensor:
        """Tokens in (t, h, w) order; a single frame is repeated to a tubelet, so that all modalities have one width."""
        if clips.shape[2] == 1:
            clips = clips.expand(-1, -1, self.tubelet_size, -1, -1)
        sizes = ((2, self.tubelet_size), (4, self.patch_size), (6, self.patch_size))
        for dim, size in sizes:
            clips = clips.unflatten(dim, (-1, size))  # at last [B, C, t, tubelet, h, patch, w, patch]
        return clips.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


Target = EmaTarget | FrozenTarget | PixelTarget


def normalise_levels(tokens: Tensor, num_levels: int) -> Tensor:
    """LayerNorm without affine (eps 1e-5) of each level's slice: [B, N, L*D] -> the same shape, fp32."""
    slices = tokens.float().unflatten(-1, (num_levels, -1))
    return F.layer_norm(slices, slices.shape[-1:]).flatten(-2)


def teacher_levels(config: TeacherConfig, teacher: EncoderConfig) -> list[int]:
    """The teacher's 0-based blocks that are predicted; those without a norm of their own are refused."""
    if config.levels is None:
        return list(teacher.levels)
    asked = [(teacher.depth if level == -1 else level) - 1 for level in config.levels]
    without = [level + 1 for level in asked if level not in teacher.levels]
    if without or len(set(asked)) < len(asked):
        raise ValueError(
            f"objective.teacher.levels={config.levels}: the teacher {config.path} has levels "
            f"{[level + 1 for level in teacher.levels]} (blocks, from 1); name some of them, each once"
        )
    return asked


def check_teacher(config: TeacherConfig, teacher: EncoderConfig, student: EncoderConfig) -> None:
    """Refuse a teacher whose tokens are cut otherwise than the student's: they must lie on one grid."""
    for name in ("patch_size", "tubelet_size", "in_chans"):
        theirs, mine = getattr(teacher, name), getattr(student, name)
        if theirs != mine:
            raise ValueError(
                f"objective.teacher.path={config.path}: its {name} is {theirs}, the student's is {mine}; both must cut "
                "a clip into the same tokens: change model.patch_size and tubelet_size, or take another teacher"
            )


def target_shape(
    target: TargetName, teacher: TeacherConfig, student: EncoderConfig, teacher_config: EncoderConfig | None
) -> TargetShape | None:
    """What is predicted for each token; None where nothing is."""
    if target == "none":
        return None
    if target == "pixels":
        return PixelTarget(student).shape
    if target == "frozen":
        assert teacher_config is not None
        check_teacher(teacher, teacher_config, student)
        return TargetShape(tuple(teacher_levels(teacher, teacher_config)), teacher_config.embed_dim)
    return TargetShape(student.levels, student.embed_dim)
