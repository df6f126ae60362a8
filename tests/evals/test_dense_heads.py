"""Dense heads that attend among the tokens of an image: what they see, what they are named, how levels reach them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import vjepa
from evals.dense_config import DenseHeadConfig, load_depth, load_segmentation
from evals.dense_features import LevelFeatures
from evals.dense_heads import TokenAttention, dense_head
from evals.models import EncoderModel, PixelModel
from evals.run import main
from evals.tasks import linear_depth, linear_segmentation
from tests.evals.dense_scenes import COLOURS, HEIGHT, WIDTH, Colours, write, write_camvid, write_rgbd
from tests.evals.rows import rows_of
from vjepa import hub
from vjepa.config import ConfigError

SMALL = ["fit.steps=100", "fit.batch_size=4", "fit.warmup_steps=5", "fit.weight_decays=[0]", "label_stride=1"]
ATTENTIVE = ["head.kind=attentive", "head.depth=1", "head.num_heads=2"]


def write_told_by_the_corner(root: Path) -> Path:
    """Grey images of one class each, which only the colour of the first patch tells."""
    for split, count in (("train", 12), ("test", 6)):
        for number in range(count):
            image = np.full((HEIGHT, WIDTH, 3), 128, dtype=np.uint8)
            image[:16, :16] = COLOURS[number % 3]
            write(root / "images" / split / f"{number:03}.png", image)
            write(root / "labels" / split / f"{number:03}.png", np.full((HEIGHT, WIDTH), number % 3, dtype=np.uint8))
    return root


def test_only_attention_knows_what_another_token_tells(tmp_path: Path) -> None:
    root = write_told_by_the_corner(tmp_path)
    wide = [*ATTENTIVE, "head.width=16"]

    def miou(*changes: str) -> float:
        config = load_segmentation("camvid", [f"data.root={root}", *SMALL, "fit.lrs=[0.005]", *changes])
        return linear_segmentation.evaluate(Colours(), config)[0].value

    assert miou(*wide) > 0.9
    assert miou() < 0.3


def test_rows_of_an_attentive_head_are_named_apart(tmp_path: Path) -> None:
    write_camvid(tmp_path / "camvid", {"train": 4, "test": 1})
    write_rgbd(tmp_path / "rgbd", 4)
    short = ["fit.steps=2", "fit.batch_size=2", *ATTENTIVE, "head.width=4"]
    config = load_segmentation("camvid", [f"data.root={tmp_path / 'camvid'}", *short])
    scores = linear_segmentation.evaluate(Colours(), config)
    assert [score.task for score in scores] == [
        "attentive_segmentation_camvid",
        "attentive_segmentation_camvid_accuracy",
    ]
    assert {score.probe for score in scores} == {"attentive"}
    splits = ["data.train_split='0:3'", "data.test_split='3:'"]
    depth = load_depth("rgbd", [f"data.root={tmp_path / 'rgbd'}", *splits, *short])
    assert linear_depth.evaluate(Colours(), depth)[0].task == "attentive_depth_rgbd"


def test_levels_are_summed_by_a_projection_each() -> None:
    attention = TokenAttention(6, DenseHeadConfig(depth=1, num_heads=2, width=4), seed=0).eval()
    tokens = torch.randn(2, 3, 5, 6)
    weight = attention.project.weight
    assert isinstance(weight, torch.Tensor)
    summed = tokens[..., :3] @ weight[:, :3].T + tokens[..., 3:] @ weight[:, 3:].T
    again = TokenAttention(4, DenseHeadConfig(depth=1, num_heads=2), seed=0).eval()
    assert isinstance(again.project, nn.Identity)
    torch.testing.assert_close(attention(tokens), again(summed))


def test_recomputed_blocks_have_the_same_gradients() -> None:
    tokens, found = torch.randn(2, 3, 5, 8), []
    for recompute in (False, True):
        attention = TokenAttention(8, DenseHeadConfig(depth=2, num_heads=2, recompute=recompute), seed=1).train()
        attention(tokens).square().sum().backward()
        found.append([each.grad for each in attention.parameters()])
    torch.testing.assert_close(*found)


def test_a_head_without_attention_is_the_linear_one_alone() -> None:
    config = load_segmentation("camvid", ["data.root=/"])
    assert type(dense_head(7, config, lambda width: nn.Linear(width, 2))) is nn.Linear
    behind = load_segmentation("camvid", ["data.root=/", *ATTENTIVE, "head.width=10"])
    attention, linear = dense_head(7, behind, lambda width: nn.Linear(width, 2)).children()
    assert isinstance(attention, TokenAttention)
    assert isinstance(linear, nn.Linear)
    assert (len(attention.blocks), linear.in_features) == (1, 10)


def test_widths_that_heads_do_not_divide_are_refused_and_pixels_get_zeros() -> None:
    with pytest.raises(ValueError, match=r"head.num_heads=16 does not divide the width 20: set head.num_heads"):
        TokenAttention(20, DenseHeadConfig(kind="attentive"), seed=0)
    with pytest.raises(ConfigError, match=r"head.width=0 must be at least 1"):
        load_segmentation("camvid", ["data.root=/", "head.width=0"])
    clips = torch.zeros(1, 3, 1, 32, 48, dtype=torch.uint8)
    for change, width in (("head.kind=attentive", 224), ("head.kind=linear", 216)):
        config = load_segmentation("camvid", ["data.root=/", change])
        assert PixelModel(16, 2).dense(config).tokens(clips).shape == (1, 1, 2, 3, width)


def test_the_command_hands_levels_and_tokenizer_to_the_source(tmp_path: Path) -> None:
    """Rows of both kinds of head are what the task gives on the features that the keys ask for."""
    write_camvid(tmp_path / "camvid", {"train": 4, "test": 2})
    encoder = vjepa.create_model("vit_debug", seed=5).eval()
    model = hub.save_pretrained(encoder, tmp_path / "model")
    first, last = encoder.levels[0], encoder.levels[-1]
    asked = ["fit.steps=4", "fit.warmup_steps=1", "fit.batch_size=2", "tokenizer=video"]
    asked += [f"levels=[{first + 1},{last + 1}]"]
    sources = [LevelFeatures("m", encoder, (first, last), "video"), LevelFeatures("m", encoder, (first, last))]
    for kind in ("linear", "attentive"):
        out, mine = tmp_path / kind, [*asked, f"head.kind={kind}", "head.depth=1", "head.width=32"]
        given = ["--model", str(model), "--suite", "camvid", "--out", str(out), f"data.root={tmp_path}"]
        assert main([*given, *mine]) == 0
        task = f"{kind}_segmentation_camvid"
        value = next(row.value for row in rows_of(out) if (row.task, row.model) == (task, "trained"))
        config = load_segmentation("camvid", [f"data.root={tmp_path / 'camvid'}", *mine])
        video, image = (linear_segmentation.evaluate(source, config)[0].value for source in sources)
        assert value == video != image
    found = EncoderModel("m", encoder).dense(load_segmentation("camvid", ["data.root=/"]))
    assert isinstance(found, LevelFeatures)
    assert (found.levels, found.tokenizer) == ((), "image"), "the papers' choice where nothing is said"
