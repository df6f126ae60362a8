"""A latent that copies the target is seen and cured, one that is ignored too, on any number of ranks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.latent_bypass import objective as toy
from tests.benchmarks.latent_bypass import train
from tests.objectives.test_losses import micro_batch
from tests.train.ranks import on_ranks, train_debug
from tests.train.test_trainer import DebugRun, numbers, rows
from vjepa.config import ModelConfig, PredictorSettings
from vjepa.nn.flops import latent_flops, predictor_flops
from vjepa.nn.latent import LatentConfig, LatentInference
from vjepa.objectives import JEPA, ObjectiveConfig, build_objective
from vjepa.objectives.config import EmbeddingConfig
from vjepa.objectives.jepa import LATENT
from vjepa.train.diagnostics import AlarmConfig, CollapseAlarms
from vjepa.train.latents import latent_diagnostics

PER_TOKEN: dict[str, Any] = {"kind": "gaussian", "per": "token"}
MEASURES = "diag/video/latent/"


def alarms_of(latent: Mapping[str, Any], weight: float | None) -> tuple[list[str], dict[str, float]]:
    """The latent's alarms of a run of 100 steps that is looked at every 20, and its last row."""
    watch, texts, row = CollapseAlarms(AlarmConfig(warmup_steps=50)), [], {}
    for step, row in train(toy(latent, weight, seed=0), 100, 20, seed=0):
        texts += watch.observe(step, row)
    return texts, row


def test_a_latent_that_copies_the_target_raises_the_alarm() -> None:
    texts, row = alarms_of(PER_TOKEN, None)
    assert texts
    assert all("video latent: context_reliance" in text and "latent bypass" in text for text in texts)
    assert "raise objective.terms.latent_information.weight" in texts[0]
    assert row[MEASURES + "nats"] > 1000, "of 0.69 that the context does not tell"
    assert row[MEASURES + "reliance"] > 0.9
    assert row["loss/masked_prediction"] < 0.15, "the loss is content"


def test_a_price_cures_it_and_the_latent_is_still_used() -> None:
    texts, row = alarms_of(PER_TOKEN, 0.003)
    assert not texts
    assert row[MEASURES + "context_reliance"] > 0.3
    assert row[MEASURES + "reliance"] > 0.3
    assert 0.69 < row[MEASURES + "nats"] < 60
    assert row["loss/masked_prediction"] < 0.35, "without a latent it is 0.55 by then"


# ------------------------------------------------------------------------------------------------------- the measures


def objective(kind: str = "gaussian", *, std: float = 0.02, **options: Any) -> JEPA:
    config = ObjectiveConfig(
        latent=LatentConfig(kind=kind, **options),  # pyright: ignore[reportArgumentType]
        terms={"masked_prediction": {}, "context_prediction": {}, "latent_information": {"weight": 0.5}},
    )
    settings = PredictorSettings(embed_dim=48, depth=2, num_heads=3, mask_token_std=0.02)
    return build_objective(config, ModelConfig(name="vit_debug", init_std=std), settings, seed=0)


def measured(model: JEPA) -> dict[str, float]:
    outputs = model(micro_batch("video", "image", batch=4), 0).outputs
    return {name: value.item() for name, value in latent_diagnostics(model, outputs).items()}


def test_a_latent_that_nothing_reads_is_relied_on_for_nothing() -> None:
    model = objective(std=0.2)
    found = measured(model)
    assert abs(found["diag/video/latent/reliance"]) > 1e-3
    assert model.predictor is not None
    assert model.predictor.latent_embed is not None
    nn.init.zeros_(model.predictor.latent_embed.weight)
    found = measured(model)
    assert [found[f"diag/{m}/latent/reliance"] for m in ("video", "image")] == pytest.approx([0, 0], abs=1e-5)


def test_a_predictor_that_reads_no_context_is_seen_to_rely_on_the_latent_alone() -> None:
    model = objective(std=0.2)
    assert model.predictor is not None
    nn.init.zeros_(model.predictor.get_parameter("embed.0.weight"))
    for block in model.predictor.blocks:
        nn.init.zeros_(block.get_parameter("attn.proj.weight"))  # another clip's places are not read either
    found = measured(model)
    assert found["diag/video/latent/context_reliance"] == pytest.approx(0, abs=1e-5)
    assert abs(found["diag/video/latent/reliance"]) > 1e-3


