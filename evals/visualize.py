"""Pictures of what an encoder sees and of what a probe makes of it, over the frames of clips.

    python -m evals.visualize --model runs/demo/primary/exports/primary --clip video.mp4 --out pca.png
    python -m evals.visualize --model EXPORT --clip video.mp4 --out pca.mp4 [--patch 2.5,120,80]

The command shows the three main directions of the patch features as colours. Patches of one colour are alike to the
encoder. Features that tell things apart give regions that follow objects and keep their colour while they move; a
collapsed encoder gives one colour, an untrained one gives texture and position.
"""

from __future__ import annotations

import argparse
import json
import mimetypes
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from data_pipeline.clips import clip_times
from data_pipeline.decode import DecodeError, frames_at, open_decoder
from data_pipeline.transforms import make_eval_view
from evals.embed_config import GEOMETRY, Fit, make_config
from evals.models import load_model
from evals.pca import pca_images
from evals.video_pictures import picture_strip, video_pictures, write_gif, write_mp4
from vjepa.batch import normalise
from vjepa.hub import from_pretrained
from vjepa.nn.encoder import Encoder

CLASS_COLOURS = ("#4aa3df", "#f28c1e", "#3dbb72", "#d64ea1", "#f2d11e", "#8d6fe0", "#e0523f")  # of classes 1, 2, ...
TINT = 0.6  # share of the class's colour in a coloured token
INK = "#3a3f47"
SMALL = 64  # pixels along a side up to which pictures are drawn smaller


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
    columns = _spread(count, max_columns)
    pictures: dict[str, Sequence[Tensor]] = {"frame": list(frames[_middles(len(frames), count)][columns])}
    pictures |= {name: list(rgb[columns]) for name, rgb in rows.items()}
    return _picture_table(pictures, title)


def _spread(count: int, wanted: int) -> Tensor:
    """Up to `wanted` indices, evenly spaced from the first to the last of range(count)."""
    return torch.linspace(0, count - 1, min(count, wanted)).round().long()


def _middles(frames: int, count: int) -> Tensor:
    """The middle frame of each of `count` tubelets, the later of two."""
    stride = frames // count
    return torch.arange(count) * stride + stride // 2


def _picture_table(pictures: Mapping[str, Sequence[Tensor]], title: str) -> Figure:
    """One row of pictures [h, w, 3] per name, without gaps in between; small ones need less room."""
    columns = len(next(iter(pictures.values())))
    side = 0.95 if max(max(row[0].shape[:2]) for row in pictures.values()) <= SMALL else 1.3
    head = 0.35 if title else 0.0
    width, height = side * columns + 0.35, side * len(pictures) + head
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    table = figure.subplots(len(pictures), columns, squeeze=False)
    for axes, (name, row) in zip(table, pictures.items(), strict=True):
        for axis, picture in zip(axes, row, strict=True):
            _show(axis, picture)
        axes[0].set_ylabel(name, fontsize=9, color=INK)
    if title:
        figure.suptitle(title, fontsize=10, color="#1c1f24", x=0.35 / width, y=1 - 0.08 / height, ha="left", va="top")
    figure.subplots_adjust(left=0.35 / width, right=1, bottom=0, top=1 - head / height, wspace=0.04, hspace=0.04)
    return figure


