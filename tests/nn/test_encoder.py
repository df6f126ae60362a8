"""The encoder's public behaviour: sizes, token subsets, levels, modalities, dtypes."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

import vjepa
from vjepa.nn.encoder import Encoder, View, default_levels
from vjepa.nn.layers import Block
from vjepa.nn.predictor import PredictorConfig, Query
from vjepa.nn.rope import sincos_table
from vjepa.nn.tokenizer import as_product
from vjepa.registry import create_predictor

CLIP = (2, 3, 4, 64, 48)  # grid (2, 4, 3): 24 tokens


@pytest.fixture
def encoder() -> Encoder:
    return vjepa.create_model("vit_debug")


def clips(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape or CLIP, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("clip", [CLIP, (2, 3, 1, 64, 48)], ids=["video", "image"])
def test_patches_as_a_matrix_product_are_the_convolution(encoder: Encoder, clip: tuple[int, ...]) -> None:
    tokenizer, pixels = encoder.tokenizer, clips(*clip)
    projection = tokenizer.image if clip[2] == 1 else tokenizer.video
    assert projection is not None
    expected = projection(pixels).flatten(2).transpose(1, 2)
    found = as_product(pixels, projection)
    torch.testing.assert_close(found, expected)
    parameters = list(projection.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(found.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


def subset(count: int, *, of: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(of, generator=generator)[:count].sort().values for _ in range(2)])


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vit_base", 86_833_152),
        ("vit_large", 304_680_960),
        ("vit_giant", 1_013_267_968),
        ("vit_gigantic", 1_845_216_768),
    ],
)
def test_parameter_counts_are_the_reference_s(name: str, count: int) -> None:
    started = time.process_time()
    model = vjepa.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count
    assert time.process_time() - started < 5, "building on meta must not touch memory"


@pytest.mark.parametrize(
    ("dim", "depth", "levels", "count"),
    [(1408, 24, 4, 55_400_704), (1664, 24, 4, 59_433_472), (1024, 24, 4, 50_334_592)],
)
def test_predictor_counts_are_the_reference_s_less_six_untrained_mask_tokens(
    dim: int, depth: int, levels: int, count: int
) -> None:
    config = PredictorConfig(encoder_dim=dim, num_levels=levels, target_dim=levels * dim, depth=depth)
    predictor = create_predictor(config, device="meta")
    assert sum(p.numel() for p in predictor.parameters()) == count - 6 * 384


def test_every_listed_model_can_be_built_and_an_unknown_name_is_refused_with_a_hint() -> None:
    for name in vjepa.list_models():
        vjepa.create_model(name, device="meta")
    with pytest.raises(ValueError, match="Did you mean 'vit_large'"):
        vjepa.create_model("vit_larg")


def test_an_unknown_keyword_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        vjepa.create_model("vit_debug", mlp_ration=4)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("depth", "levels"),
    [(12, (2, 5, 8, 11)), (24, (5, 11, 17, 23)), (40, (9, 19, 29, 39)), (48, (11, 23, 35, 47)), (32, (7, 15, 23, 31))],
)
def test_default_levels_are_four_equally_spaced(depth: int, levels: tuple[int, ...]) -> None:
    assert default_levels(depth) == levels


def test_levels_must_end_with_the_last_block() -> None:
    with pytest.raises(ValueError, match="must end with the last block, 3"):
        vjepa.create_model("vit_debug", levels=(0, 2))
    with pytest.raises(ValueError, match="must end with the last block"):
        vjepa.create_model("vit_gigantic", levels=(12, 24, 36, 48), device="meta")  # the paper's numbers, from 1


def test_every_layer_norm_inside_the_modules_has_eps_1e_6(encoder: nn.Module) -> None:
    norms = [part for part in encoder.modules() if isinstance(part, nn.LayerNorm)]
    assert len(norms) == 2 * 4 + 4
    assert {norm.eps for norm in norms} == {1e-6}


def test_a_forward_pass_over_subsets_equals_each_subset_alone(encoder: Encoder) -> None:
    first, second = subset(10, seed=1), subset(5, seed=2)
    together = encoder(clips(), context=[first, second])
    for indices, tokens in zip((first, second), together, strict=True):
        torch.testing.assert_close(tokens, encoder(clips(), context=indices), atol=1e-6, rtol=0)


def test_video_and_image_in_one_pass_equal_each_alone(encoder: Encoder) -> None:
    image = clips(2, 3, 1, 32, 32, seed=3)
    both = encoder.forward_levels([View(clips(), (subset(10), None)), View(image)])
    [alone] = encoder.forward_levels([View(image)])
    torch.testing.assert_close(both[1][0], alone[0], atol=1e-6, rtol=0)
    assert [tuple(x.shape) for x in both[0]] == [(2, 10, 192), (2, 24, 192)]


def test_a_subset_of_all_tokens_is_the_full_pass(encoder: Encoder) -> None:
    every = torch.arange(24).expand(2, -1)
    torch.testing.assert_close(encoder(clips(), context=every), encoder(clips()), atol=1e-6, rtol=0)


def test_order_of_context_tokens_does_not_matter(encoder: Encoder) -> None:
    indices = subset(10)
    backwards = encoder(clips(), context=indices.flip(1)).flip(1)
    torch.testing.assert_close(backwards, encoder(clips(), context=indices), atol=1e-5, rtol=0)


def test_clips_of_a_batch_do_not_see_each_other(encoder: Encoder) -> None:
    changed = clips()
    changed[1] = 0
    torch.testing.assert_close(encoder(changed)[0], encoder(clips())[0], atol=1e-6, rtol=0)


def test_forward_is_the_last_level_of_forward_intermediates(encoder: Encoder) -> None:
    levels = encoder.forward_intermediates(clips())
    assert [tuple(x.shape) for x in levels] == [(2, 24, 48)] * 4
    assert torch.equal(levels[-1], encoder(clips()))


def test_dense_maps_put_tokens_in_time_height_width_order(encoder: Encoder) -> None:
    [tokens] = encoder.forward_intermediates(clips(), indices=[3])
    [dense] = encoder.forward_intermediates(clips(), indices=[3], output_fmt="NCTHW")
    assert dense.shape == (2, 48, 2, 4, 3)
    assert torch.equal(dense[:, :, 1, 2, 0], tokens[:, 1 * 12 + 2 * 3 + 0])


def test_blocks_without_a_level_norm_only_unnormed() -> None:
    encoder = vjepa.create_model("vit_debug", levels=(1, 3))
    with pytest.raises(ValueError, match="norm=False"):
        encoder.forward_intermediates(clips(), indices=[0])
    assert encoder.forward_intermediates(clips(), indices=[0], norm=False)[0].shape == (2, 24, 48)
    with pytest.raises(ValueError, match="does not exist"):
        encoder.forward_intermediates(clips(), indices=[4], norm=False)


def test_one_frame_goes_through_the_image_tokenizer() -> None:
    encoder = vjepa.create_model("vit_debug")
    image = clips(2, 3, 1, 32, 32)
    assert encoder.modality(image) == "image"
    with torch.no_grad():
        before = encoder(image)
        nn.init.zeros_(encoder.tokenizer.video.weight)
        assert torch.equal(encoder(image), before)


def test_without_an_image_tokenizer_a_frame_is_repeated_to_a_tubelet() -> None:
    encoder = vjepa.create_model("vit_debug", image_tokenizer=False)
    image = clips(2, 3, 1, 32, 32)
    assert encoder.modality(image) == "video"
    assert torch.equal(encoder(image), encoder(image.expand(-1, -1, 2, -1, -1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pure_half_precision_model_runs_forward(dtype: torch.dtype) -> None:
    encoder = vjepa.create_model("vit_debug")
    reference = encoder(clips())
    half = encoder.to(dtype)
    tokens = half(clips().to(dtype))
    assert tokens.dtype == dtype
    assert (tokens.float() - reference).norm() / reference.norm() < 0.05


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 3, 32, 32), "must be"), ((2, 3, 4, 33, 32), "height 33"), ((2, 3, 3, 32, 32), "3 frames")],
)
def test_clips_that_do_not_fit_the_patches_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vjepa.create_model("vit_debug")(torch.zeros(shape))


def test_initialisation_depends_on_seed_and_name_alone() -> None:
    one, same, other = (vjepa.create_model("vit_debug", seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    narrow = vjepa.create_model("vit_debug", levels=(3,), seed=1).state_dict()
    assert torch.equal(one["blocks.2.mlp.fc1.weight"], narrow["blocks.2.mlp.fc1.weight"])


def test_initialisation_follows_the_reference_s_rules() -> None:
    state = vjepa.create_model("vit_tiny").state_dict()
    assert state["blocks.3.mlp.fc1.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state["blocks.7.mlp.fc2.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.05)  # sqrt(2 * 8)
    assert state["blocks.0.attn.proj.weight"].std().item() == pytest.approx(0.02 / 2**0.5, rel=0.05)
    assert state["tokenizer.video_embed"].abs().max() < 1e-5
    assert not state["blocks.0.attn.qkv.bias"].any()


def test_encoder_and_predictor_do_not_start_with_the_same_numbers() -> None:
    encoder = vjepa.create_model("vit_debug")
    config = PredictorConfig(encoder_dim=48, num_levels=4, target_dim=192, embed_dim=48, depth=2, num_heads=3)
    predictor = create_predictor(config)
    mine, theirs = encoder.blocks[0], predictor.blocks[0]
    assert isinstance(mine, Block)
    assert isinstance(theirs, Block)
    assert not torch.equal(mine.attn.qkv.weight, theirs.attn.qkv.weight)


def test_predictor_queries_in_one_pass_equal_each_alone() -> None:
    config = PredictorConfig(encoder_dim=48, num_levels=4, target_dim=192, embed_dim=24, depth=2, num_heads=2)
    predictor = create_predictor(config)
    order = subset(24)
    video = Query(clips(2, 10, 192), order[:, :10], order[:, 10:20], (2, 4, 3), "video")
    image = Query(clips(2, 3, 192, seed=1), order[:, :3] % 12, order[:, 20:] % 12, (1, 4, 3), "image")
    for query, (predicted, visible) in zip((video, image), predictor.forward_queries([video, image]), strict=True):
        alone = predictor(
            query.tokens, context=query.context, masked=query.masked, grid=query.grid, modality=query.modality
        )
        torch.testing.assert_close(predicted, alone[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(visible, alone[1], atol=1e-6, rtol=0)


def test_absolute_position_tells_places_apart_that_relative_ones_do_not() -> None:
    from vjepa.registry import create_encoder, model_config

    config = model_config("vit_debug", absolute_position=1.0)
    encoder = create_encoder(config)
    same = torch.ones(1, 3, 2, 16, 16)
    rope_only = vjepa.create_model("vit_debug")
    one_place = torch.tensor([[0]])
    another = torch.tensor([[5]])
    clip = same.repeat(1, 1, 1, 2, 3)
    assert torch.equal(rope_only(clip, context=one_place), rope_only(clip, context=another))
    assert not torch.allclose(encoder(clip, context=one_place), encoder(clip, context=another), atol=1e-3)
    assert encoder.state_dict().keys() == rope_only.state_dict().keys(), "positions are fixed, not learned"


def test_absolute_position_is_added_to_every_token_of_the_predictor() -> None:
    """Context and mask tokens alike, at their own places and with the model's strength and base."""
    from vjepa.config import ModelConfig, PredictorSettings, build_models

    def sequence(strength: float) -> Tensor:
        model = ModelConfig("vit_debug", absolute_position=strength, absolute_position_base=10.0)
        encoder, predictor = build_models(model, PredictorSettings(embed_dim=48, depth=1, num_heads=3), seed=0)
        tokens = torch.zeros(1, 2, predictor.config.num_levels * encoder.embed_dim)
        return predictor._sequence(torch.ones(1, 2, 48), Query(tokens, context, masked, (2, 4, 4), "video"))

    context, masked = torch.tensor([[0, 9]]), torch.tensor([[31, 4, 5]])
    table = sincos_table((2, 4, 4), 48, 10.0, True, torch.device("cpu"))
    assert len(torch.unique(table, dim=0)) == 32, "every place has its own"
    torch.testing.assert_close(sequence(3.0) - sequence(0.0), 3.0 * table[[0, 9, 31, 4, 5]][None])


