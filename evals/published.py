"""Figures that papers report, to be shown below measured ones: marked, with their source, never among rows of ours.

All are from tables of the V-JEPA 2.1 paper (reference vjepa-2.1.md 7.1, 7.2; evaluation.md 1.1, 5.2), measured by its
authors, 2.1 at 384 px. Classification and anticipation are maxima over heads on validation (evaluation.md 1.1).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

V2_L, V2_G, V21_G, V21_2B = "V-JEPA 2 L/256", "V-JEPA 2 g", "V-JEPA 2.1 g", "V-JEPA 2.1 G"
DINO_7B, DINO_H, DINO_V2 = "DINOv3 7B", "DINOv3 H+", "DINOv2 g"
DENSE_SOURCE = "V-JEPA 2.1 paper, dense tasks (reference vjepa-2.1.md 7.1)"
GLOBAL_SOURCE = "V-JEPA 2.1 paper, global tasks (reference vjepa-2.1.md 7.2, evaluation.md 1.1)"
COMPAT_NOTE = "; probably 1 s before the action's end: compare anticipation.form=vjepa2_compat"


@dataclass(frozen=True)
class Published:
    """One figure of a paper, on the scale of our rows."""

    task: str
    """Name of our task that asks the same."""
    metric: str
    model: str
    value: float
    source: str


def _all(task: str, metric: str, source: str, **values: float) -> list[Published]:
    names = {
        "l": V2_L,
        "g": V2_G,
        "v21_g": V21_G,
        "v21_G": V21_2B,
        "dino7b": DINO_7B,
        "dinoH": DINO_H,
        "dinov2": DINO_V2,
    }
    return [Published(task, metric, names[model], value, source) for model, value in values.items()]


_DAVIS = {"g": 0.525, "v21_g": 0.681, "v21_G": 0.690, "dino7b": 0.711, "dinoH": 0.711, "dinov2": 0.639}
_YOUTUBE = {"g": 0.537, "v21_g": 0.723, "v21_G": 0.727, "dino7b": 0.741, "dinoH": 0.740, "dinov2": 0.656}
PUBLISHED: tuple[Published, ...] = (
    *_all(
        "linear_segmentation_ade20k", "mIoU", DENSE_SOURCE,
        g=0.244, v21_g=0.478, v21_G=0.479, dino7b=0.559, dinoH=0.548, dinov2=0.495,
    ),
    *_all(
        "linear_segmentation_cityscapes", "mIoU", DENSE_SOURCE,
        g=0.459, v21_g=0.718, v21_G=0.735, dino7b=0.811, dinoH=0.795, dinov2=0.756,
    ),
    *_all(
        "linear_segmentation_voc12", "mIoU", DENSE_SOURCE,
        g=0.639, v21_g=0.847, v21_G=0.850, dino7b=0.866, dinoH=0.858, dinov2=0.831,
    ),
    *_all(
        "linear_depth_nyuv2", "RMSE", DENSE_SOURCE,
        g=0.642, v21_g=0.350, v21_G=0.307, dino7b=0.309, dinoH=0.352, dinov2=0.372,
    ),
    *_all(
        "linear_depth_kitti", "RMSE", DENSE_SOURCE,
        g=4.650, v21_g=2.601, v21_G=2.461, dino7b=2.346, dinoH=2.635, dinov2=2.624,
    ),
    *_all("tracking_davis2017", "J&F", DENSE_SOURCE, **_DAVIS),
    *_all("tracking_youtube_vos", "J&F", DENSE_SOURCE + "; 80/20 split of training", **_YOUTUBE),
    *_all("attentive_ssv2", "accuracy", GLOBAL_SOURCE, l=0.737),
    *_all("attentive_ssv2_384", "accuracy", GLOBAL_SOURCE, g=0.773, v21_g=0.769, v21_G=0.777),
    *_all("attentive_k400", "accuracy", GLOBAL_SOURCE, g=0.873, v21_g=0.870, v21_G=0.877),
    *_all("attentive_diving48", "accuracy", GLOBAL_SOURCE, l=0.890, g=0.902, v21_g=0.890, v21_G=0.892),
    *_all("attentive_in1k", "accuracy", GLOBAL_SOURCE, g=0.851, v21_g=0.848, v21_G=0.855),
    *_all(
        "attentive_ek100", "action_recall@5", GLOBAL_SOURCE + COMPAT_NOTE, l=0.327, g=0.397, v21_g=0.384, v21_G=0.408
    ),
)  # fmt: skip


def published_for(tasks: Iterable[str]) -> list[Published]:
    """The figures for these tasks, in the order of the list above."""
    asked = set(tasks)
    return [each for each in PUBLISHED if each.task in asked]


def published_table(figures: Iterable[Published]) -> Table:
    """A line a figure, each with its source, under a title that says what they are."""
    table = Table(title="Published, NOT measured here", box=SIMPLE_HEAD, title_justify="left")
    for name in ("task", "metric", "model", "published", "source"):
        table.add_column(name, justify="right" if name == "published" else "left", no_wrap=True)
    for each in figures:
        table.add_row(each.task, each.metric, each.model, f"{each.value:.3f}", each.source)
    return table
