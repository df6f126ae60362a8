"""Statistics of a batch are computed in fp32, whatever precision the model runs in.

In bf16 the mean of some hundred samples is good to three digits and SIGReg is biased (1.028 -> 1.070); under autocast
even a last matrix product over fp32 values comes back rounded to bf16 (reference collapse-prevention, 1.5e).
"""

from __future__ import annotations

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> torch.autocast:
    """A context in which operations on x's device keep the precision of their inputs."""
    return torch.autocast(x.device.type, enabled=False)


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32; fp64 stays, for tests."""
    return x if x.dtype == torch.float64 else x.float()
