"""Video object segmentation: masks that frozen features carry from frame to frame, and J and F of masks on disk.

    python -m evals.tasks.tracking run --model PATH --data DIR --dataset davis2017 --out DIR [top_k=5 ...]
    python -m evals.tasks.tracking score --predictions DIR --ground-truth DIR

Nothing is trained. `run` leaves OUT/masks/DATASET/MODEL/VIDEO/FRAME.png, a picture of every video, and its rows in
OUT/evals/results.jsonl and OUT/summary.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from omegaconf import OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from evals.features import EncoderFeatures, FeatureSource, PixelFeatures
from evals.jf import ObjectScore, SequenceScorer, mean_scores, youtube_vos_means
from evals.overlays import tracking_picture
from evals.propagation import PRESETS, PropagationConfig, hold, propagate
from evals.protocol import RGB, TRAINED, UNTRAINED, Row, Score
from evals.references import RANDOM_PATCHES, RGB_PATCHES, RandomPatches, RgbPatches
from evals.results import print_wide, save
from evals.videos import (
    AnnotatedVideo,
    DatasetError,
    DatasetName,
    listing,
    mask_folders,
    open_dataset,
    read_mask,
    seen_categories,
    write_mask,
)
from vjepa.config import resolve
from vjepa.hub import encoder_config, from_pretrained
from vjepa.nn.encoder import EncoderConfig
from vjepa.registry import create_encoder, list_models, model_config
from vjepa.train.distributed import ALONE, World

MEAN = "mean"  # what stands for the sequence in the last line of `score`
TASK, PROBE = "tracking", "propagation"
HELD_MASK = "held_mask"
REFERENCES = (UNTRAINED, RGB, RGB_PATCHES, RANDOM_PATCHES, HELD_MASK)
DEFAULT_SIZE = "vit_small"  # of `untrained` where no trained encoder says which


# ---------------------------------------------------------------------------------------------------- masks on disk


def score_video(video: AnnotatedVideo, predicted: Callable[[str], np.ndarray]) -> list[ObjectScore]:
    """J and F of every object; `predicted` gives the ids of a frame by its name, and is asked for those that count."""
    scorer = _scorer(video)
    for index, frame in enumerate(video.masks):
        scorer.add(index, video.mask(frame), predicted(frame) if scorer.is_scored(index) else None)
    return scorer.scores()


def _scorer(video: AnnotatedVideo) -> SequenceScorer:
    return SequenceScorer(video.name, video.object_ids, len(video.masks), protocol=video.protocol, void=video.void)


def check_predictions(videos: Sequence[AnnotatedVideo], predictions: Path) -> None:
    """Raise DatasetError that names the sequences and frames which are to be scored but were not predicted."""
    if absent := [video.name for video in videos if not (predictions / video.name).is_dir()]:
        raise DatasetError(
            f"{predictions} lacks {len(absent)} of {len(videos)} sequences: {listing(absent)}. Masks lie in it as "
            "SEQUENCE/00000.png; --sequences names those that are to be scored"
        )
    for video in videos:
        scorer = _scorer(video)
        wanted = [f"{frame}.png" for index, frame in enumerate(video.masks) if scorer.is_scored(index)]
        if missing := [name for name in wanted if not (predictions / video.name / name).is_file()]:
            raise DatasetError(
                f"{predictions / video.name} lacks {len(missing)} of {len(wanted)} scored frames: {listing(missing)}"
            )


def _score(options: argparse.Namespace) -> None:
    """One line of JSON per sequence, and one with the means over all objects."""
    if not options.predictions.is_dir():
        raise DatasetError(f"{options.predictions} is not a folder; predictions lie in it as SEQUENCE/00000.png")
    videos = mask_folders(options.ground_truth, sequences=options.sequences, void=options.void)
    check_predictions(videos, options.predictions)
    objects: list[ObjectScore] = []
    for video in videos:
        folder = options.predictions / video.name
        found = score_video(video, lambda frame, folder=folder: read_mask(folder / f"{frame}.png"))
        print(json.dumps({"sequence": video.name} | _shown(found, details=options.details)), flush=True)
        objects += found
    print(json.dumps({"sequence": MEAN} | _shown(objects, details=options.details)))


def _shown(objects: Sequence[ObjectScore], *, details: bool) -> dict[str, float]:
    means = mean_scores(objects)
    return means | {"objects": len(objects)} if details else {name: means[name] for name in ("J", "F")}


# -------------------------------------------------------------------------------------------------- predicted masks


@dataclass(frozen=True)
class Tracker:
    """Something that predicts masks: a source of features, or none, and then given masks stay where they are."""

    name: str
    source: FeatureSource | None
    patch_size: int = 16

    def masks(
        self, video: AnnotatedVideo, config: PropagationConfig, device: torch.device | str
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Every frame and its predicted ids, uint8 [H, W]."""
        if self.source is None:
            return hold(video)
        return propagate(video, self.source, self.patch_size, config, device=device)


