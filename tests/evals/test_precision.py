"""What runs in bf16 on a GPU and what does not: attention and, where a recipe says so, the frozen encoder; no score."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vjepa
from evals import attentive, dense_features, dense_heads
from evals.attentive import AttentiveClassifier, AttentiveConfig
from evals.dense_config import DenseHeadConfig, load_depth, load_segmentation
from evals.dense_features import LevelFeatures
from evals.models import EncoderModel, ForeignModel, load_models
from evals.probe_config import load_probe
from evals.tasks.linear_depth import depth_task
from tests.evals.test_adapters import save, tiny_dinov2
from tests.evals.test_anticipation import features

ROOT = ["data.root=nowhere"]


def bf16_here(device: torch.device, *, enabled: bool = True) -> torch.autocast:
    """What `bf16_on_gpus` does on a GPU, on this CPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def digits_beyond_bf16(x: Tensor) -> float:
    """Share of numbers that bf16 could not hold."""
    assert x.dtype == torch.float32
    return (x != x.bfloat16().float()).float().mean().item()


def test_scores_of_attention_in_bf16_are_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    head, tokens = AttentiveClassifier(32, 7, AttentiveConfig(depth=2, num_heads=4)), torch.randn(8, 12, 32)
    nn.init.normal_(head.linear.weight)
    exact = head(tokens)
    monkeypatch.setattr(attentive, "bf16_on_gpus", bf16_here)
    scores = head(tokens)
    assert not torch.equal(scores, exact)
    torch.testing.assert_close(scores, exact, rtol=0.1, atol=0.05)
    assert digits_beyond_bf16(scores) > 0.9
    scores.square().sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_metres_of_attention_in_bf16_are_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbouring bins are nearer to each other than numbers of bf16."""
    config = load_depth("rgbd", [*ROOT, "head.kind=attentive", "head.depth=1", "head.num_heads=4"])
    assert isinstance(config.head, DenseHeadConfig)
    head, tokens = depth_task("depth", config).make_head(32), torch.randn(2, 3, 4, 32)
    exact = head(tokens)
    monkeypatch.setattr(dense_heads, "bf16_on_gpus", bf16_here)
    metres = head(tokens)
    assert not torch.equal(metres, exact)
    assert digits_beyond_bf16(metres) > 0.9


def test_an_encoder_in_bf16_gives_float32_tokens_that_a_cache_keeps_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, clips = vjepa.create_model("vit_debug", seed=0), torch.randint(0, 256, (1, 3, 1, 32, 32)).byte()
    exact = LevelFeatures("e", encoder, bf16=True).tokens(clips)
    assert torch.equal(exact, LevelFeatures("e", encoder).tokens(clips)), "on a CPU nothing changes"
    monkeypatch.setattr(dense_features, "bf16_on_gpus", bf16_here)
    tokens = LevelFeatures("e", encoder, bf16=True).tokens(clips)
    assert tokens.dtype == torch.float32
    assert not torch.equal(tokens, exact)
    assert torch.equal(exact, LevelFeatures("e", encoder).tokens(clips)), "fp32 where it is not asked for"


def test_recipes_say_how_the_encoder_runs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Probes in bf16, as the papers' under fp16 or bf16; dense tasks in fp32, as DINOv3's."""
    pair = features(fps=8.0)
    model = EncoderModel("m", pair.encoder, pair.predictor)
    theirs = load_models([f"hf:{save(tmp_path_factory.mktemp('m'), tiny_dinov2())}"])[0]
    assert isinstance(theirs, ForeignModel)
    probes, dense = ("ssv2", "ek100"), load_segmentation
    found = [model.clips(load_probe(name, ROOT)) for name in probes] + [theirs.clips(load_probe("ssv2", ROOT))]
    found += [each.dense(dense("camvid", [*ROOT, "encoder_bf16=true"])) for each in (model, theirs)]
    assert [getattr(source, "bf16", None) for source in found] == [True] * 5
    found = [model.clips(load_probe(name, [*ROOT, "encoder_bf16=false"])) for name in probes]
    found += [each.dense(dense("camvid", ROOT)) for each in (model, theirs)]
    assert [getattr(source, "bf16", None) for source in found] == [False] * 4
