"""Attention backends see the same sequences."""

from __future__ import annotations

import builtins
import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa.nn.attention import (
    Segments,
    cumulative_lengths,
    matmul,
    resolve_backend,
    sdpa,
    sequence_lengths,
    varlen,
    xformers_fault,
)
from vjepa.train.parallel import _kept_operators

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


@pytest.mark.parametrize("has_bias", [False, True])
def test_plain_products_equal_sdpa_with_gradients(has_bias: bool) -> None:
    bias = torch.zeros(1, 1, 7, 7).masked_fill_(torch.ones(7, 7).triu(1).bool(), -torch.inf) if has_bias else None
    layout = (replace(LAYOUT[0], bias=bias), *LAYOUT[1:])
    found = []
    for attend in (matmul, sdpa):
        q, k, v = (x.requires_grad_() for x in qkv())
        attended = attend(q, k, v, layout)
        attended.square().sum().backward()
        found.append([attended, q.grad, k.grad, v.grad])
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)
    assert resolve_backend("matmul", torch.device("cpu")) is matmul


def test_plain_products_in_bf16_stay_as_near_as_sdpa_does() -> None:
    exact = sdpa(*qkv(), LAYOUT)
    q, k, v = (x.bfloat16() for x in qkv())
    error = (matmul(q, k, v, LAYOUT).float() - exact).abs().max()
    assert error < 2 * (sdpa(q, k, v, LAYOUT).float() - exact).abs().max()


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


def test_an_xformers_without_kernels_is_not_taken_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_kernel(*_: Any, **__: Any) -> Tensor:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward` with inputs:\n query ...")

    mask = SimpleNamespace(from_seqlens=lambda lengths, device: None)
    fmha = SimpleNamespace(BlockDiagonalMask=mask, memory_efficient_attention=no_kernel)
    monkeypatch.setattr(importlib, "import_module", lambda name: fmha)
    monkeypatch.setattr(torch, "zeros", lambda *shape, **_: torch.empty(*shape, device="meta"))
    xformers_fault.cache_clear()
    try:
        cuda = torch.device("cuda", 0)
        assert resolve_backend("auto", cuda) is resolve_backend("auto", cuda) is sdpa
        assert caplog.text.count("xformers does not work here, auto takes torch's SDPA") == 1
        with pytest.raises(
            ValueError, match=r"No operator found .*forward` with inputs:\); the wheel must be for torch"
        ):
            resolve_backend("xformers", cuda)
    finally:
        xformers_fault.cache_clear()


def test_under_a_compiler_auto_takes_what_it_can_see_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    cuda = torch.device("cuda", 0)
    assert resolve_backend("auto", cuda, torch.bfloat16) is varlen
    assert resolve_backend("auto", cuda, torch.float32) is sdpa
    assert resolve_backend("auto", torch.device("cpu"), torch.bfloat16) is sdpa


@pytest.mark.skipif(not torch.cuda.is_available(), reason="xformers attention needs a CUDA device")
def test_xformers_equals_sdpa_on_cuda() -> None:
    pytest.importorskip("xformers.ops.fmha", reason="xformers is not installed")
    if fault := xformers_fault():
        pytest.skip(f"xformers does not work here: {fault}")
    q, k, v = (x.cuda().bfloat16() for x in qkv())
    xformers = resolve_backend("xformers", q.device)
    torch.testing.assert_close(xformers(q, k, v, LAYOUT), sdpa(q, k, v, LAYOUT), atol=2e-2, rtol=2e-2)


# ------------------------------------------------------------------------------------------------- torch's varlen_attn


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, starts_k: Tensor, longest: int, longest_k: int
) -> Tensor:
    """What varlen_attn computes, one sequence after another, in fp32."""
    assert starts.dtype == torch.int32, "the kernel reads int32"
    assert torch.equal(starts, starts_k)
    assert longest == longest_k == int(starts.diff().max())
    outputs = []
    for begin, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        one_q, one_k, one_v = (x[begin:end].float().transpose(0, 1)[None] for x in (q, k, v))
        outputs.append(F.scaled_dot_product_attention(one_q, one_k, one_v)[0].transpose(0, 1))
    return torch.cat(outputs)


def test_the_varlen_packing_is_what_sdpa_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", one_by_one)
    q, k, v = (x.bfloat16() for x in qkv())
    expected = sdpa(q.float(), k.float(), v.float(), LAYOUT)
    torch.testing.assert_close(varlen(q, k, v, LAYOUT), expected, atol=1e-6, rtol=0)
    other = LAYOUT[::-1]  # the same lengths in another order: nothing cached may be taken for it
    expected = sdpa(q.float(), k.float(), v.float(), other)
    torch.testing.assert_close(varlen(q, k, v, other), expected, atol=1e-6, rtol=0)


def test_sequences_begin_where_the_one_before_ends() -> None:
    assert cumulative_lengths(LAYOUT, torch.device("cpu")).tolist() == [0, 7, 14, 18, 22, 26, 27]


def test_varlen_keeps_shape_and_dtype_forward_and_backward_on_meta() -> None:
    q = torch.empty(TOKENS, 2, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    attended = varlen(q, q, q, LAYOUT)
    attended.sum().backward()
    assert (attended.shape, attended.dtype) == (q.shape, q.dtype)
    assert q.grad is not None
    assert q.grad.shape == q.shape


def test_varlen_under_compile_is_one_graph_for_all_lengths() -> None:
    graphs: list[Any] = []

    def count(graph: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    attend = torch.compile(lambda q, layout: varlen(q, q, q, layout), backend=count, dynamic=True, fullgraph=True)
    for length in (7, 9, 12):
        layout = (Segments(2, length), Segments(3, length - 3))
        tokens = sum(segments.tokens for segments in layout)
        q = torch.empty(tokens, 2, 8, dtype=torch.bfloat16, device="meta")
        assert attend(q, layout).shape == q.shape
    assert len(graphs) == 1


def test_varlen_is_kept_by_selective_recomputation() -> None:
    q = torch.empty(TOKENS, 2, 8, dtype=torch.bfloat16, device="meta")
    varlen(q, q, q, LAYOUT)  # the first call makes the operator known
    attention, _ = _kept_operators()
    assert torch.ops.torch_attn._varlen_attn.default in attention


def test_varlen_says_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="attention=varlen needs a CUDA device, the tokens are on cpu"):
        resolve_backend("varlen", torch.device("cpu"))
    assert resolve_backend("varlen", torch.device("cuda", 0)) is varlen
    with pytest.raises(ValueError, match=r"torch\.float32: set train\.precision=bf16"):
        varlen(*qkv(), LAYOUT)
    real = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "torch.nn.attention.varlen":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    q, k, v = (x.bfloat16() for x in qkv())
    with pytest.raises(ValueError, match=r"which torch .* does not have"):
        varlen(q, k, v, LAYOUT)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen attention needs a CUDA device")
def test_varlen_equals_sdpa_on_cuda() -> None:
    q, k, v = (x.cuda().bfloat16().requires_grad_() for x in qkv())
    expected, found = sdpa(q, k, v, LAYOUT), resolve_backend("varlen", q.device)(q, k, v, LAYOUT)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
    for mine, theirs in zip(
        torch.autograd.grad(found.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=2e-2, rtol=2e-2)
