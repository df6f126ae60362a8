"""Every trainable parameter is in exactly one group; biases and norms do not decay, tokens and embeddings do."""

import pytest
from torch import nn

from vjepa.config import ModelConfig, PredictorSettings, build_models
from vjepa.objectives import JEPA, ObjectiveConfig
from vjepa.objectives.checks import freeze_unused
from vjepa.train.optim import OptimConfig, build_optimizer, split_parameters


@pytest.fixture(scope="module")
def objective() -> JEPA:
    settings = PredictorSettings(embed_dim=48, depth=2, num_heads=3)
    return JEPA(ObjectiveConfig(), *build_models(ModelConfig(name="vit_debug"), settings, seed=0))


def test_mask_tokens_and_modality_embeddings_decay(objective: JEPA) -> None:
    decay = split_parameters(objective)["decay"]
    for modality in ("video", "image"):
        assert f"predictor.mask_tokens.{modality}" in decay
        assert f"predictor.modality_embeds.{modality}" in decay
        assert f"encoder.tokenizer.{modality}_embed" in decay


def test_biases_and_norms_do_not_decay(objective: JEPA) -> None:
    groups = split_parameters(objective)
    named = dict(objective.named_parameters())
    assert not [name for name in groups["decay"] if name.endswith(".bias") or "norm" in name]
    tokens = ("mask_tokens", "modality_embeds", "_embed")
    assert not [name for name in groups["decay"] if named[name].dim() < 2 and not any(t in name for t in tokens)]
    assert [name for name in groups["no_decay"] if "norm" in name and name.endswith(".weight")]


def test_the_groups_are_a_partition_of_what_is_trained(objective: JEPA) -> None:
    groups = split_parameters(objective)
    flat = [name for names in groups.values() for name in names]
    assert sorted(flat) == sorted(name for name, p in objective.named_parameters() if p.requires_grad)
    assert not [name for name in flat if name.startswith("target.")]


def test_the_optimizer_holds_each_trained_parameter_once(objective: JEPA) -> None:
    held = [id(p) for group in build_optimizer(objective, OptimConfig()).param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in objective.parameters() if p.requires_grad}


def test_a_frozen_parameter_is_in_no_group() -> None:
    settings = PredictorSettings(embed_dim=48, depth=2, num_heads=3)
    objective = JEPA(ObjectiveConfig(), *build_models(ModelConfig(name="vit_debug"), settings, seed=0))
    frozen = freeze_unused(objective, ["video"])
    assert "predictor.mask_tokens.image" in frozen
    assert "encoder.tokenizer.image_embed" in frozen
    flat = {name for names in split_parameters(objective).values() for name in names}
    assert flat.isdisjoint(frozen)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimConfig())


def test_a_clipping_norm_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optim\.clip_grad=0.* must be positive"):
        OptimConfig(clip_grad=0.0)