def track(
    videos: Sequence[AnnotatedVideo],
    tracker: Tracker,
    config: PropagationConfig,
    predictions: Path,
    *,
    world: World = ALONE,
) -> list[ObjectScore]:
    """Predict all videos, write PREDICTIONS/VIDEO/FRAME.png, and score them where true masks allow it.

    Every rank takes its share of the videos; all know all scores, in the order of the videos.
    """
    mine = {
        index: _track_video(videos[index], tracker, config, predictions, world.device)
        for index in range(world.rank, len(videos), world.size)
    }
    everyone: dict[int, list[ObjectScore]] = {}
    for share in world.gather_objects(mine):
        everyone |= share
    return [each for index in range(len(videos)) for each in everyone[index]]


def _track_video(
    video: AnnotatedVideo, tracker: Tracker, config: PropagationConfig, predictions: Path, device: torch.device
) -> list[ObjectScore]:
    """What is scored was predicted here: files may be another command's that writes to the same folder."""
    begin, predicted = time.monotonic(), dict[str, np.ndarray]()
    for frame, ids in tracker.masks(video, config, device):
        write_mask(predictions / video.name / f"{frame}.png", ids)
        if frame in video.masks:
            predicted[frame] = ids
    found = score_video(video, predicted.__getitem__)
    mean = f"J&F {mean_scores(found)['J&F']:.3f}, " if found else ""
    seconds = (time.monotonic() - begin) / len(video.frames)
    print(f"{tracker.name}: {video.name}, {mean}{seconds:.2f} s a frame", file=sys.stderr, flush=True)
    return found


def build_trackers(models: Sequence[str], *, device: torch.device | str = "cpu") -> list[Tracker]:
    """One for each of `models`: the path of an encoder, or a reference by name.

    `untrained` has the architecture of the first path, or vit_small; `untrained:NAME` is a named one.
    """
    paths = [model for model in models if model.partition(":")[0] not in REFERENCES]
    if unknown := [path for path in paths if not Path(path).exists()]:
        raise ValueError(
            f"--model {unknown[0]}: no such file or folder, nor one of the references {', '.join(REFERENCES)}. Give a "
            "folder of an exported encoder or a released .pt; nothing is downloaded by name"
        )
    base = encoder_config(paths[0]) if paths else model_config(DEFAULT_SIZE)
    trackers = [_tracker(model, base, device, is_only_path=len(paths) == 1) for model in models]
    names = [tracker.name for tracker in trackers]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"--model: {sorted(repeated)} come twice; rename the folders, results go by their name")
    return trackers


def _tracker(model: str, base: EncoderConfig, device: torch.device | str, *, is_only_path: bool) -> Tracker:
    kind, _, size = model.partition(":")
    patch = base.patch_size
    if kind == HELD_MASK:
        return Tracker(HELD_MASK, None)
    if kind == UNTRAINED:
        if size and size not in list_models():
            raise ValueError(f"--model {model}: there is no {size!r}; sizes: {', '.join(list_models())}")
        encoder = create_encoder(model_config(size) if size else base, device="cpu").to(device)
        return Tracker(model.replace(":", "_"), EncoderFeatures(UNTRAINED, encoder), encoder.patch_size)
    if kind in REFERENCES:
        sources = {RGB: PixelFeatures(patch, 1), RGB_PATCHES: RgbPatches(patch), RANDOM_PATCHES: RandomPatches(patch)}
        return Tracker(kind, sources[kind], patch)
    name = TRAINED if is_only_path else Path(model).stem
    encoder = from_pretrained(model, device=device)
    return Tracker(name, EncoderFeatures(name, encoder), encoder.patch_size)


# -------------------------------------------------------------------------------------------------------- the command


def tracking_scores(dataset: DatasetName, means: Mapping[str, float]) -> list[Score]:
    """What `dataset_means` gives as numbers of the task `tracking_DATASET`, the first under its own name."""
    headline = next(iter(means))
    names = {name: f"{TASK}_{dataset}" + ("" if name == headline else f"_{name}") for name in means}
    return [Score(names[name], PROBE, name, 0, value) for name, value in means.items()]


def dataset_means(
    dataset: DatasetName, objects: Sequence[ObjectScore], videos: Sequence[AnnotatedVideo], seen: frozenset[str] | None
) -> dict[str, float]:
    """The headline number first: J&F, J, F, or on YouTube-VOS G and its parts; without `seen` all categories are."""
    if dataset != "youtube_vos":
        means = mean_scores(objects)
        return {name: means[name] for name in ("J&F", "J", "F")}
    is_seen = {
        (video.name, each): seen is None or video.categories.get(each, "") in seen
        for video in videos
        for each in video.object_ids
    }
    return youtube_vos_means(objects, is_seen)


