"""Pixels to tokens: one linear patch embedding per modality, plus a learned modality embedding (2.1, section 1.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjepa.batch import Grid, Modality


class Tokenizer(nn.Module):
    """Video clips by tubelets of `tubelet_size` frames, single frames by an own one-frame embedding.

    Without an image embedding (V-JEPA 2), a single frame is repeated to a whole tubelet.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        patch_size: int = 16,
        tubelet_size: int = 2,
        in_chans: int = 3,
        image_tokenizer: bool = True,
        modality_embed: bool = True,
    ) -> None:
        super().__init__()
        self.patch_size, self.tubelet_size = patch_size, tubelet_size

        def embedding(frames: int) -> nn.Conv3d:
            kernel = (frames, patch_size, patch_size)
            return nn.Conv3d(in_chans, embed_dim, kernel_size=kernel, stride=kernel)

        self.video = embedding(tubelet_size)
        self.image = embedding(1) if image_tokenizer else None
        self.video_embed = nn.Parameter(torch.empty(embed_dim)) if modality_embed else None
        self.image_embed = nn.Parameter(torch.empty(embed_dim)) if modality_embed else None

    def modality(self, clips: Tensor) -> Modality:
        """Which way clips [B, C, T, H, W] go: one frame is an image where there is an image embedding."""
        return "image" if clips.shape[2] == 1 and self.image is not None else "video"

    def grid(self, clips: Tensor) -> Grid:
        """The token grid (t, h, w) of clips [B, C, T, H, W]; sizes that leave a rest are refused."""
        if clips.ndim != 5:
            raise ValueError(f"clips must be [B, C, T, H, W], got shape {tuple(clips.shape)}; an image has T = 1")
        frames, height, width = clips.shape[2:]
        for name, pixels in (("height", height), ("width", width)):
            if pixels < self.patch_size or pixels % self.patch_size:
                raise ValueError(f"clip {name} {pixels} is not a multiple of patch_size {self.patch_size}")
        if frames > 1 and frames % self.tubelet_size:
            raise ValueError(f"{frames} frames are not a multiple of tubelet_size {self.tubelet_size}")
        return max(1, frames // self.tubelet_size), height // self.patch_size, width // self.patch_size

    def forward(self, clips: Tensor) -> Tensor:
        """clips: [B, C, T, H, W] float -> tokens [B, N, D] in (t, h, w) order, modality embedding added."""
        self.grid(clips)  # refuses what does not fit
        if self.modality(clips) == "image":
            assert self.image is not None
            return self._embed(clips, self.image, self.image_embed)
        if clips.shape[2] == 1:
            clips = clips.expand(-1, -1, self.tubelet_size, -1, -1)
        return self._embed(clips, self.video, self.video_embed)

    def _embed(self, clips: Tensor, projection: nn.Conv3d, modality_embed: Tensor | None) -> Tensor:
        clips = clips.to(projection.weight.dtype)
        tokens = as_product(clips, projection) if clips.is_cuda else projection(clips).flatten(2).transpose(1, 2)
        return tokens if modality_embed is None else tokens + modality_embed.to(tokens.dtype)


def as_product(clips: Tensor, projection: nn.Conv3d) -> Tensor:
    """What a convolution whose stride is its kernel computes, as one matrix product: [B, C, T, H, W] -> [B, N, D].

    For GPUs: in bf16 cuDNN's convolution over three axes took 13.7 of the 393 ms of a ViT-L's step on an H200.
    """
    for axis, length in zip((2, 4, 6), projection.kernel_size, strict=True):
        clips = clips.unflatten(axis, (-1, length))
    patches = clips.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)  # [B, N, C * frames * patch * patch]
    return F.linear(patches, projection.weight.flatten(1), projection.bias)
