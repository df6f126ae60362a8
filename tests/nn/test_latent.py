"""The predictor's latent: its noise, its price in nats, and how it reaches predictions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, OneHotCategorical, kl_divergence

from vjepa.nn.init import build
from vjepa.nn.latent import (
    Latent,
    LatentConfig,
    LatentInference,
    categorical_nats,
    gaussian_nats,
    latent_noise,
    straight_through,
)
from vjepa.nn.predictor import Predictor, PredictorConfig
from vjepa.registry import create_predictor

CPU = torch.device("cpu")
KINDS: list[dict[str, Any]] = [
    {"kind": "gaussian", "dim": 6},
    {"kind": "gaussian", "dim": 6, "per": "token"},
    {"kind": "discrete", "groups": 2, "codes": 5},
    {"kind": "discrete", "groups": 2, "codes": 5, "per": "token"},
]


def noise(config: LatentConfig, *ordinals: int, step: int = 3, name: str = "video/0") -> Tensor:
    return latent_noise(config, ordinals, 7, step=step, name=name, device=CPU)


def target(count: int = 3) -> Tensor:
    return torch.randn(count, 7, 12, generator=torch.Generator().manual_seed(0))


def inference(config: LatentConfig, weight_std: float = 0.5) -> LatentInference:
    return build(lambda: LatentInference(config, 12), scope="latent", seed=0, weight_std=weight_std)


def infer(network: LatentInference, target: Tensor, noise: Tensor) -> Latent:
    """Of one mask over all tokens."""
    [latent] = network(target, [torch.arange(7).expand(len(target), -1)], [noise])
    return latent


@pytest.mark.parametrize("options", KINDS)
def test_noise_depends_on_seed_step_clip_and_mask_alone(options: dict[str, Any]) -> None:
    config = LatentConfig(**options)
    whole = noise(config, 5, 2, 9, 4)
    assert whole.shape == (4, 7 if config.per == "token" else 1, config.width)
    assert torch.equal(whole, torch.cat((noise(config, 5), noise(config, 2, 9), noise(config, 4))))
    others = (noise(config, 5, step=4), noise(config, 5, name="video/1"), noise(config, 6))
    for other in (*others, noise(LatentConfig(**options, seed=1), 5)):
        assert not torch.isclose(other, whole[:1]).any()


def test_noise_is_normal_for_gaussian_and_gumbel_for_discrete_latents() -> None:
    normal = noise(LatentConfig("gaussian", per="token", dim=100), *range(20)).flatten()
    gumbel = noise(LatentConfig("discrete", per="token", groups=10, codes=10), *range(20)).flatten()
    for x, mean, std in ((normal, 0.0, 1.0), (gumbel, 0.5772, math.pi / math.sqrt(6))):
        assert x.mean().item() == pytest.approx(mean, abs=0.05)
        assert x.std().item() == pytest.approx(std, rel=0.05)


def test_nats_are_the_divergence_from_the_prior() -> None:
    mean, log_variance = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    posterior = Independent(Normal(mean, (0.5 * log_variance).exp()), 1)
    prior = Independent(Normal(torch.zeros(6), torch.ones(6)), 1)
    torch.testing.assert_close(gaussian_nats(mean, log_variance), kl_divergence(posterior, prior))
    logits = 3 * torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(1))
    expected = kl_divergence(OneHotCategorical(logits=logits), OneHotCategorical(logits=torch.zeros(5))).sum(-1)
    torch.testing.assert_close(categorical_nats(logits), expected)
    certain = torch.zeros(1, 2, 5)
    certain[..., 3] = 1e4
    assert categorical_nats(certain).item() == pytest.approx(2 * math.log(5))


def test_codes_are_samples_of_the_softmax_with_its_gradient() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0]).requires_grad_()
    gumbel = noise(LatentConfig("discrete", per="token", groups=1, codes=3), *range(2000)).flatten(0, 1)
    codes = straight_through(logits + gumbel, 1.0)
    assert set(codes.detach().flatten().tolist()) == {0.0, 1.0}
    assert torch.equal(codes.sum(-1), torch.ones(len(gumbel)))
    torch.testing.assert_close(codes.mean(0).detach(), logits.softmax(0).detach(), atol=0.02, rtol=0)
    scale = torch.randn(codes.shape, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad(((logits + gumbel) / 0.5).softmax(-1).mul(scale).sum(), logits)
    found = torch.autograd.grad(straight_through(logits + gumbel, 0.5).mul(scale).sum(), logits)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", KINDS)
def test_a_latent_is_of_the_clip_or_of_each_token(options: dict[str, Any]) -> None:
    config = LatentConfig(**options)
    network, drawn = inference(config), noise(config, 0, 1, 2)
    latent = infer(network, target(), drawn)
    assert latent.value.shape == drawn.shape
    assert latent.nats.shape == (3,)
    shuffled = infer(network, target().flip(1), drawn.flip(1))
    torch.testing.assert_close(shuffled.value, latent.value.flip(1))
    torch.testing.assert_close(shuffled.nats, latent.nats, rtol=1e-5, atol=1e-5)  # another order of a sum
    changed = target()
    changed[1, 4] += 3
    is_other = (infer(network, changed, drawn).nats - latent.nats).abs() > 1e-4
    assert is_other.tolist() == [False, True, False], "another clip's target is not seen"


@pytest.mark.parametrize("options", KINDS)
def test_only_the_masked_places_are_seen(options: dict[str, Any]) -> None:
    config = LatentConfig(**options)
    network, masked = inference(config), [torch.tensor([[1, 2, 4]] * 3), torch.tensor([[0, 6]] * 3)]
    drawn = [latent_noise(config, (0, 1, 2), x.shape[1], step=0, name="", device=CPU) for x in masked]
    wanted, changed = network(target(), masked, drawn), target()
    changed[:, [0, 3, 5, 6]] += 1
    found = network(changed, masked, drawn)
    assert torch.equal(found[0].value, wanted[0].value)
    assert torch.equal(found[0].nats, wanted[0].nats)
    assert not torch.isclose(found[1].nats, wanted[1].nats).any()


def test_without_weights_a_latent_costs_nothing_and_is_the_prior_s() -> None:
    for options in KINDS:
        config = LatentConfig(**options)
        drawn = noise(config, 0, 1, 2)
        latent = infer(inference(config, weight_std=1e-9), target(), drawn)
        torch.testing.assert_close(latent.nats, torch.zeros(3), atol=1e-6, rtol=0)
        if config.kind == "gaussian":
            torch.testing.assert_close(latent.value, drawn)


@pytest.mark.parametrize("options", KINDS)
def test_gradients_reach_every_weight_and_not_the_target(options: dict[str, Any]) -> None:
    config = LatentConfig(**options)
    network, tokens = inference(config), target().requires_grad_()
    for of in (lambda latent: latent.nats.sum(), lambda latent: (latent.value * noise(config, 7, 8, 9)).sum()):
        network.zero_grad()
        of(infer(network, tokens, noise(config, 0, 1, 2))).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    assert tokens.grad is None


@pytest.mark.parametrize("options", KINDS)
def test_under_autocast_value_and_price_are_fp32(options: dict[str, Any]) -> None:
    config = LatentConfig(**options)
    network, drawn = inference(config), noise(config, 0, 1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = infer(network, target(), drawn)
        told = network.fc2(network.act(network.fc1(target())))
        told = told.mean(1, keepdim=True) if config.per == "clip" else told
    assert found.value.dtype == found.nats.dtype == torch.float32
    assert told.dtype == torch.bfloat16, "the network itself is not"
    wanted = infer(network, target(), drawn)
    torch.testing.assert_close(found.nats, wanted.nats, rtol=0.05, atol=0.05)


# ------------------------------------------------------------------------------------------------------ the predictor


def predictor(latent_dim: int) -> Predictor:
    config = PredictorConfig(12, 1, 12, embed_dim=24, depth=1, num_heads=2, latent_dim=latent_dim, mask_token_std=0.02)
    return create_predictor(config)


WHERE: dict[str, Any] = {
    "context": torch.arange(5).expand(3, -1),
    "masked": torch.arange(5, 12).expand(3, -1),
    "grid": (1, 3, 4),
    "modality": "image",
}


def test_a_latent_of_zeros_changes_no_bit_and_others_move_the_predictions() -> None:
    tokens = target()[:, :5]
    plain, latent = predictor(0), predictor(4)
    wanted = plain(tokens, **WHERE)[0]
    assert torch.equal(latent(tokens, **WHERE, latent=torch.zeros(3, 1, 4))[0], wanted)
    moved = latent(tokens, **WHERE, latent=torch.ones(3, 1, 4))[0]
    assert (moved != wanted).all()
    one = torch.zeros(3, 7, 4)
    one[0, 2] = 1
    moved = latent(tokens, **WHERE, latent=one)[0]
    assert (moved[0, 2] - wanted[0, 2]).norm() > 3 * (moved[0, 3] - wanted[0, 3]).norm() > 0
    assert torch.equal(moved[1:], wanted[1:])


def test_a_predictor_and_its_queries_agree_on_the_latent() -> None:
    tokens = target()[:, :5]
    with pytest.raises(ValueError, match="latent has 0 channels, the predictor's latent_dim=4"):
        predictor(4)(tokens, **WHERE)
    with pytest.raises(ValueError, match="latent has 4 channels, the predictor's latent_dim=0"):
        predictor(0)(tokens, **WHERE, latent=torch.zeros(3, 1, 4))


def test_impossible_settings_are_refused() -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"dim": 0}, r"latent\.dim=0 must be at least 1"),
        ({"codes": 1}, r"latent\.codes=1 must be at least 2"),
        ({"temperature": 0.0}, r"latent\.temperature=0\.0 must be positive"),
    ]
    for options, said in refused:
        with pytest.raises(ValueError, match=said):
            LatentConfig(**options)
    with pytest.raises(ValueError, match="nothing to infer"):
        LatentInference(LatentConfig(), 12)