def _show(axis: Axes, picture: Tensor) -> None:
    """A picture [h, w, 3] with sharp pixels and nothing around it."""
    axis.imshow(picture.numpy(), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def visualize_clip(clip: Tensor, encoders: Mapping[str, Encoder], *, title: str = "") -> Figure:
    """The picture of one clip, uint8 [C, T, H, W], with a row per encoder."""
    rows = {name: pca_images(patch_features(encoder, clip)) for name, encoder in encoders.items()}
    return pca_grid(clip.permute(1, 2, 3, 0), rows, title=title)


# ------------------------------------------------------------------------------------------------- predicted classes


def masks_figure(
    clips: Tensor, truth: Tensor, predicted: Mapping[str, Tensor], classes: Sequence[str], *, max_columns: int = 16
) -> Figure:
    """Clips, and on them in colour the true class of every token and the predicted ones of each model.

    clips: uint8 [B, C, T, H, W]; truth and every model's classes: int64 [B, t, h, w]. A clip is a block: a column per
    time step (the middle frame of the tubelet), rows for the frame alone, the truth and each model. As many clips lie
    side by side as `max_columns` allows; a clip of more steps is thinned out evenly. Class 0 and what is ignored stay
    as they are.
    """
    _check_masks(clips, truth, predicted, classes)
    layers = {"frame": torch.zeros_like(truth), "truth": truth, **predicted}
    steps = _spread(truth.shape[1], max_columns).tolist()
    frames = clips[:, :, _middles(clips.shape[2], truth.shape[1])].permute(0, 2, 3, 4, 1)  # [B, t, H, W, C]
    frames = frames.expand(*frames.shape[:-1], 3)
    blocks = [
        {name: [_tinted(frames[clip, i], labels[clip, i]) for i in steps] for name, labels in layers.items()}
        for clip in range(len(clips))
    ]
    return _block_table(blocks, classes, across=min(len(clips), max_columns // len(steps)))


def _block_table(blocks: Sequence[Mapping[str, Sequence[Tensor]]], classes: Sequence[str], *, across: int) -> Figure:
    """Blocks of named rows of pictures [h, w, 3], `across` of them side by side, under a legend of the classes."""
    names, columns = list(blocks[0]), len(next(iter(blocks[0].values())))
    side, gap, left, legend = 0.67, 0.11, 0.4, 0.28  # inches
    picture = 0.64  # of `side`: two pixels for each of a clip of 32
    block_width, block_height = columns * side + gap, len(names) * side + gap
    width = left + across * block_width - gap
    height = legend + -(-len(blocks) // across) * block_height - gap
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    for i, block in enumerate(blocks):
        x, y = left + i % across * block_width, height - legend - i // across * block_height  # its upper left corner
        for row, (name, pictures) in enumerate(block.items()):
            for column, pixels in enumerate(pictures):
                corner = ((x + column * side) / width, (y - (row + 1) * side) / height)
                axis = figure.add_axes((*corner, picture / width, picture / height))
                _show(axis, pixels)
                if i % across == column == 0:
                    axis.set_ylabel(name.replace("_", "\n"), fontsize=8, color=INK, labelpad=5)
    colours = CLASS_COLOURS[: len(classes) - 1]
    handles = [Patch(color=colour, label=name) for name, colour in zip(classes[1:], colours, strict=True)]
    place = {"loc": "upper left", "bbox_to_anchor": (left / width, 1), "borderaxespad": 0.3, "borderpad": 0}
    look = {"frameon": False, "fontsize": 8.5, "labelcolor": INK, "handlelength": 1}
    figure.legend(handles=handles, ncols=max(1, len(handles)), **place, **look)
    return figure


def _tinted(frame: Tensor, labels: Tensor) -> Tensor:
    """A frame uint8 [H, W, 3] with the tokens [h, w] of the classes from 1 on in their colour."""
    palette = torch.tensor([to_rgb(colour) for colour in ("black", *CLASS_COLOURS)]) * 255
    labels = labels.cpu().clamp_min(0)
    patch = frame.shape[0] // labels.shape[0], frame.shape[1] // labels.shape[1]
    labels = labels.repeat_interleave(patch[0], dim=0).repeat_interleave(patch[1], dim=1)  # [H, W]
    mixed = (1 - TINT) * frame + TINT * palette[labels]
    return torch.where(labels[..., None] > 0, mixed.round().byte(), frame)


def _check_masks(clips: Tensor, truth: Tensor, predicted: Mapping[str, Tensor], classes: Sequence[str]) -> None:
    if clips.dtype != torch.uint8 or clips.dim() != 5 or not len(clips) or clips.shape[1] not in (1, 3):
        raise ValueError(f"clips must be uint8 [B, 1 or 3, T, H, W], got {clips.dtype} {list(clips.shape)}")
    if len(classes) > 1 + len(CLASS_COLOURS):
        raise ValueError(
            f"{len(classes)} classes are more than the {1 + len(CLASS_COLOURS)} that colours are chosen for"
        )
    batch, _, *extent = clips.shape
    for name, labels in {"truth": truth, **predicted}.items():
        divides = labels.dim() == 4 and all(
            n and size % n == 0 for n, size in zip(labels.shape[1:], extent, strict=True)
        )
        if not divides or labels.shape != truth.shape or len(labels) != batch:
            raise ValueError(f"{name} {list(labels.shape)} does not lie on clips {list(clips.shape)} as [B, t, h, w]")
        if int(labels.max()) >= len(classes):
            raise ValueError(f"{name} holds class {int(labels.max())}, but there are {len(classes)} classes")


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
    kinds = "folder of an exported encoder, or a released .pt; for a whole video hf:FOLDER or untrained:SIZE too"
    parser.add_argument("--model", type=Path, required=True, help=kinds)
    parser.add_argument("--clip", type=Path, required=True, help="a video or an image")
    parser.add_argument(
        "--out", type=Path, default=Path("pca.png"), help="picture of a clip, or .mp4 or .gif of a whole video"
    )
    parser.add_argument("--frames", type=int, help="frames of the clip (default: as trained, else 16); images have 1")
    parser.add_argument("--fps", type=float, help="frames per second of the clip (default: as trained, else 4)")
    parser.add_argument("--size", type=int, help="height and width in pixels (default: as trained, else 256)")
    parser.add_argument("--position", type=float, default=0.5, help="where in the video: 0 its start, 1 its end")
    parser.add_argument("--level", type=int, help="0-based block to show, one with a level norm (default: the last)")
    whole = parser.add_argument_group("a whole video, by the windows of evals.embed (an .mp4 or .gif always is one)")
    whole.add_argument("--whole", action="store_true", help="a .png of steps spread over all of the video")
    whole.add_argument("--patch", type=_place, metavar="T,Y,X", help="heat of similarity with this second and pixel")
    whole.add_argument("--patch-tokens", type=_place, metavar="T,Y,X", help="the same by step, row and column")
    whole.add_argument("--foreground", action="store_true", help="colour only what the first component sets apart")
    whole.add_argument("--overlap", type=int, help="frames that windows share (default: half of --frames)")
    whole.add_argument("--fit", choices=get_args(Fit), help="centred square, whole frame, or stretched (default: crop)")
    whole.add_argument("--device", default="cpu")
    return parser


def _place(text: str) -> tuple[float, ...]:
    """T,Y,X out of the command line."""
    numbers = tuple(float(part) for part in text.split(","))
    if len(numbers) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not T,Y,X: three numbers with commas between")
    return numbers


def main(arguments: Sequence[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    is_film = options.out.suffix.lower() in (".mp4", ".gif")
    is_whole = is_film or options.whole or options.patch or options.patch_tokens
    try:
        (draw_video if is_whole else draw_clip)(options)
    except DecodeError as error:
        sys.exit(f"error: --clip {options.clip}: {error}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {options.out}")


def draw_clip(options: argparse.Namespace) -> None:
    """The picture of one clip."""
    asked = {name: value for name in GEOMETRY if (value := getattr(options, name)) is not None}
    geometry = GEOMETRY | trained_geometry(options.model) | asked
    modality = guess_modality(options.clip)
    clip = read_clip(options.clip.read_bytes(), modality, **geometry, position=options.position)
    rgb = pca_images(patch_features(from_pretrained(options.model), clip, level=options.level))
    figure = pca_grid(clip.permute(1, 2, 3, 0), rgb, title=f"{options.clip.name} seen by {options.model}")
    figure.savefig(options.out)


def draw_video(options: argparse.Namespace) -> None:
    """The film or strip of a whole video: PCA, or similarity with a patch."""
    spec = str(options.model)
    model = load_model(spec, device=options.device)
    asked = {name: getattr(options, name) for name in ("overlap", "fps", "size", "fit", "level")}
    config = make_config(model, spec, window=options.frames, dtype="fp16", **asked)
    with video_pictures(model, config, options.clip) as video:
        patch = options.patch or options.patch_tokens
        if patch:
            paint = video.similarity(patch, tokens=options.patch is None)
        else:
            paint = video.pca(foreground=options.foreground)
        suffix, count = options.out.suffix.lower(), len(video.features)
        if suffix == ".mp4":
            write_mp4(options.out, video.pictures(paint), video.fps)
        elif suffix == ".gif":
            write_gif(options.out, video.pictures(paint), video.fps, count)
        else:
            frames, painted = picture_strip(video, paint, columns=8)
            title = f"{options.clip.name} seen by {spec}"
            pca_grid(frames, {"similarity" if patch else "features": painted}, title=title).savefig(options.out)


if __name__ == "__main__":
    main()
