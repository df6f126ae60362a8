"""A class for every pixel by a linear layer on frozen tokens, behind attention among them where a recipe says so.

The metric is mIoU over whole images of a labelled set.

DINOv3's head and protocol with V-JEPA 2.1's grid of settings (reference evaluation.md 1.3); figures are in the recipes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evals.dense_config import SegmentationConfig
from evals.dense_fit import DenseResult, DenseTask, run_dense, scores_of
from evals.dense_heads import dense_head
from evals.dense_sets import DenseSet, open_segmentation
from evals.depth_metrics import share_of_sum
from evals.features import FeatureSource
from evals.grid import ChannelDropout
from evals.metrics import ConfusionMatrix
from evals.protocol import IGNORE, Score
from vjepa.objectives.projector import GlobalBatchNorm
from vjepa.train.distributed import ALONE, World

TASK = "segmentation"  # after the kind of head
FIRST_STD = 0.01  # of the first weights; biases start at 0


class LinearSegmentationHead(nn.Module):
    """Dropout of channels, batch normalisation over all ranks, a linear layer: [B, h, w, D] -> [B, classes, h, w]."""

    def __init__(self, dim: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.drop, self.norm = ChannelDropout(dropout), GlobalBatchNorm(dim)
        self.linear = nn.Linear(dim, num_classes)
        nn.init.normal_(self.linear.weight, std=FIRST_STD)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.norm(self.drop(tokens))).movedim(-1, 1)


class SegmentationMeter(ConfusionMatrix):
    """mIoU accumulated over the set; sees scores [classes, H, W] and true classes [H, W]."""

    def __init__(self, classes: tuple[str, ...], *, per_class: bool = False) -> None:
        super().__init__(len(classes))
        self.classes, self.per_class = classes, per_class

    def update(self, predicted: Tensor, labels: Tensor) -> SegmentationMeter:
        super().update(predicted.argmax(dim=0), labels)
        return self

    def headline(self) -> float:
        return self.miou()

    def scores(self) -> dict[str, float]:
        found = {"mIoU": self.miou(), "accuracy": self.accuracy()}
        if self.per_class:
            named = zip(self.classes, self.iou().tolist(), strict=True)
            found |= {f"IoU_{name}": value for name, value in named if value == value}
        return found


def pixel_loss(outputs: Tensor, labels: Tensor, *, step: int) -> Tensor:
    """Cross-entropy of scores [B, classes, h, w], brought to the size of the labels [B, H, W]; IGNORE left out."""
    scores = F.interpolate(outputs.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(scores, labels, ignore_index=IGNORE, reduction="sum")
    return share_of_sum(total, int((labels != IGNORE).sum()))


def segmentation_task(name: str, classes: tuple[str, ...], config: SegmentationConfig) -> DenseTask[SegmentationMeter]:
    return DenseTask(
        name,
        make_head=lambda dim: dense_head(
            dim, config, lambda width: LinearSegmentationHead(width, len(classes), config.dropout)
        ),
        loss=pixel_loss,
        make_meter=lambda: SegmentationMeter(classes, per_class=config.per_class),
        fill=IGNORE,
        higher_is_better=True,
        probe=config.head.kind,
    )


def open_splits(config: SegmentationConfig) -> tuple[DenseSet, DenseSet]:
    """Training and test images of the recipe's set."""
    data = config.data
    train, test = (open_segmentation(data.dataset, data.root, split) for split in (data.train_split, data.test_split))  # pyright: ignore[reportArgumentType]
    return train, test


def run(
    source: FeatureSource,
    config: SegmentationConfig,
    *,
    splits: tuple[DenseSet, DenseSet] | None = None,
    patch_size: int = 16,
    world: World = ALONE,
) -> DenseResult[SegmentationMeter]:
    """Heads, scores and what pictures need; `splits` are the recipe's unless given."""
    train, test = splits or open_splits(config)
    task = segmentation_task(config.task(TASK), test.classes, config)
    return run_dense(task, source, train, test, config, patch_size=patch_size, world=world)


def evaluate(
    source: FeatureSource,
    config: SegmentationConfig,
    *,
    splits: tuple[DenseSet, DenseSet] | None = None,
    patch_size: int = 16,
    world: World = ALONE,
) -> list[Score]:
    """`linear_segmentation_SET` or `attentive_...`: the mIoU of the head chosen on held-out images; then the others."""
    return scores(run(source, config, splits=splits, patch_size=patch_size, world=world), config)


def scores(result: DenseResult[SegmentationMeter], config: SegmentationConfig) -> list[Score]:
    """What `evaluate` gives, of heads that are fitted already."""
    return scores_of(result, segmentation_task(config.task(TASK), result.images.data.classes, config))


@torch.no_grad()
def predicted_classes(result: DenseResult[SegmentationMeter], index: int) -> tuple[Tensor, Tensor]:
    """Predicted and true classes of a test image, int64 [H, W] each."""
    outputs, truth = result.predict(index)
    return outputs.argmax(dim=0), truth
