"""Block-causal attention: a token sees its own and earlier time steps, whichever tokens are there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch._dynamo as dynamo
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

import vjepa
from tests.objectives.test_losses import micro_batch
from vjepa.config import ModelConfig, PredictorSettings, build_models
from vjepa.hub import save_pretrained
from vjepa.nn.attention import Segments, block_causal_bias, sdpa
from vjepa.nn.encoder import Encoder, View
from vjepa.objectives.jepa import JEPA, ObjectiveConfig
from vjepa.train.distributed import World
from vjepa.train.parallel import Activations, ParallelConfig, parallelise

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
STEP = 12  # tokens of a time step: the grid is (3, 4, 3)


def encoder(**options: str) -> Encoder:
    return vjepa.create_model("vit_debug", attention_mask="block_causal", **options)  # pyright: ignore[reportArgumentType]


def clips(frames: int = 6) -> Tensor:
    return torch.randn(2, 3, 6, 64, 48, generator=torch.Generator().manual_seed(0))[:, :, :frames]


def subset(count: int, seed: int) -> Tensor:
    """Tokens in no order, other ones of each clip, and other numbers of each time step."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(3 * STEP, generator=generator)[:count] for _ in range(2)])


@pytest.mark.parametrize("indices", [None, subset(20, 1)], ids=["all tokens", "some tokens"])
def test_a_later_frame_changes_no_earlier_token(indices: Tensor | None) -> None:
    changed = clips()
    changed[:, :, 4:] += 1  # the third time step
    places = torch.arange(3 * STEP).expand(2, -1) if indices is None else indices
    is_earlier = places < 2 * STEP
    for mask in ("block_causal", "full"):
        model = vjepa.create_model("vit_debug", attention_mask=mask)
        levels, again = (model.forward_intermediates(x, context=indices) for x in (clips(), changed))
        for before, after in zip(levels, again, strict=True):
            assert torch.equal(before[is_earlier], after[is_earlier]) is (mask == "block_causal")
            assert not torch.equal(before[~is_earlier], after[~is_earlier])


def test_the_first_time_steps_are_those_of_a_shorter_clip() -> None:
    model = encoder()
    torch.testing.assert_close(model(clips(4)), model(clips())[:, : 2 * STEP], atol=1e-5, rtol=0)
    torch.testing.assert_close(vjepa.create_model("vit_debug")(clips(2)), model(clips())[:, :STEP], atol=1e-5, rtol=0)


def test_one_time_step_and_full_attention_change_no_bit() -> None:
    full = vjepa.create_model("vit_debug")
    for one in (clips(1), clips(2)):
        assert torch.equal(encoder()(one), full(one))
    segments, chosen = encoder()._states([View(clips(1))], {0}), full._states([View(clips())], {0})
    assert [part.bias for part in (*segments[1], *chosen[1])] == [None, None]
    assert full._bias((3, 4, 3), None, torch.zeros(2, 36, 48)) is None


def test_image_and_video_in_one_pass_equal_each_alone() -> None:
    model = encoder()
    views = [View(clips(), (subset(20, 1), None)), View(clips(1), (subset(9, 2) % STEP,))]
    together = model.forward_levels(views)
    for view, found in zip(views, together, strict=True):
        for indices, tokens in zip(view.contexts, found, strict=True):
            [[alone]] = model.forward_levels([View(view.clips, (indices,))])
            torch.testing.assert_close(tokens, alone, atol=1e-5, rtol=0)


def layout_of(steps: Sequence[Tensor], dtype: torch.dtype) -> list[Segments]:
    return [Segments(x.shape[0], x.shape[1], bias=block_causal_bias(x, dtype)) for x in steps]


def step_by_step(q: Tensor, k: Tensor, v: Tensor, steps: Tensor) -> Tensor:
    """Each time step's tokens over those of the steps so far, without any bias; q, k, v [N, A, d], steps [B, K]."""
    q, k, v = (x.unflatten(0, tuple(steps.shape)) for x in (q, k, v))
    out = torch.empty_like(q)
    for clip in range(len(steps)):
        for step in steps[clip].unique():
            now, so_far = steps[clip] == step, steps[clip] <= step
            asking, key, value = (
                x[clip, chosen].transpose(0, 1)[None] for x, chosen in ((q, now), (k, so_far), (v, so_far))
            )
            out[clip, now] = F.scaled_dot_product_attention(asking, key, value)[0].transpose(0, 1)
    return out.flatten(0, 1)