def test_one_clip_alone_has_a_price_and_no_shares() -> None:
    model = objective()
    outputs = model(micro_batch("video", batch=1), 0).outputs
    assert list(latent_diagnostics(model, outputs)) == ["diag/video/latent/nats"]
    plain = build_objective(ObjectiveConfig(), ModelConfig("vit_debug"), PredictorSettings(48, 1, 3), seed=0)
    assert not latent_diagnostics(plain, plain(micro_batch("video"), 0).outputs)


def test_a_bypass_is_no_alarm_where_the_latent_is_not_used() -> None:
    watch = CollapseAlarms(AlarmConfig(warmup_steps=0, consecutive=1))
    row = {MEASURES + "context_reliance": 0.0, MEASURES + "reliance": 0.1, MEASURES + "nats": 0.0}
    assert not watch.observe(1, row)
    assert list(watch.observe_named(2, row | {MEASURES + "reliance": 0.9})) == ["video/latent/context_reliance"]


# ------------------------------------------------------------------------------------------------------ the objective


@pytest.mark.parametrize("kind", ["gaussian", "discrete"])
@pytest.mark.parametrize("per", ["clip", "token"])
def test_the_price_is_a_term_and_every_weight_gets_a_gradient(kind: str, per: str) -> None:
    model = objective(kind, per=per)
    result = model(micro_batch("video", "image"), 0)
    video = result.outputs["video"]
    assert [latent.value.shape[1] for latent in video.latents] == [
        1 if per == "clip" else mask.masked.shape[1] for mask in video.masks
    ]
    nats = torch.stack([latent.nats.mean() for latent in video.latents]).mean()
    assert result.metrics["loss/latent_information/video"].item() == pytest.approx(nats.item())
    total = sum(0.5 * value for name, value in result.metrics.items() if name.startswith("loss/") and _counts(name))
    assert result.loss.item() == pytest.approx(float(total), rel=1e-6)
    result.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(p.grad is not None and p.grad.any() for p in model.heads[LATENT].parameters())
    assert model.weights_at(0, ["video"])["weight/latent_information/video"] == 0.5


def _counts(name: str) -> bool:
    """The terms of both modalities at step 0, where context prediction has no weight: 1 for one, 0.5 for the other."""
    return name in ("loss/masked_prediction/video", "loss/masked_prediction/image", "loss/latent_information")


def test_a_clip_s_latent_does_not_depend_on_its_neighbours_in_the_batch() -> None:
    model, batch = objective(std=0.2), micro_batch("video", batch=4)
    whole = model(batch, 5).outputs["video"].latents
    parts = [model({"video": batch["video"].take(part)}, 5) for part in (slice(0, 1), slice(1, 4))]
    for index, latent in enumerate(whole):
        halves = [part.outputs["video"].latents[index] for part in parts]
        torch.testing.assert_close(torch.cat([half.value for half in halves]), latent.value, atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.cat([half.nats for half in halves]), latent.nats, atol=1e-5, rtol=1e-5)
    assert not torch.equal(model(batch, 6).outputs["video"].latents[0].value, whole[0].value)


def test_operations_are_counted_as_torch_counts_them() -> None:
    for per in ("clip", "token"):
        model = objective(hidden_dim=40, per=per)
        assert model.predictor is not None
        batch = micro_batch("video")["video"]
        target = torch.zeros(2, 64, model.predictor.config.target_dim)
        config, counts = model.config.latent, [mask.masked.shape[1] for mask in batch.masks]

        def run(model: JEPA = model, batch: Any = batch, target: Tensor = target) -> None:
            model._infer(batch, target, 0)

        with FlopCounterMode(display=False) as inferred:
            run()
        latents = [1 if config.per == "clip" else count for count in counts]
        read = 2 * 2 * config.width * model.predictor.config.embed_dim * sum(latents)
        assert latent_flops(config, model.predictor.config, 2, 64, counts) == inferred.get_total_flops() + read
        [mask, _] = batch.masks
        where: dict[str, Any] = {"context": mask.context, "masked": mask.masked, "grid": batch.grid}
        context = torch.zeros(2, mask.context.shape[1], 4 * 48)
        with FlopCounterMode(display=False) as predicted, sdpa_kernel(SDPBackend.MATH):
            model.predictor(context, **where, modality="video", latent=torch.zeros(2, latents[0], config.width))
        lengths = (mask.context.shape[1], mask.masked.shape[1])
        plain = predictor_flops(model.predictor.config, 2, [lengths])
        assert predicted.get_total_flops() == plain + 2 * 2 * config.width * 48 * latents[0]


