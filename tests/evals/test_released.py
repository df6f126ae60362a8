"""Released weights and models of transformers are measured by the command as they lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evals.adapters import load_transformers
from evals.dense_config import load_segmentation
from evals.dense_features import LevelFeatures
from evals.features import FeatureSource
from evals.models import EncoderModel, load_models
from evals.run import main
from evals.tasks import linear_segmentation
from tests.evals.dense_scenes import write_camvid
from tests.evals.rows import rows_of
from tests.evals.test_adapters import save, tiny_vjepa2
from tests.golden.make import checkpoint
from vjepa.hub import import_official

SHORT = ["fit.steps=10", "fit.warmup_steps=2", "fit.batch_size=4"]
WINDOWS = ["view.edges=resize", "view.short_side=48", "view.crop=[16,16]", "view.stride=16"]  # transformers' own size


def measured(model: str, root: Path, source: FeatureSource, patch_size: int, *keys: str) -> dict[str, float]:
    """The rows of a model and its rivals; its own is what the task gives on its features."""
    out = root / "out"
    given = ["--model", model, "--suite", "camvid", "--out", str(out), f"data.root={root}"]
    assert main([*given, *SHORT, *keys]) == 0
    values = {row.model: row.value for row in rows_of(out) if row.task == "linear_segmentation_camvid"}
    assert set(values) == {"trained", "untrained", "rgb", "location_prior"}
    config = load_segmentation("camvid", [f"data.root={root / 'camvid'}", *SHORT, *keys])
    expected = linear_segmentation.evaluate(source, config, patch_size=patch_size)[0].value
    assert values["trained"] == expected
    return values


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    write_camvid(tmp_path / "camvid", {"train": 6, "test": 2})
    return tmp_path


def test_a_released_checkpoint(sets: Path) -> None:
    """The layout of V-JEPA 2.1's files at a width of one head; the encoder is the EMA's or the target's."""
    path = sets / "vjepa2_1_tiny.pt"
    torch.save(checkpoint(torch.Generator().manual_seed(1), dim=64, width=72), path)
    encoder, _ = import_official(path)
    values = measured(str(path), sets, LevelFeatures("trained", encoder.eval()), encoder.patch_size)
    assert values["trained"] != values["untrained"]
    trained, untrained, _ = load_models([str(path)])
    for model in (trained, untrained):
        assert isinstance(model, EncoderModel)
        assert model.predictor is not None, "anticipation asks for it"


def test_a_folder_of_transformers(sets: Path) -> None:
    model = tiny_vjepa2()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            weights.mul_(2 if name.endswith("weight") else 1)
    folder = save(sets / "tiny-vjepa2", model)
    measured(f"hf:{folder}", sets, load_transformers(str(folder)), 8, *WINDOWS)