def results_by_video(objects: Mapping[str, Sequence[ObjectScore]], means: Mapping[str, Mapping[str, float]]) -> Table:
    """J&F of every video, and below it the means, with a column for each model."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("video", no_wrap=True)
    for model in objects:
        table.add_column(model, justify="right", no_wrap=True)
    videos = dict.fromkeys(each.sequence for scores in objects.values() for each in scores)
    for video in videos:
        each = [mean_scores(s for s in scores if s.sequence == video)["J&F"] for scores in objects.values()]
        table.add_row(video, *(f"{value:.3f}" for value in each))
    table.add_section()
    for name in next(iter(means.values())):
        table.add_row(f"mean {name}", *(f"{values[name]:.3f}" for values in means.values()))
    return table


def _run(options: argparse.Namespace) -> None:
    begin = time.monotonic()
    config = resolve(PropagationConfig, [OmegaConf.create(asdict(PRESETS[options.preset]))], options.overrides)
    videos = open_dataset(
        options.dataset,
        options.data,
        split=options.split,
        sequences=options.sequences,
        skip_missing=options.skip_missing,
    )
    seen = seen_categories(options.seen) if options.seen else None
    trackers = build_trackers(options.model, device=options.device)
    masks = {tracker.name: options.out / "masks" / options.dataset / tracker.name for tracker in trackers}
    world = replace(ALONE, device=torch.device(options.device))
    objects = {each.name: track(videos, each, config, masks[each.name], world=world) for each in trackers}
    _write_pictures(videos, masks, options.out / "pictures" / options.dataset)
    if not all(objects.values()):
        print(f"no true masks to score with; predictions are in {options.out / 'masks' / options.dataset}")
        return
    means = {name: dataset_means(options.dataset, scores, videos, seen) for name, scores in objects.items()}
    rows = [
        Row.of(score, stage=options.stage, model=name)
        for name in objects
        for score in tracking_scores(options.dataset, means[name])
    ]
    save(options.out, rows)
    frames = sum(len(video.frames) for video in videos)
    settings = " ".join(f"{name}={value}" for name, value in asdict(config).items())
    print(f"{options.dataset}: {len(videos)} videos, {frames} frames, {time.monotonic() - begin:.0f} s; {settings}")
    print_wide(results_by_video(objects, means), Console())


def _write_pictures(videos: Sequence[AnnotatedVideo], masks: Mapping[str, Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for video in videos:
        tracking_picture(video, masks).save(folder / f"{video.name}.png")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evals.tasks.tracking", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    _add_run(commands.add_parser("run", help="carry masks through videos by frozen features, and score them"))
    score = commands.add_parser("score", help="J and F of predicted masks, as in the official evaluation")
    score.add_argument("--predictions", type=Path, required=True, help="folder with SEQUENCE/00000.png")
    score.add_argument("--ground-truth", type=Path, required=True, help="the same of true masks, or a DAVIS tree")
    score.add_argument("--sequences", nargs="+", default=[], help="score these alone (default: all true ones)")
    score.add_argument("--void", type=int, help="true id that counts nowhere, 255 in DAVIS-2017 (default: none)")
    score.add_argument("--details", action="store_true", help="J&F, recall, decay and the number of objects as well")
    score.set_defaults(command=_score)
    return parser


def _add_run(run: argparse.ArgumentParser) -> None:
    names = ", ".join(REFERENCES)
    run.add_argument(
        "--model", action="append", required=True, help=f"encoder (folder or .pt) or one of {names}; may be repeated"
    )
    run.add_argument("--data", type=Path, required=True, help="the set's folder; nothing is downloaded")
    run.add_argument("--dataset", choices=get_args(DatasetName), default="davis2017", help="default: davis2017")
    run.add_argument("--split", default="val", help="default: val")
    run.add_argument("--sequences", nargs="+", default=[], help="these videos alone (default: all of the split)")
    run.add_argument("--skip-missing", action="store_true", help="leave out listed videos that are not there")
    run.add_argument("--seen", type=Path, help="YouTube-VOS: meta.json of the training set, whose categories are seen")
    run.add_argument("--preset", choices=sorted(PRESETS), default="vjepa21", help="settings (default: vjepa21)")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if any")
    run.add_argument("--out", type=Path, required=True, help="folder for masks, pictures and results")
    run.add_argument("--stage", default="frozen", help="name of the stage in the results (default: frozen)")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="settings in place of the preset's")
    run.set_defaults(command=_run)


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        options.command(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
