"""See what an encoder sees: the three main directions of its patch features as colours, over the frames of a clip.

    python -m evals.visualize --model runs/demo/exports/primary --clip video.mp4 --out pca.png

Patches of one colour are alike to the encoder. Features that tell things apart give regions that follow objects and
keep their colour while they move; a collapsed encoder gives one colour, an untrained one gives texture and position.
"""

from __future__ import annotations

import argparse
import json
import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from data_pipeline.clips import clip_times
from data_pipeline.decode import frames_at, open_decoder
from data_pipeline.transforms import make_eval_view
from vjepa.batch import normalise
from vjepa.hub import from_pretrained
from vjepa.nn.encoder import Encoder

GEOMETRY: dict[str, Any] = {"frames": 16, "fps": 4.0, "size": 256}
ROBUST_RANGE = (0.01, 0.99)  # quantiles that become black and full colour: single odd patches would grey out the rest


def read_clip(data: bytes, modality: str, *, frames: int, fps: float, size: int, position: float = 0.5) -> Tensor:
    """A clip of media bytes: uint8 [C, T, size, size], the centred square; T is 1 for an image.

    `position` in [0, 1] slides the clip from the record's start to its end. Raises DecodeError for damaged bytes.
    """
    decoder = open_decoder(data, modality)
    times = clip_times(decoder.info, 1 if modality == "image" else frames, fps, position)
    return make_eval_view(frames_at(decoder, times), size)


@torch.no_grad()
def patch_features(encoder: Encoder, clip: Tensor, *, level: int | None = None) -> Tensor:
    """Features of one clip, uint8 [C, T, H, W] -> [t, h, w, D], of a 0-based level (default: the last)."""
    _, frames, height, width = clip.shape
    if height % encoder.patch_size or width % encoder.patch_size:
        raise ValueError(f"size {height}x{width} must be a multiple of the model's patch size, {encoder.patch_size}")
    if frames > 1 and frames % encoder.tubelet_size:
        raise ValueError(f"frames={frames} must be 1 or a multiple of the model's tubelet size, {encoder.tubelet_size}")
    indices = [encoder.levels[-1] if level is None else level]
    (features,) = encoder.forward_intermediates(normalise(clip[None]), indices=indices, output_fmt="NCTHW")
    return features[0].permute(1, 2, 3, 0).float()


