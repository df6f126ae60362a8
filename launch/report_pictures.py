"""What the encoder of a run sees: pictures of its features on a few clips of the run's own data."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

from data_pipeline.decode import DecodeError
from data_pipeline.shards import ShardError
from data_pipeline.sources import Records, open_source
from data_pipeline.stream import is_stream
from evals.visualize import read_clip, visualize_clip
from launch.config import RunConfig
from launch.report_run import Run
from vjepa.hub import from_pretrained
from vjepa.nn.encoder import Encoder
from vjepa.registry import create_encoder

NUM_CLIPS = 4
LOOKED_AT = 36  # records among which clips of different videos are looked for
MIN_PATCHES = 14  # along a side of the pictures: a model that extrapolates, trained on fewer, is shown larger clips
CHEAP_PARAMETERS = 100_000_000  # up to this size the untrained encoder is shown beside the trained one


def pca_figures(run: Run) -> tuple[dict[str, Figure], list[str]]:
    """A picture per clip with the exported encoder's features, and a note for each that could not be made."""
    if not (run.export / "config.json").is_file():
        return {}, [f"no pictures of features: the run has not exported an encoder to {run.export} yet"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoders: dict[str, Encoder] = {"trained": from_pretrained(run.export, device=device)}
    if sum(p.numel() for p in encoders["trained"].parameters()) <= CHEAP_PARAMETERS:
        untrained = create_encoder(
            encoders["trained"].config,
            seed=run.config.train.seed,
            weight_std=run.config.model.init_std,
            device=device,
        )
        encoders["untrained"] = untrained.eval()
    try:
        clips, notes = _clips(run.config)
    except ShardError as error:
        return {}, [f"no pictures of features: {error}"]
    return {caption: visualize_clip(clip, encoders) for caption, clip in clips.items()}, notes


def _clips(config: RunConfig) -> tuple[dict[str, Tensor], list[str]]:
    """A few clips of the run's videos, of different videos where there are some, as uint8 [C, T, H, W]."""
    known = {name: source for name, source in config.data.video.sources.items() if not is_stream(source.path)}
    sources = [(name, open_source(each.path, "video", remote=config.data.remote)) for name, each in known.items()]
    records = [(name, records, index) for name, records in sources for index in _of_different_videos(records)]
    geometry = config.data.video.clip
    size = _picture_size(config)
    clips: dict[str, Tensor] = {}
    notes = [] if records else ["no pictures of features: the run has no video source, or a stream only"]
    for name, source, index in [records[i] for i in _spread(len(records), NUM_CLIPS)]:
        data, row = source.read(index)
        caption = f"{name} / {row['key']} at {size} px (trained at {geometry.size})"
        try:
            clips[caption] = read_clip(data, "video", frames=geometry.frames, fps=geometry.fps, size=size, position=0.5)
        except DecodeError as error:
            notes.append(f"no picture of {caption}: {error}")
    return clips, notes


def _picture_size(config: RunConfig) -> int:
    """Pixels along a side: a multiple of the trained size that gives MIN_PATCHES, where the model can extrapolate.

    Fixed absolute positions have not been seen beyond the trained grid: such a model is shown what it was trained on.
    """
    size = config.data.video.clip.size
    if config.model.absolute_position > 0:
        return size
    return size * -(-MIN_PATCHES * config.model.patch_size // size)


def _of_different_videos(records: Records) -> list[int]:
    """Up to NUM_CLIPS records out of a few dozen, evenly spaced, each cut from another video as far as possible."""
    candidates = _spread(len(records), LOOKED_AT)
    first_of: dict[str, int] = {}
    for index in candidates:
        first_of.setdefault(records.row(index)["source_path"], index)
    firsts = list(first_of.values())
    if len(firsts) >= NUM_CLIPS:
        return [firsts[i] for i in _spread(len(firsts), NUM_CLIPS)]
    return sorted([*firsts, *(index for index in candidates if index not in firsts)][:NUM_CLIPS])


def _spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` indices, evenly spaced in range(count)."""
    wanted = min(wanted, count)
    return [count * (2 * i + 1) // (2 * wanted) for i in range(wanted)]
