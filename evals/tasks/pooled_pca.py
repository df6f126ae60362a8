"""Pictures of the main directions of clips' tokens, and how much of the tokens' variance they hold."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from evals.features import FeatureSource
from evals.media import is_image
from evals.pca import whitened_pca
from evals.pooled_config import PcaConfig
from evals.pooled_features import Media, features_of, read_files
from evals.protocol import Score
from evals.visualize import pca_grid
from evals.whole_files import writing
from vjepa.train.distributed import ALONE, World

COLUMNS = 8  # of a picture: time steps, thinned out evenly where there are more


def pca(source: FeatureSource, config: PcaConfig, pictures: Path, *, world: World = ALONE) -> list[Score]:
    """PICTURES/NN_FILE.png of the first files, and the share of variance in three components, mean over files.

    A picture has the middle frames of a clip's tubelets and below them their tokens, one basis for all; an image has
    one column. Of several segments and views the middle ones are shown.
    """
    paths, skip = config.data.paths()[: config.files], config.data.skip_damaged
    segment, view = config.clips.segments // 2, config.clips.views // 2
    pictures.mkdir(parents=True, exist_ok=True)

    def keep(number: int, media: Media, tokens: Tensor) -> Tensor:
        path, clip = media.path, media.clips[view, segment]
        colours, share = whitened_pca(tokens[0, segment, view].float())
        columns = 1 if is_image(path) else COLUMNS
        frames = clip.permute(1, 2, 3, 0)  # [T, H, W, C]
        title = f"{path.name}: {source.name}, {share:.0%} of the variance"
        figure = pca_grid(frames, {"tokens": colours}, title=title, max_columns=columns)
        picture = pictures / f"{number:02}_{path.stem}.png"
        with writing(picture):
            figure.savefig(picture)
        return torch.tensor(share)

    table = read_files(features_of(source, config, world), paths, keep, config, skip_damaged=skip, world=world)
    share = table.values[table.is_there].mean().item()
    return [Score(config.row, "none", "explained variance", config.seed, share, higher_is_better=False)]
