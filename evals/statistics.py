"""Numbers about features that no label is needed for: they tell collapse from health (reference evaluation.md 1.6)."""

from __future__ import annotations

import torch
from torch import Tensor

from vjepa.train.diagnostics import feature_std, mean_cosine, rankme
from vjepa.train.representation import covariance_rank, covariance_spectrum, dead_share


def feature_statistics(features: Tensor, *, most: int = 25_600, seed: int = 0) -> dict[str, float]:
    """Statistics of features [N, D], at most `most` rows of them drawn by the seed.

    - `rankme`: effective rank, uncentred (arXiv 2210.02885, which takes 25,600 rows). Compare it only at one N, with
      N >= D.
    - `covariance_rank`: the same of the covariance.
    - `std`, `std_min`: standard deviation over rows, mean and least over dimensions.
    - `dead_share`: of dimensions that hardly vary.
    - `cosine`: mean over pairs of different rows; 1 where all point the same way.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be [N, D] with N >= 2, got {list(features.shape)}: flatten batch and tokens")
    if len(features) > most:
        generator = torch.Generator().manual_seed(seed)
        features = features[torch.randperm(len(features), generator=generator)[:most].to(features.device)]
    return {
        "rankme": rankme(features).item(),
        "covariance_rank": covariance_rank(covariance_spectrum(features)).item(),
        "std": feature_std(features).item(),
        "std_min": features.float().std(dim=0, correction=0).min().item(),
        "dead_share": dead_share(features).item(),
        "cosine": mean_cosine(features).item(),
    }
