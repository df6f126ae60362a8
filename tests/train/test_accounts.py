"""Rates of a step, and the share of a device's peak."""

import json

import pytest
import torch

from tests.train.conftest import DebugRun
from vjepa.train.accounts import Accounts, peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA H2000", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_the_peak_is_that_of_the_named_device(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_rates_are_counts_over_time_and_mfu_a_share_of_the_peak() -> None:
    accounts = Accounts(torch.device("cpu"))
    assert accounts.of(2.0, clips=8, tokens=100, flops=4e12) == {
        "clips_per_second": 4.0,
        "tokens_per_second": 50.0,
        "tflops_per_second": 2.0,
    }
    accounts.peak = 8e12
    assert accounts.of(2.0, clips=8, tokens=100, flops=4e12)["mfu"] == 0.25


def test_every_logged_step_has_them(debug_run: DebugRun, tmp_path) -> None:
    run = debug_run(tmp_path / "run", "train.steps=2", "train.micro_batch.video=6", "train.micro_batch.image=6")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        seconds = row["step_seconds"]
        assert row["tokens_per_second"] * seconds == pytest.approx(12 * (2 * 4 * 4) + 12 * (4 * 4))
        assert row["tflops_per_second"] > 0
        assert "mfu" not in row