def test_absolute_positions_of_a_larger_grid_are_those_of_rope() -> None:
    """Scaled to the same range where RoPE's are, so that a larger crop has no place the encoder never saw."""
    cpu = torch.device("cpu")
    small, large = (sincos_table((1, size, size), 48, 10.0, True, cpu).unflatten(0, (size, size)) for size in (4, 7))
    torch.testing.assert_close(large[::2, ::2], small)
    as_they_are = sincos_table((1, 7, 7), 48, 10.0, False, cpu).unflatten(0, (7, 7))
    torch.testing.assert_close(as_they_are[:4, :4].flatten(0, 1), sincos_table((1, 4, 4), 48, 10.0, False, cpu))


def test_initial_weights_have_the_spread_that_is_asked_for() -> None:
    from vjepa.config import ModelConfig, PredictorSettings, build_models

    encoder, predictor = build_models(ModelConfig("vit_tiny", init_std=0.05), PredictorSettings(depth=2), seed=0)
    for module in (encoder, predictor):
        assert module.state_dict()["blocks.1.mlp.fc1.weight"].std().item() == pytest.approx(0.05, rel=0.05)


def test_the_base_of_the_rotation_reaches_encoder_and_predictor() -> None:
    from vjepa.config import ModelConfig, PredictorSettings

    model = ModelConfig("vit_debug", rope_base=100.0, interpolate_rope=False)
    encoder = model.encoder_config()
    predictor = PredictorSettings(embed_dim=48, num_heads=3).predictor_config(encoder)
    assert (encoder.rope_base, predictor.rope_base) == (100.0, 100.0)
    assert (encoder.interpolate_rope, predictor.interpolate_rope) == (False, False)
