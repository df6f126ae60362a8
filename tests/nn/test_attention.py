"""Attention backends see the same sequences."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F

from vjepa.nn.attention import Segments, resolve_backend, sdpa, sequence_lengths

LAYOUT = (Segments(2, 7), Segments(3, 4), Segments(1, 1))
TOKENS = sum(segments.tokens for segments in LAYOUT)


def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = torch.randn(3, TOKENS, 2, 8, generator=torch.Generator().manual_seed(0))
    return q, k, v


def dense(mask: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in qkv())
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)


def test_sdpa_over_segments_equals_one_block_diagonal_mask() -> None:
    sequence = torch.repeat_interleave(torch.arange(6), torch.tensor(sequence_lengths(LAYOUT)))
    mask = sequence[:, None] == sequence[None, :]
    torch.testing.assert_close(sdpa(*qkv(), LAYOUT), dense(mask), atol=1e-6, rtol=0)


def test_the_xformers_packing_is_the_block_diagonal_mask_that_sdpa_computes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL)
    fmha = pytest.importorskip("xformers.ops.fmha", reason="xformers is not installed: its packing is not compared")
    bias = fmha.BlockDiagonalMask.from_seqlens(sequence_lengths(LAYOUT))
    mask = bias.materialize((TOKENS, TOKENS)).to(torch.float32)
    torch.testing.assert_close(sdpa(*qkv(), LAYOUT), dense(mask), atol=1e-6, rtol=0)


def test_xformers_on_a_cpu_is_refused_and_auto_takes_sdpa() -> None:
    cpu = torch.device("cpu")
    assert resolve_backend("auto", cpu) is sdpa
    with pytest.raises(ValueError, match="needs a CUDA device"):
        resolve_backend("xformers", cpu)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="xformers attention needs a CUDA device")
def test_xformers_equals_sdpa_on_cuda() -> None:
    pytest.importorskip("xformers.ops.fmha", reason="xformers is not installed")
    q, k, v = (x.cuda().bfloat16() for x in qkv())
    xformers = resolve_backend("xformers", q.device)
    torch.testing.assert_close(xformers(q, k, v, LAYOUT), sdpa(q, k, v, LAYOUT), atol=2e-2, rtol=2e-2)
