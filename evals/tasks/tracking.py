"""Video object segmentation: J and F of masks on disk, and masks that frozen features carry from frame to frame.

python -m evals.tasks.tracking score --predictions DIR --ground-truth DIR
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from evals.jf import ObjectScore, SequenceScorer, mean_scores
from evals.videos import AnnotatedVideo, DatasetError, listing, mask_folders, read_mask

MEAN = "mean"  # what stands for the sequence in the last line of `score`


def score_video(video: AnnotatedVideo, predictions: Path) -> list[ObjectScore]:
    """J and F of every object from PREDICTIONS/VIDEO/FRAME.png; only frames that count need to be there."""
    scorer = _scorer(video)
    for index, frame in enumerate(video.masks):
        path = predictions / video.name / f"{frame}.png"
        scorer.add(index, video.mask(frame), read_mask(path) if scorer.is_scored(index) else None)
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
        found = score_video(video, options.predictions)
        print(json.dumps({"sequence": video.name} | _shown(found, details=options.details)), flush=True)
        objects += found
    print(json.dumps({"sequence": MEAN} | _shown(objects, details=options.details)))


def _shown(objects: Sequence[ObjectScore], *, details: bool) -> dict[str, float]:
    means = mean_scores(objects)
    return means | {"objects": len(objects)} if details else {name: means[name] for name in ("J", "F")}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evals.tasks.tracking", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    score = commands.add_parser("score", help="J and F of predicted masks, as in the official evaluation")
    score.add_argument("--predictions", type=Path, required=True, help="folder with SEQUENCE/00000.png")
    score.add_argument("--ground-truth", type=Path, required=True, help="the same of true masks, or a DAVIS tree")
    score.add_argument("--sequences", nargs="+", default=[], help="score these alone (default: all true ones)")
    score.add_argument("--void", type=int, help="true id that counts nowhere, 255 in DAVIS-2017 (default: none)")
    score.add_argument("--details", action="store_true", help="J&F, recall, decay and the number of objects as well")
    score.set_defaults(command=_score)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        options.command(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
