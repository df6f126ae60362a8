"""Online probes say how good features are, learn nothing but labels, and change no number of the training."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.train.ranks import on_ranks, train_debug
from tests.train.test_trainer import DebugRun, numbers, rows
from vjepa.batch import Batch, Mask
from vjepa.objectives.terms import Outputs
from vjepa.train.config import BatchConfig, TrainConfig
from vjepa.train.distributed import ALONE, init_world
from vjepa.train.probes import AttentivePool, OnlineProbes, ProbeConfig

DIM, TOKENS, CLIPS, CLASSES = 16, 6, 24, 3
LABELS = {"label": "labels.kind", "classes": CLASSES}
PROBE = ("train.probe.label=labels.direction", "train.probe.classes=8", "train.steps=12", "train.diagnostics_every=4")


def clips_of(
    step: int, *, strength: float = 2.0, clips: int = CLIPS, labelled: Callable[[int], bool] = lambda _: True
) -> tuple[Outputs, Batch]:
    """Clips whose class is in one of their tokens, the rest noise; the first level is zero."""
    generator = torch.Generator().manual_seed(step)
    kinds = torch.randint(CLASSES, (clips,), generator=generator)
    tokens = torch.randn(clips, TOKENS, DIM, generator=generator)
    tokens[:, 2] = strength * 4 * F.one_hot(kinds, DIM) + (torch.arange(DIM) == DIM - 1) * strength * 4
    target = torch.cat([torch.zeros_like(tokens), tokens], dim=-1)
    indices = torch.arange(TOKENS).expand(clips, -1)
    mask = Mask(indices[:, :4], indices[:, 4:])
    outputs = Outputs("video", (1, 2, 3), 2, (mask,), [target[:, :4]], [], [], target)
    extra = {"labels": [{"kind": int(kind)} if labelled(i) else None for i, kind in enumerate(kinds)]}
    keys = tuple(f"clip{i}" for i in range(clips))
    return outputs, Batch("video", step, tuple(range(clips)), keys, (), (mask,), (1, 2, 3), extra)


def probes(**options: Any) -> OnlineProbes:
    return OnlineProbes(ProbeConfig(**LABELS | options), DIM, ALONE)


def figures(probe: OnlineProbes) -> dict[str, float]:
    return {name.removeprefix("probe/"): value.item() for name, value in probe.figures().items()}


def trained(probe: OnlineProbes, steps: int = 60, **options: Any) -> dict[str, float]:
    """The figures of the second half of some steps."""
    for step in range(steps):
        if step == steps // 2:
            probe.figures()
        probe.observe(*clips_of(step, **options))
    return figures(probe)


@pytest.mark.parametrize("features", ["target", "encoder"])
def test_both_probes_find_a_class_that_is_there_and_none_in_noise(features: str) -> None:
    found = trained(probes(features=features, lr=0.02))
    assert found["labelled"] == 30 * CLIPS
    assert found["knn/accuracy"] > 0.9
    assert found["attentive/accuracy"] > 0.9
    assert found["attentive/loss"] < 0.4
    noise = trained(probes(features=features, lr=0.02), strength=0.0)
    assert 0.2 < noise["knn/accuracy"] < 0.5
    assert 0.2 < noise["attentive/accuracy"] < 0.5


def test_the_query_learns_to_look_at_the_token_that_tells() -> None:
    probe = probes(lr=0.02)
    trained(probe, strength=1.0)
    outputs, _ = clips_of(1000, strength=1.0)
    assert outputs.target is not None
    tokens = F.layer_norm(outputs.target[..., DIM:], (DIM,))
    attention = (tokens @ probe.attentive.query / DIM**0.5).softmax(dim=-1).mean(dim=0)
    assert attention.argmax() == 2
    assert attention[2] > 2 / TOKENS


def test_the_pool_is_attention_with_one_query() -> None:
    pool = AttentivePool(DIM, CLASSES)
    tokens = torch.randn(5, 7, DIM)
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.copy_(torch.randn_like(parameter))
    normed = F.layer_norm(tokens, (DIM,))
    pooled = F.scaled_dot_product_attention(pool.query.expand(5, 1, -1), normed, normed).squeeze(1)
    torch.testing.assert_close(pool(tokens), pooled @ pool.weight.T + pool.bias)


def test_the_queue_keeps_the_last_labelled_clips() -> None:
    probe = probes(queue=30, neighbours=5)
    for step in range(4):
        probe.observe(*clips_of(step, labelled=lambda i: i % 2 == 0))
    assert probe.pushed == 4 * CLIPS // 2
    assert (probe.labels[:-1] >= 0).all()
    newest = [features_of(clips_of(step)[0])[::2] for step in (1, 2, 3)]  # 36 clips, of which 30 stay
    kept = {tuple(row) for row in probe.features[:-1].tolist()}
    assert kept == {tuple(row) for row in torch.cat(newest)[-30:].tolist()}


def test_a_copy_of_the_state_goes_on_with_the_same_figures() -> None:
    first, second = probes(), probes()
    trained(first, steps=6)
    second.load_state(copy.deepcopy(first.state()))
    for step in (7, 8):
        for probe in (first, second):
            probe.observe(*clips_of(step))
    assert figures(first) == figures(second)
    assert torch.equal(first.attentive.weight, second.attentive.weight)


def features_of(outputs: Outputs) -> Tensor:
    assert outputs.target is not None
    return F.normalize(outputs.target[..., DIM:].mean(dim=1), dim=-1)


def test_clips_without_a_label_count_for_nothing(caplog: pytest.LogCaptureFixture) -> None:
    probe = probes()
    before = probe.attentive.weight.clone()
    probe.observe(*clips_of(0, labelled=lambda _: False))
    assert (
        "train.probe.label=labels.kind: no video clip of the first batch has it; its records carry labels"
        in caplog.text
    )
    assert torch.equal(probe.attentive.weight, before)
    assert (probe.labels[:-1] < 0).all()
    assert figures(probe) == dict.fromkeys(("labelled", "knn/accuracy", "attentive/accuracy", "attentive/loss"), 0.0)


def test_features_that_are_not_finite_do_not_end_the_probes() -> None:
    probe = probes()
    outputs, batch = clips_of(0)
    assert outputs.target is not None
    outputs.target[3] = torch.nan
    probe.observe(outputs, batch)
    assert figures(probe)["labelled"] == CLIPS - 1
    assert all(parameter.isfinite().all() for parameter in probe.attentive.parameters())
    assert probe.features[:-1].isfinite().all()


def test_a_class_out_of_range_is_refused_by_name() -> None:
    outputs, batch = clips_of(0)
    batch.extra["labels"][5] = {"kind": 3}
    with pytest.raises(ValueError, match=r"train\.probe\.label=labels\.kind: clip clip5 has 3, .*0 to 2"):
        probes().observe(outputs, batch)


def test_features_that_are_not_there_are_refused() -> None:
    outputs, batch = clips_of(0)
    given = Outputs("video", (1, 2, 3), 2, outputs.masks, [], [], [], outputs.context[0])
    with pytest.raises(ValueError, match=r"train\.probe\.features=encoder: there are none here"):
        probes(features="encoder").observe(given, batch)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"label": "kind"}, r"needs probe\.classes of at least 2"),
        ({"neighbours": 0}, r"probe\.neighbours=0 must be between 1 and probe\.queue"),
        ({"lr": 0.0}, r"probe\.lr=0.0 must be positive"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ProbeConfig(**wrong)


@pytest.mark.parametrize("batch", [BatchConfig(video=0, image=8), BatchConfig(video=9, image=8)])
def test_the_queue_must_hold_a_batch_and_the_modality_must_be_on(batch: BatchConfig) -> None:
    with pytest.raises(ValueError, match=r"train\.probe\.modality=video: train\.batch\.video=[09] must be 1 to .*=8"):
        TrainConfig(batch=batch, probe=ProbeConfig(**LABELS, queue=8, neighbours=2))


# --------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def probed(debug_run: DebugRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return debug_run(tmp_path_factory.mktemp("probed") / "run", *PROBE)


def test_probes_change_no_number_of_the_training(probed: Path, debug_run: DebugRun, tmp_path: Path) -> None:
    plain = debug_run(tmp_path / "run", *PROBE[2:])
    found = numbers(probed)
    assert [row["step"] for row in found if "probe/knn/accuracy" in row] == [1, 4, 8, 12]
    assert [row["probe/labelled"] for row in found if "probe/labelled" in row] == [12, 36, 48, 48]
    without = [{name: value for name, value in row.items() if not name.startswith("probe/")} for row in found]
    assert without == numbers(plain)
    weights = "exports/primary/model.safetensors"
    assert (probed / weights).read_bytes() == (plain / weights).read_bytes()


def test_a_resumed_run_logs_the_same_figures_bit_for_bit(probed: Path, debug_run: DebugRun, tmp_path: Path) -> None:
    """From step 10, between two logged figures."""
    run = debug_run(tmp_path / "run", *PROBE)
    shutil.rmtree(run / "checkpoints" / "step_00000012")
    debug_run(run, *PROBE, resume=True)
    assert numbers(run) == numbers(probed)


@pytest.mark.distributed
def test_two_ranks_probe_all_clips(probed: Path, debug_shards: Path, tmp_path: Path) -> None:
    on_ranks(2, train_debug, tmp_path / "run", debug_shards, *PROBE)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000012")
    on_ranks(2, train_debug, tmp_path / "run", debug_shards, *PROBE, "--resume")
    for found, wanted in zip(rows(tmp_path / "run"), rows(probed), strict=True):
        names = [name for name in wanted if name.startswith("probe/")]
        assert {name: found[name] for name in names} == pytest.approx({name: wanted[name] for name in names}, abs=1e-4)


def loads_of_a_rank(steps: int) -> tuple[dict[str, float], list[list[float]]]:
    """Figures and weights of a rank that sees half of the clips, of which one rank's carry no label."""
    with init_world("cpu") as world:
        probe = OnlineProbes(ProbeConfig(**LABELS, lr=0.02), DIM, world)
        for step in range(steps):
            probe.observe(*clips_of(10 * step + world.rank, labelled=lambda i: world.rank == 0 or i < 5))
    return figures(probe), probe.attentive.weight.tolist()


@pytest.mark.distributed
def test_ranks_with_different_numbers_of_labels_stay_the_same() -> None:
    first, second = on_ranks(2, loads_of_a_rank, 6)
    assert first == second
    assert first[0]["labelled"] == 6 * (CLIPS + 5)