def pca_images(tokens: Tensor) -> Tensor:
    """The first three principal components of all tokens of a clip as colours: [T, h, w, D] -> [T, h, w, 3] in 0..1.

    The sign of a component is that of its largest loading, so the same features always give the same picture.
    """
    if tokens.dim() != 4 or not tokens.isfinite().all():
        raise ValueError(f"tokens must be finite and [T, h, w, D], got {list(tokens.shape)}")
    flat = tokens.reshape(-1, tokens.shape[-1]).double()
    centred = flat - flat.mean(dim=0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    axes = vectors[:, -3:].flip(1)  # [D, <=3], the strongest first
    signs = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    colours = _robust_range(centred @ (axes * signs))
    missing = 3 - colours.shape[1]
    colours = torch.cat([colours, colours.new_full((len(colours), missing), 0.5)], dim=1)
    return colours.reshape(*tokens.shape[:3], 3).float()


def _robust_range(values: Tensor) -> Tensor:
    """Each column stretched to 0..1 between its quantiles [N, k]; a constant column becomes 0.5."""
    low, high = torch.quantile(values, torch.tensor(ROBUST_RANGE, dtype=values.dtype), dim=0)
    span = high - low
    is_flat = span <= 1e-9 * values.abs().amax(dim=0).clamp_min(1e-12)
    scaled = ((values - low) / torch.where(is_flat, 1, span)).clamp(0, 1)
    return torch.where(is_flat, 0.5, scaled)


def pca_grid(frames: Tensor, rows: Mapping[str, Tensor] | Tensor, *, title: str = "", max_columns: int = 8) -> Figure:
    """A figure: the middle frame of every tubelet, and under it one row of PCA colours per encoder.

    frames: uint8 [T, H, W, 3]; rows: name -> [t, h, w, 3] in 0..1 (or one such tensor), of a common t that divides T.
    More than `max_columns` tubelets are thinned out evenly.
    """
    rows = {"features": rows} if isinstance(rows, Tensor) else rows
    tubelets = {len(rgb) for rgb in rows.values()}
    if len(tubelets) != 1 or frames.shape[0] % min(tubelets):
        raise ValueError(f"{frames.shape[0]} frames do not fit rows of {sorted(tubelets)} tubelets")
    count = tubelets.pop()
    columns = np.unique(np.linspace(0, count - 1, min(count, max_columns)).round().astype(int))
    stride = frames.shape[0] // count
    pictures: dict[str, Sequence[Tensor]] = {"frame": [frames[stride * i + stride // 2] for i in columns]}
    pictures |= {name: [rgb[i] for i in columns] for name, rgb in rows.items()}
    return _picture_table(pictures, title)


def _picture_table(pictures: Mapping[str, Sequence[Tensor]], title: str) -> Figure:
    """One row of pictures [h, w, 3] per name, without gaps in between."""
    columns = len(next(iter(pictures.values())))
    head = 0.35 if title else 0.0
    width, height = 1.3 * columns + 0.35, 1.3 * len(pictures) + head
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    table = figure.subplots(len(pictures), columns, squeeze=False)
    for axes, (name, row) in zip(table, pictures.items(), strict=True):
        for axis, picture in zip(axes, row, strict=True):
            axis.imshow(picture.numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        axes[0].set_ylabel(name, fontsize=9, color="#3a3f47")
    if title:
        figure.suptitle(title, fontsize=10, color="#1c1f24", x=0.35 / width, y=1 - 0.08 / height, ha="left", va="top")
    figure.subplots_adjust(left=0.35 / width, right=1, bottom=0, top=1 - head / height, wspace=0.04, hspace=0.04)
    return figure


def visualize_clip(clip: Tensor, encoders: Mapping[str, Encoder], *, title: str = "") -> Figure:
    """The picture of one clip, uint8 [C, T, H, W], with a row per encoder."""
    rows = {name: pca_images(patch_features(encoder, clip)) for name, encoder in encoders.items()}
    return pca_grid(clip.permute(1, 2, 3, 0), rows, title=title)


def trained_geometry(model: Path) -> dict[str, Any]:
    """Frames, fps and size of the clips that an exported encoder was trained on, as far as its config.json says so."""
    config = model / "config.json"
    trained_on = json.loads(config.read_text()).get("pretraining", {}) if config.is_file() else {}
    return {name: trained_on[name] for name in GEOMETRY if name in trained_on}


def guess_modality(path: Path) -> str:
    """`image` where the file's ending says so, otherwise `video`."""
    return "image" if (mimetypes.guess_type(path.name)[0] or "").startswith("image/") else "video"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evals.visualize", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of an exported encoder, or a released .pt")
    parser.add_argument("--clip", type=Path, required=True, help="a video or an image")
    parser.add_argument("--out", type=Path, default=Path("pca.png"), help="picture to write")
    parser.add_argument("--frames", type=int, help="frames of the clip (default: as trained, else 16); images have 1")
    parser.add_argument("--fps", type=float, help="frames per second of the clip (default: as trained, else 4)")
    parser.add_argument("--size", type=int, help="height and width in pixels (default: as trained, else 256)")
    parser.add_argument("--position", type=float, default=0.5, help="where in the video: 0 its start, 1 its end")
    parser.add_argument("--level", type=int, help="0-based block to show, one with a level norm (default: the last)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    asked = {name: value for name in GEOMETRY if (value := getattr(options, name)) is not None}
    geometry = GEOMETRY | trained_geometry(options.model) | asked
    modality = guess_modality(options.clip)
    clip = read_clip(options.clip.read_bytes(), modality, **geometry, position=options.position)
    rgb = pca_images(patch_features(from_pretrained(options.model), clip, level=options.level))
    figure = pca_grid(clip.permute(1, 2, 3, 0), rgb, title=f"{options.clip.name} seen by {options.model}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
