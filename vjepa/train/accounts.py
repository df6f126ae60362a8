"""What a step cost: clips, tokens and operations a second, the share of the device's peak, its memory."""

from __future__ import annotations

import torch

# Dense bf16 peaks of tensor cores in FLOP/s, from the makers' data sheets; the longest name that fits counts.
PEAKS = {
    "A100": 312e12,
    "A10": 125e12,
    "B200": 2250e12,
    "GB200": 2250e12,
    "GH200": 989e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H20": 148e12,
    "H200": 989e12,
    "L4": 121e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "V100": 125e12,  # fp16: it has no bf16
}


def peak_flops(device_name: str) -> float | None:
    """The device's dense bf16 peak by its name as CUDA gives it; None for one that is not in the list."""
    words = device_name.replace("-", " ").split()
    found = [name for name in PEAKS if _is_within(name.split(), words)]
    return PEAKS[max(found, key=len)] if found else None


def _is_within(name: list[str], words: list[str]) -> bool:
    """Whether every word of `name` is one of `words`: H200 is not within H20."""
    return all(part in words for part in name)


class Accounts:
    """The device's peak and memory beside a step's counts."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        self.peak = peak_flops(torch.cuda.get_device_name(device)) if self.is_cuda else None

    def of(self, seconds: float, *, clips: float, tokens: float, flops: float) -> dict[str, float]:
        """Rates of one step: clips and tokens over all ranks, operations on this one.

        `mfu` counts what the model needs, not what is recomputed, against the bf16 peak whatever the precision; it is
        left out for a device whose peak is not known. Memory is the largest allocated so far, in GiB.
        """
        found = {
            "clips_per_second": clips / seconds,
            "tokens_per_second": tokens / seconds,
            "tflops_per_second": flops / seconds / 1e12,
        }
        if self.peak is not None:
            found["mfu"] = flops / seconds / self.peak
        if self.is_cuda:
            found["memory_peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return found