def test_what_does_not_go_together_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    settings, model = PredictorSettings(48, 1, 3), ModelConfig("vit_debug")

    def build(**options: Any) -> JEPA:
        return build_objective(ObjectiveConfig(**options), model, settings, seed=0, device="meta")

    with pytest.raises(ValueError, match="is for a predictor"):
        ObjectiveConfig(target="none", latent=LatentConfig("gaussian"))
    with pytest.raises(ValueError, match=r"objective\.terms\.latent_information needs objective\.latent\.kind="):
        build(terms={"masked_prediction": {}, "latent_information": {}})
    with pytest.raises(ValueError, match="call the term or embedding 'latent' something else"):
        build(latent=LatentConfig("discrete"), embeddings={"latent": EmbeddingConfig()})
    plain = build()
    with pytest.raises(ValueError, match="has 16 channels, the predictor's latent_dim=0"):
        JEPA(ObjectiveConfig(latent=LatentConfig("gaussian")), plain.encoder, plain.predictor)
    with caplog.at_level(logging.WARNING):
        built = build(latent=LatentConfig("gaussian"))
    assert "nothing limits what the latent tells" in caplog.text
    assert all(parameter.is_meta for parameter in built.parameters())
    assert isinstance(built.heads[LATENT], LatentInference)


# ------------------------------------------------------------------------------------------------------------ the run

SETTINGS = ("train.steps=8", "train.diagnostics_every=2", "objective.latent.per=token")


@pytest.fixture(scope="module")
def alone(debug_run: DebugRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return debug_run(tmp_path_factory.mktemp("alone") / "run", *SETTINGS, options=["latent"])


@pytest.mark.distributed
def test_looking_at_shards_every_second_step_leaves_the_numbers_of_one_process(
    alone: Path, debug_shards: Path, tmp_path: Path
) -> None:
    """The predictor lets go of what it gathered. (Without looking: tests/objectives/test_every_objective.py.)"""
    arguments = (*SETTINGS, "train.parallel.mode=fsdp", "--option", "latent")
    on_ranks(2, train_debug, tmp_path / "run", debug_shards, *arguments)
    assert_equal(rows(tmp_path / "run"), rows(alone))


def test_micro_batches_have_the_numbers_of_one_batch(alone: Path, debug_run: DebugRun, tmp_path: Path) -> None:
    sizes = [f"train.micro_batch.{modality}=3" for modality in ("video", "image")]
    assert_equal(rows(debug_run(tmp_path / "run", *SETTINGS, *sizes, options=["latent"])), rows(alone))


def assert_equal(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    assert [row["step"] for row in found] == list(range(1, 9))
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        for name in [name for name in theirs if name.startswith("loss")]:
            # Of per-token latents the price is a sum over all tokens.
            assert mine[name] == pytest.approx(theirs[name], abs=5e-6, rel=2e-5), f"{name} at step {mine['step']}"
        assert set(mine) == set(theirs)


def test_looking_changes_no_bit_and_a_resumed_run_goes_on_alike(
    alone: Path, debug_run: DebugRun, tmp_path: Path
) -> None:
    unseen = (*SETTINGS, "train.diagnostics_every=100")
    run = debug_run(tmp_path / "run", *unseen, options=["latent"])
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(alone)]
    before = numbers(run)
    (run / "checkpoints" / "step_00000008").rename(tmp_path / "aside")
    debug_run(run, *unseen, options=["latent"], resume=True)
    assert numbers(run) == before
