"""Metres for every pixel by a linear layer on frozen tokens, behind attention among them where a recipe says so.

The metrics are errors of whole images, averaged over a set.

DINOv3's head, loss and evaluation with V-JEPA 2.1's grid of settings (reference evaluation.md 1.4); figures are in the
recipes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evals.dense_config import DepthConfig
from evals.dense_fit import DenseResult, DenseTask, run_dense, scores_of
from evals.dense_heads import dense_head
from evals.dense_sets import DenseSet, open_depth
from evals.depth_metrics import DepthMeter, sig_loss
from evals.features import FeatureSource
from evals.protocol import Score
from vjepa.objectives.projector import GlobalBatchNorm
from vjepa.train.distributed import ALONE, World

TASK = "depth"  # after the kind of head
FIRST_STD = 0.01  # of the first weights, as in segmentation; the paper gives none
FLOOR = 0.1  # what every bin weighs at least, before the weights are made to sum to 1


class LinearDepthHead(nn.Module):
    """Batch normalisation over all ranks, a linear layer to bins, their mean: [B, h, w, D] -> metres [B, 1, h, w].

    Weights of the bins are relu(x) + 0.1 over their sum, no softmax; bins are linear in depth.
    """

    bins: Tensor

    def __init__(self, dim: int, num_bins: int, min_depth: float, max_depth: float) -> None:
        super().__init__()
        self.norm, self.linear = GlobalBatchNorm(dim), nn.Linear(dim, num_bins)
        nn.init.normal_(self.linear.weight, std=FIRST_STD)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("bins", torch.linspace(min_depth, max_depth, num_bins))

    def forward(self, tokens: Tensor) -> Tensor:
        weights = self.linear(self.norm(tokens)).float().relu() + FLOOR
        return ((weights @ self.bins) / weights.sum(dim=-1))[:, None]


def depth_task(name: str, config: DepthConfig) -> DenseTask[DepthMeter]:
    bounds = {"min_depth": config.min_depth, "max_depth": config.max_depth}

    def loss(outputs: Tensor, labels: Tensor, *, step: int) -> Tensor:
        """Metres [B, 1, h, w], brought to the size of the truth [B, H, W]."""
        metres = F.interpolate(outputs.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        return sig_loss(metres, labels, mean_only=step < config.mean_steps, **bounds)

    return DenseTask(
        name,
        make_head=lambda dim: dense_head(dim, config, lambda width: LinearDepthHead(width, config.num_bins, **bounds)),
        loss=loss,
        make_meter=lambda: DepthMeter(**bounds),
        fill=0.0,
        higher_is_better=False,
        probe=config.head.kind,
        flip_average=config.flip_average,
    )


def open_splits(config: DepthConfig) -> tuple[DenseSet, DenseSet]:
    """Training and test images of the recipe's set; the mask is the test's."""
    data = config.data
    train = open_depth(data.dataset, data.root, data.train_split)  # pyright: ignore[reportArgumentType]
    return train, open_depth(data.dataset, data.root, data.test_split, mask=config.mask)  # pyright: ignore[reportArgumentType]


def run(
    source: FeatureSource,
    config: DepthConfig,
    *,
    splits: tuple[DenseSet, DenseSet] | None = None,
    patch_size: int = 16,
    world: World = ALONE,
) -> DenseResult[DepthMeter]:
    """Heads, scores and what pictures need; `splits` are the recipe's unless given."""
    train, test = splits or open_splits(config)
    task = depth_task(config.task(TASK), config)
    return run_dense(task, source, train, test, config, patch_size=patch_size, world=world)


def evaluate(
    source: FeatureSource,
    config: DepthConfig,
    *,
    splits: tuple[DenseSet, DenseSet] | None = None,
    patch_size: int = 16,
    world: World = ALONE,
) -> list[Score]:
    """`linear_depth_SET` or `attentive_...`: the RMSE of the head chosen on held-out images; then the others."""
    return scores(run(source, config, splits=splits, patch_size=patch_size, world=world), config)


def scores(result: DenseResult[DepthMeter], config: DepthConfig) -> list[Score]:
    """What `evaluate` gives, of heads that are fitted already."""
    return scores_of(result, depth_task(config.task(TASK), config))
