"""The attentive probe is the papers': the numbers of transformers' own, the shapes and the initialisation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evals.attentive import AttentiveClassifier, AttentiveClassifiers, AttentiveConfig, average_views
from evals.attentive_weights import from_official, from_transformers, to_transformers
from vjepa.hub import WeightsError

TINY = AttentiveConfig(num_heads=4)


def random_tokens(count: int = 2, tokens: int = 24, dim: int = 32) -> Tensor:
    return torch.randn(count, tokens, dim, generator=torch.Generator().manual_seed(1))


def spread(head: torch.nn.Module) -> None:
    """Weights of a size at which every part matters."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))


# ------------------------------------------------------------------------------------- parity with transformers


def hugging_face_probe() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.VJEPA2Config(
        crop_size=16,
        patch_size=8,
        frames_per_clip=2,
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=1,
        num_pooler_layers=3,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
        num_labels=7,
        layer_norm_eps=1e-6,
    )
    model = transformers.VJEPA2ForVideoClassification(config).eval()
    spread(model)
    return model


def hugging_face_logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.classifier(model.pooler(tokens))


def test_scores_are_those_of_transformers_with_the_same_eps() -> None:
    model, tokens = hugging_face_probe(), random_tokens()
    head = from_transformers(model.state_dict(), num_heads=4).eval()
    with torch.no_grad():
        difference = (head(tokens) - hugging_face_logits(model, tokens)).abs().max().item()
    assert difference <= 1e-5


def test_the_eps_of_the_reference_gives_other_scores() -> None:
    """Were the two alike, the test above could not tell whether eps is matched."""
    model, tokens = hugging_face_probe(), 1e-2 * random_tokens()
    config = AttentiveConfig(num_heads=4, eps=1e-5)
    head = from_transformers(model.state_dict(), num_heads=4, config=config).eval()
    with torch.no_grad():
        assert (head(tokens) - hugging_face_logits(model, tokens)).abs().max().item() > 1e-5


def test_weights_go_to_transformers_and_come_back() -> None:
    model, tokens = hugging_face_probe(), random_tokens()
    head = AttentiveClassifier(32, 7, AttentiveConfig(num_heads=4, eps=1e-6)).eval()
    spread(head)
    state = to_transformers(head)
    assert set(state) == {name for name in model.state_dict() if not name.startswith("vjepa2.")}
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(hugging_face_logits(model, tokens), head(tokens), atol=1e-5, rtol=0)
    again = from_transformers(state, num_heads=4)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in head.state_dict().items())


def test_weights_that_do_not_fit_are_refused_by_name() -> None:
    state = to_transformers(AttentiveClassifier(32, 7, TINY))
    missing = {name: value for name, value in state.items() if name != "pooler.cross_attention_layer.mlp.fc2.bias"}
    with pytest.raises(WeightsError, match=r"missing: pooler\.cross_attention_block\.mlp\.fc2\.bias"):
        from_transformers(missing, num_heads=4)
    with pytest.raises(WeightsError, match="unexpected: extra"):
        from_transformers(state | {"extra": torch.zeros(1)}, num_heads=4)


def test_a_released_probe_loads_by_its_own_names(tmp_path: Path) -> None:
    heads = [AttentiveClassifier(32, 7, TINY, seed=seed) for seed in (0, 1)]
    states = [{f"module.{name}": value for name, value in head.state_dict().items()} for head in heads]
    torch.save({"classifiers": states, "epoch": 20}, tmp_path / "probe.pt")
    loaded = from_official(tmp_path / "probe.pt", num_heads=4, index=1)
    tokens = random_tokens()
    assert torch.equal(loaded.eval()(tokens), heads[1].eval()(tokens))
    with pytest.raises(WeightsError, match="holds 2 classifiers"):
        from_official(tmp_path / "probe.pt", num_heads=4, index=2)


# ------------------------------------------------------------------------------------------------- initialisation


def test_the_initialisation_is_the_references() -> None:
    """Std 0.02; attn.proj and mlp.fc2 of block i over sqrt(2 i), the cross-attention's fc2 over sqrt(6) at depth 4."""
    head = AttentiveClassifier(256, 10, AttentiveConfig())
    state = head.state_dict()
    for block in range(3):
        for leaf in ("attn.proj", "mlp.fc2"):
            std = state[f"pooler.blocks.{block}.{leaf}.weight"].std().item()
            assert std == pytest.approx(0.02 / (2 * (block + 1)) ** 0.5, rel=0.02)
    assert state["pooler.cross_attention_block.mlp.fc2.weight"].std().item() == pytest.approx(0.02 / 6**0.5, rel=0.02)
    assert state["pooler.cross_attention_block.xattn.kv.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert state["pooler.query_tokens"].std().item() == pytest.approx(0.02, rel=0.2)
    assert not any(value.any() for name, value in state.items() if name.endswith("bias"))
    assert (state["pooler.blocks.0.norm1.weight"] == 1).all()


def test_heads_of_one_seed_are_one_and_of_two_seeds_are_two() -> None:
    first, same, other = (AttentiveClassifier(32, 5, TINY, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["linear.weight"], other["linear.weight"])


# ------------------------------------------------------------------------------------------------------ behaviour


def test_recomputation_changes_no_gradient() -> None:
    tokens = random_tokens()
    gradients = []
    for recompute in (False, True):
        head = AttentiveClassifier(32, 5, AttentiveConfig(num_heads=4, recompute=recompute), seed=1).train()
        head(tokens).square().sum().backward()
        gradients.append([parameter.grad for parameter in head.parameters()])
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_order_of_tokens_says_nothing() -> None:
    """No position is added: the encoder's tokens carry their own."""
    head, tokens = AttentiveClassifier(32, 5, TINY).eval(), random_tokens()
    spread(head)
    torch.testing.assert_close(head(tokens.flip(1)), head(tokens), atol=1e-4, rtol=1e-4)
    assert (head(tokens) - head(2 * tokens)).abs().max() > 1e-3


def test_every_question_has_a_query_of_its_own() -> None:
    head = AttentiveClassifiers(32, {"verb": 4, "noun": 6, "action": 9}, TINY)
    assert head.pooler.query_tokens.shape == (1, 3, 32)
    before = head(random_tokens())
    assert {name: tuple(scores.shape) for name, scores in before.items()} == {
        "verb": (2, 4),
        "noun": (2, 6),
        "action": (2, 9),
    }
    with torch.no_grad():
        head.pooler.query_tokens[:, 1] += 1
    after = head(random_tokens())
    assert torch.equal(before["verb"], after["verb"])
    assert torch.equal(before["action"], after["action"])
    assert not torch.equal(before["noun"], after["noun"])


def test_views_are_averaged_after_the_softmax() -> None:
    logits = torch.tensor([[0.0, 4.0], [3.0, 0.0], [1.0, 0.0], [0.0, 0.5], [0.0, 0.5], [0.0, 0.5]])
    averaged = average_views(logits, 3)
    torch.testing.assert_close(averaged[0], logits[:3].softmax(dim=1).mean(dim=0))
    torch.testing.assert_close(averaged[1], logits[3].softmax(dim=0))
    with pytest.raises(ValueError, match="6 rows of scores"):
        average_views(logits, 4)


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"head\.num_heads=16 does not divide the features' width 40"):
        AttentiveClassifier(40, 5)
