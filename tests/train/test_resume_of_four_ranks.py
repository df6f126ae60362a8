"""From three ranks on, the order in which gradients are added depends on DistributedDataParallel's buckets."""

import json
import shutil
from pathlib import Path

import pytest

from tests.train.ranks import on_ranks, train_debug

pytestmark = pytest.mark.distributed


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_four_ranks_that_resume_end_bit_for_bit_as_those_that_were_not_interrupted(
    debug_shards: Path, tmp_path: Path
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    on_ranks(4, train_debug, whole, debug_shards, "train.steps=14", "train.optim.lr.warmup_steps=4")
    shutil.copytree(whole, resumed)
    for step in (10, 14):
        shutil.rmtree(resumed / "checkpoints" / f"step_{step:08d}")
    on_ranks(4, train_debug, resumed, debug_shards, "--resume")
    assert losses(resumed) == losses(whole)
    assert len(losses(resumed)) == 14
