"""ViT-G over 128 simulated ranks: built and sharded in seconds, each rank holding its share."""

from __future__ import annotations

import time

import pytest
from torch.distributed.tensor import DTensor

from launch.config import load_config
from tests.train.fake_step import fake_ranks
from vjepa.config import build_models
from vjepa.objectives.jepa import JEPA
from vjepa.train.memory import count_elements
from vjepa.train.parallel import ParallelConfig, parallelise


@pytest.mark.parametrize(("shard_ranks", "shards"), [(8, 8), (None, 128)], ids=["hsdp 16 x 8", "fsdp 128"])
def test_every_rank_holds_its_share_of_vit_gigantic(shard_ranks: int | None, shards: int) -> None:
    config = load_config("vit_gigantic", "primary", ["run_dir=unused"])
    began = time.process_time()
    with fake_ranks(128) as world:
        encoder, predictor = build_models(config.model, config.predictor, seed=0, device="meta")
        objective = JEPA(config.objective, encoder, predictor)
        whole, planned = count_elements(objective), count_elements(objective, shards)
        parallelise(objective, ParallelConfig("fsdp", shard_ranks), world, precision="bf16")
        seconds = time.process_time() - began
        parameters = list(objective.parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        local = sum(p.to_local().numel() for p in parameters if isinstance(p, DTensor))
    share = (whole.model + whole.target) / shards
    assert local == planned.model + planned.target, "the first rank's shards are never smaller than the others'"
    assert share <= local < 1.02 * share, "small parameters do not divide evenly"
    assert seconds < 20