def test_the_bias_is_a_loop_over_time_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = [torch.randint(4, (3, 11), generator=generator), torch.randint(2, (2, 5), generator=generator)]
    q, k, v = torch.randn(3, 43, 2, 8, generator=generator)
    expected = torch.cat(
        [
            step_by_step(one_q, one_k, one_v, steps)
            for steps, one_q, one_k, one_v in zip(
                groups, q.split([33, 10]), k.split([33, 10]), v.split([33, 10]), strict=True
            )
        ]
    )
    torch.testing.assert_close(sdpa(q, k, v, layout_of(groups, q.dtype)), expected, atol=1e-6, rtol=0)


def test_gradients_are_those_of_differences_and_none_comes_from_the_future() -> None:
    steps = torch.tensor([[1, 0, 2, 0, 1]])
    layout = layout_of([steps], torch.float64)
    q, k, v = torch.randn(3, 5, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda q, k, v: sdpa(q, k, v, layout), inputs)
    frames = clips().requires_grad_()
    encoder()(frames)[:, :STEP].square().sum().backward()
    assert frames.grad is not None
    assert frames.grad[:, :, :2].abs().min() > 0
    assert not frames.grad[:, :, 2:].any()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputed_activations_change_no_bit(precision: str) -> None:
    found = {activations: _step(activations, precision) for activations in ("keep", "selective", "recompute")}
    assert torch.equal(found["selective"], found["keep"])
    assert torch.equal(found["recompute"], found["keep"])


def _step(activations: Activations, precision: str) -> Tensor:
    """Loss and the first block's gradient of one step."""
    model = ModelConfig("vit_debug", attention_mask="block_causal")
    models = build_models(model, PredictorSettings(embed_dim=48, depth=1, num_heads=3), seed=0)
    objective = JEPA(ObjectiveConfig(), *models)
    parallelise(objective, ParallelConfig(activations=activations), ALONE, precision=precision)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        loss = objective(micro_batch("video", "image"), 0).loss
    loss.backward()
    gradient = objective.encoder.get_parameter("blocks.0.attn.qkv.weight").grad
    assert gradient is not None
    return torch.cat((loss.detach()[None], gradient.flatten()))


@pytest.mark.filterwarnings("ignore")  # torch.compile itself uses what torch calls deprecated
def test_compiled_blocks_are_one_graph_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vjepa.train.parallel.COMPILER", "aot_eager")
    dynamo.reset()
    counters.clear()
    model = ModelConfig("vit_debug", attention_mask="block_causal")
    settings = PredictorSettings(embed_dim=48, depth=1, num_heads=3)
    (plain, _), (compiled, predictor) = (build_models(model, settings, seed=0) for _ in range(2))
    parallelise(JEPA(ObjectiveConfig(), compiled, predictor), ParallelConfig(compile=True), ALONE, precision="fp32")
    for kept in (5, 6, 9, 15, 22, 28):
        view = View(clips(), (subset(kept, 1), subset(kept + 3, 2)))
        [wanted], [found] = (encoder.forward_levels([view]) for encoder in (plain, compiled))
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
        found[0].sum().backward()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 2


def test_weights_that_travel_keep_their_mask_and_older_ones_have_none(tmp_path: Path) -> None:
    model = encoder()
    save_pretrained(model, tmp_path)
    again = vjepa.from_pretrained(tmp_path)
    assert again.config.attention_mask == "block_causal"
    assert torch.equal(again(clips()), model(clips()))
    with pytest.raises(ValueError, match="attention=varlen cannot do attention_mask=block_causal"):
        vjepa.from_pretrained(tmp_path, attention="varlen")
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["encoder"]["attention_mask"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert torch.equal(vjepa.from_pretrained(tmp_path)(clips()), vjepa.create_model("vit_debug")(clips()))


@pytest.mark.parametrize("backend", ["xformers", "varlen"])
def test_a_backend_that_cannot_is_refused_by_name(backend: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.attention={backend} cannot do attention_mask=block_causal"):
        ModelConfig("vit_debug", attention_mask="block_causal", attention=backend)  # pyright: ignore[reportArgumentType]
    ModelConfig("vit_debug", attention=backend)  # pyright: ignore[reportArgumentType]
    for able in ("auto", "sdpa"):
        model = ModelConfig("vit_debug", attention_mask="block_causal", attention=able)
        assert model.encoder_config().attention_mask == "block_causal"
    with pytest.raises(ValueError, match="attention_mask='causal' is unknown: choose full or block_causal"):
        vjepa.create_model("vit_debug", attention_mask="causal")  # pyright: ignore[reportArgumentType]
