"""Every way to spread a run over ranks gives the losses, gradients and weights of one process."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo as dynamo
from torch._dynamo.utils import counters

from launch.config import load_config
from tests.train.ranks import on_ranks, train_debug
from tests.train.test_two_ranks import assert_equal_runs, rows, weights
from vjepa.config import build_models
from vjepa.nn.encoder import View
from vjepa.objectives.jepa import JEPA
from vjepa.train.distributed import World
from vjepa.train.parallel import ParallelConfig, parallelise

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
MICRO = ("train.micro_batch.video=3", "train.micro_batch.image=3")
MODES = {
    "fsdp": ("train.parallel.mode=fsdp",),
    "hsdp, one copy": ("train.parallel.mode=fsdp", "train.parallel.shard_ranks=2"),
    "hsdp, two copies": ("train.parallel.mode=fsdp", "train.parallel.shard_ranks=1"),
    "fsdp, selective": ("train.parallel.mode=fsdp", "train.parallel.activations=selective"),
    "fsdp, accumulated": ("train.parallel.mode=fsdp", *MICRO),
    "fsdp, accumulated in shards": ("train.parallel.mode=fsdp", "train.parallel.reduce_each=true", *MICRO),
}


@pytest.fixture(scope="module")
def one_process(debug_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return debug_run(tmp_path_factory.mktemp("one") / "run", "train.steps=20")


def on_two_ranks(folder: Path, shards: Path, *arguments: str) -> Path:
    on_ranks(2, train_debug, folder, shards, "train.steps=20", *arguments)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_give_the_numbers_of_one_process(
    mode: str, one_process: Path, debug_shards: Path, tmp_path: Path
) -> None:
    run = on_two_ranks(tmp_path / "run", debug_shards, *MODES[mode])
    assert_equal_runs(run, one_process)
    first, wanted = rows(run)[0], rows(one_process)[0]
    assert first["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)


@pytest.mark.distributed
def test_clipping_is_by_the_norm_of_all_shards(
    debug_run: Callable[..., Path], debug_shards: Path, tmp_path: Path
) -> None:
    settings = ("train.steps=20", "train.optim.clip_grad=0.2")
    alone = debug_run(tmp_path / "alone", *settings)
    assert max(row["grad_norm"] for row in rows(alone)) > 0.2, "something is clipped"
    assert_equal_runs(on_two_ranks(tmp_path / "run", debug_shards, *settings, *MODES["fsdp"]), alone)


@pytest.mark.distributed
def test_bf16_in_shards_follows_fp32(one_process: Path, debug_shards: Path, tmp_path: Path) -> None:
    run = on_two_ranks(tmp_path / "run", debug_shards, "train.precision=bf16", *MODES["fsdp"])
    losses = [[row["loss"] for row in rows(found)] for found in (run, one_process)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


@pytest.mark.distributed
def test_a_sharded_run_goes_on_alone_and_a_lone_one_in_shards(
    one_process: Path, debug_run: Callable[..., Path], debug_shards: Path, tmp_path: Path
) -> None:
    """Saved on two ranks in shards, resumed by one process, and the other way round."""
    shutil.copytree(one_process, tmp_path / "lone")
    for step in (15, 20):
        shutil.rmtree(tmp_path / "lone" / "checkpoints" / f"step_{step:08d}")
    on_two_ranks(tmp_path / "lone", debug_shards, "--resume", "train.parallel.mode=fsdp")
    assert_equal_runs(tmp_path / "lone", one_process)
    for step in (15, 20):
        shutil.rmtree(tmp_path / "lone" / "checkpoints" / f"step_{step:08d}")
    debug_run(tmp_path / "lone", "train.steps=20", resume=True)
    assert_equal_runs(tmp_path / "lone", one_process)


@pytest.mark.parametrize("activations", ["selective", "recompute"])
def test_recomputed_activations_change_no_bit(
    activations: str, debug_run: Callable[..., Path], one_process: Path, tmp_path: Path
) -> None:
    run = debug_run(tmp_path / "run", "train.steps=20", f"train.parallel.activations={activations}")
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(one_process)]
    assert torch.equal(weights(run), weights(one_process))


@pytest.mark.parametrize(("activations", "at_most"), [("selective", 0.75), ("recompute", 0.4)])
def test_recomputing_keeps_less(activations: str, at_most: float) -> None:
    """Bytes that autograd holds between the forward and the backward pass, against keeping all."""
    kept = {name: _bytes_kept(name) for name in ("keep", activations)}
    assert kept[activations] < at_most * kept["keep"], kept


def _bytes_kept(activations: str) -> int:
    config = load_config("debug", "primary", ["run_dir=unused", f"train.parallel.activations={activations}"])
    encoder, predictor = build_models(config.model, config.predictor, seed=0)
    objective = JEPA(config.objective, encoder, predictor)
    parallelise(objective, config.train.parallel, ALONE, precision="fp32")
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        encoder(torch.zeros(8, 3, 4, 64, 64)).sum()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    return sum(size for place, size in storages.items() if place not in parameters)


@pytest.mark.filterwarnings("ignore")  # torch.compile itself uses what torch calls deprecated
def test_names_of_parameters_are_those_of_the_plain_model() -> None:
    """Optimizer groups and checkpoints go by name."""
    config = load_config("debug", "primary", ["run_dir=unused"])
    encoder, predictor = build_models(config.model, config.predictor, seed=0)
    objective = JEPA(config.objective, encoder, predictor)
    before = list(objective.state_dict())
    parallelise(objective, ParallelConfig(activations="recompute", compile=True), ALONE, precision="fp32")
    assert list(objective.state_dict()) == before


@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_are_one_graph_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Context lengths change from step to step: a graph for each would soon end in the fallback to eager."""
    monkeypatch.setattr("vjepa.train.parallel.COMPILER", "aot_eager")  # inductor takes half a minute
    dynamo.reset()
    counters.clear()
    config = load_config("debug", "primary", ["run_dir=unused"])
    plain, compiled = (build_models(config.model, config.predictor, seed=0) for _ in range(2))
    objective = JEPA(config.objective, *compiled)
    parallelise(objective, ParallelConfig(compile=True), ALONE, precision="fp32")
    clips = torch.rand(2, 3, 4, 64, 64)
    for kept in (5, 6, 7, 9, 12, 15, 20, 22, 24, 25, 27, 28):
        contexts = (torch.arange(kept).expand(2, -1), torch.arange(kept + 3).expand(2, -1))
        wanted, found = (model.forward_levels([View(clips, contexts)])[0][1] for model, _ in (plain, compiled))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        found.sum().backward()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 2


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="shard_ranks=2 needs"):
        ParallelConfig(shard_ranks=2)
    with pytest.raises(ValueError, match="must be at least 1"):
        ParallelConfig("fsdp", shard_ranks=0)
    with pytest.raises(ValueError, match=r"reduce_each=true needs parallel\.mode=fsdp"):
        ParallelConfig(reduce_each=True)
    with pytest.raises(ValueError, match="must divide the 4 ranks"):
        ParallelConfig("fsdp", shard_ranks=3).check_world(4)
