"""Who supplies the features to be predicted.

`online`: the encoder itself, in the same pass as its context views; gradient flows through the targets unless it is
stopped. Alone it collapses, with or without (collapse-prevention 5a): a term on the embeddings must hold it up.
`ema`: a copy of the encoder that follows it by an exponential moving average (V-JEPA 2.1, reference 1.6 and 4.3).
Targets are its levels, each layer-normed once more without affine parameters, in fp32 and without gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjepa.nn.encoder import Encoder, View


class EmaTarget(nn.Module):
    """The target encoder. Its parameters are fp32, need no gradient and change only through `update`."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).float().requires_grad_(False)

    @torch.no_grad()
    def forward(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """Clips [B, C, T, H, W] float, one entry per modality -> targets [B, N, L*D] fp32, in one pass."""
        outputs = self.encoder.forward_levels([View(views) for views in clips])
        return [normalise_levels(levels[0], len(self.encoder.levels)) for levels in outputs]

    @torch.no_grad()
    def start_from(self, encoder: Encoder) -> None:
        """target <- encoder."""
        for mine, theirs in zip(self.encoder.parameters(), encoder.parameters(), strict=True):
            mine.copy_(theirs)

    @torch.no_grad()
    def update(self, encoder: Encoder, momentum: float) -> None:
        """target <- momentum * target + (1 - momentum) * encoder, over all parameters in one foreach call."""
        student = [parameter.detach() for parameter in encoder.parameters()]
        targets: list[Tensor] = list(self.encoder.parameters())
        torch._foreach_lerp_(targets, student, 1.0 - momentum)  # pyright: ignore[reportPrivateImportUsage]


def normalise_levels(tokens: Tensor, num_levels: int) -> Tensor:
    """LayerNorm without affine (eps 1e-5) of each level's slice: [B, N, L*D] -> the same shape, fp32."""
    slices = tokens.float().unflatten(-1, (num_levels, -1))
    return F.layer_norm(slices, slices.shape[-1:]).flatten(-2)
