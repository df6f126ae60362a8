"""Self-attention over several groups of equally long sequences in one call, behind a small backend interface.

All masks of a step (and both modalities) go through a block together: the linear layers see one flat list of tokens
[N, D], attention sees the segments. That is exact, halves the launches and the all-gathers under FSDP2, and keeps the
number of block calls the same on every rank.

Backends: `sdpa` (torch, everywhere), `xformers` (CUDA, imported lazily), `varlen` (torch's own attention over packed
sequences: CUDA, bf16 or fp16) and `matmul` (plain products, for bf16 on a CPU). `auto` takes xformers on CUDA where it
works, under torch.compile varlen, otherwise SDPA.

Block-causal attention lets a token see the tokens of its own and of earlier time steps. Which tokens a sequence holds
differs from clip to clip, so it is a bias on the scores, which only SDPA takes.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjepa.nn.rope import RopeTable, rotate

BackendName = Literal["auto", "sdpa", "xformers", "varlen", "matmul"]
AttentionMask = Literal["full", "block_causal"]
HALF = (torch.bfloat16, torch.float16)  # what FlashAttention computes in
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segments:
    """`count` sequences of `length` tokens each, following one another in the flat list."""

    count: int
    length: int
    bias: Tensor | None = field(
        default=None, compare=False, repr=False
    )  # on the scores, [count or 1, 1, length, length]

    @property
    def tokens(self) -> int:
        return self.count * self.length


class AttentionBackend(Protocol):
    """softmax(q k^T / sqrt(head_dim) + bias) v within each sequence; q, k, v and the result are [N, A, head_dim]."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layout: Sequence[Segments]) -> Tensor: ...


def sdpa(q: Tensor, k: Tensor, v: Tensor, layout: Sequence[Segments]) -> Tensor:
    """torch's scaled_dot_product_attention, once per group of equal length: dense, exact, any device."""
    return _by_segment(F.scaled_dot_product_attention, q, k, v, layout)


def matmul(q: Tensor, k: Tensor, v: Tensor, layout: Sequence[Segments]) -> Tensor:
    """Two matrix products and a softmax, once per group of equal length: dense, any device.

    For bf16 on a CPU, where torch's SDPA was 2 to 4 times slower forward and backward (vjepa/README.md). The scores are
    kept in the dtype of q for the backward pass, [B, A, K, K].
    """
    return _by_segment(_products, q, k, v, layout)


def _products(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, A, K, K]
    return (scores if attn_mask is None else scores + attn_mask).softmax(dim=-1) @ v


def _by_segment(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, layout: Sequence[Segments]) -> Tensor:
    sizes = [segments.tokens for segments in layout]
    outputs = []
    for segments, *parts in zip(layout, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        q, k, v = (x.unflatten(0, (segments.count, segments.length)).transpose(1, 2) for x in parts)  # [B, A, K, d]
        bias = None if segments.bias is None else segments.bias.to(q.dtype)
        outputs.append(attend(q, k, v, attn_mask=bias).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def block_causal_bias(steps: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a token may look, at tokens of its own and of earlier time steps, else -inf.

    steps: [B, K], the time step of each token, in any order -> [B, 1, K, K].
    """
    is_later = steps[:, None, None, :] > steps[:, None, :, None]
    return torch.zeros(is_later.shape, dtype=dtype, device=steps.device).masked_fill_(is_later, -torch.inf)


def backend_for(mask: AttentionMask, backend: BackendName) -> BackendName:
    """The backend that computes `mask`: the one asked for, where it can; otherwise a ValueError."""
    if mask == "full":
        return backend
    if mask != "block_causal":
        raise ValueError(f"attention_mask={mask!r} is unknown: choose full or block_causal")
    if backend in ("xformers", "varlen"):
        raise ValueError(
            f"attention={backend} cannot do attention_mask=block_causal, which needs a bias of its own for each clip: "
            "use sdpa or auto"
        )
    return "sdpa"


def sequence_lengths(layout: Sequence[Segments]) -> list[int]:
    """One length per sequence, in order: what a block-diagonal mask is built from."""
    return [segments.length for segments in layout for _ in range(segments.count)]


@functools.lru_cache(maxsize=16)
def _block_diagonal(layout: tuple[Segments, ...], device: torch.device) -> Any:
    fmha = importlib.import_module("xformers.ops.fmha")
    return fmha.BlockDiagonalMask.from_seqlens(sequence_lengths(layout), device=device)


def xformers(q: Tensor, k: Tensor, v: Tensor, layout: Sequence[Segments]) -> Tensor:
    """xformers' memory-efficient attention over a block-diagonal mask: one call for all groups; CUDA only."""
    fmha = importlib.import_module("xformers.ops.fmha")
    assert all(segments.bias is None for segments in layout), "see backend_for"
    bias = _block_diagonal(tuple(layout), q.device)
    return fmha.memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]


@functools.cache
def xformers_fault() -> str | None:
    """Why xformers cannot compute on this machine's GPU, in a line; None where it can.

    That it imports says nothing: a wheel made for another CUDA than torch's imports with a warning and has no kernels.
    So two short sequences are computed, in bf16 and in fp32, once.
    """
    try:
        fmha = importlib.import_module("xformers.ops.fmha")
        bias = fmha.BlockDiagonalMask.from_seqlens([8, 8], device=torch.device("cuda"))
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.zeros(1, 16, 1, 64, dtype=dtype, device="cuda")
            fmha.memory_efficient_attention(x, x, x, attn_bias=bias)
    except (ImportError, RuntimeError) as error:  # NotImplementedError is a RuntimeError
        fault = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        log.warning("attention: xformers does not work here, auto takes torch's SDPA (%s)", fault)
        return fault
    return None


def cumulative_lengths(layout: Sequence[Segments], device: torch.device) -> Tensor:
    """Where each sequence begins in the flat list, and where the last one ends: int32 [sequences + 1].

    Made of ranges on the device, so that nothing is copied to it, and lengths may be symbols of a compiled graph.
    """
    starts, begin = [], 0
    for segments in layout:
        ranks = torch.arange(segments.count, dtype=torch.int32, device=device)
        starts.append(ranks * segments.length + begin)
        begin += segments.tokens
    return torch.cat([*starts, torch.full((1,), begin, dtype=torch.int32, device=device)])


@functools.lru_cache(maxsize=16)
def _cached_lengths(layout: tuple[Segments, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a later training step saves it for its backward pass
        return cumulative_lengths(layout, device)


def varlen(q: Tensor, k: Tensor, v: Tensor, layout: Sequence[Segments]) -> Tensor:
    """torch's FlashAttention over packed sequences: one call for all groups; CUDA, bf16 or fp16 only."""
    if v.dtype not in HALF:
        raise ValueError(
            f"attention=varlen computes in bf16 or fp16, the tokens are {v.dtype}: set train.precision=bf16 or use sdpa"
        )
    assert all(segments.bias is None for segments in layout), "see backend_for"
    if torch.compiler.is_compiling():  # a compiler sees through caches, and warns
        starts = cumulative_lengths(layout, q.device)
    else:
        starts = _cached_lengths(tuple(layout), q.device)
    longest = max(segments.length for segments in layout)
    return _varlen_attn()(q, k, v, starts, starts, longest, longest)


def _varlen_attn() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise ValueError(
            f"attention=varlen needs torch.nn.attention.varlen, which torch {torch.__version__} does not have: use "
            "sdpa or xformers, or torch 2.11 or later"
        ) from error
    return varlen_attn


def resolve_backend(name: BackendName, device: torch.device, dtype: torch.dtype = torch.float32) -> AttentionBackend:
    """The backend called `name` for tensors on `device`; a backend that cannot run there is a ValueError.

    A compiler cannot see through xformers: there `auto` takes varlen where the `dtype` of q, k and v allows it.
    """
    if name == "auto" and device.type == "cuda" and torch.compiler.is_compiling():
        return varlen if dtype in HALF else sdpa
    if name == "auto":
        return xformers if device.type == "cuda" and xformers_fault() is None else sdpa
    if name == "sdpa":
        return sdpa
    if name == "matmul":
        return matmul
    if name == "xformers":
        if device.type != "cuda":
            raise ValueError(f"attention=xformers needs a CUDA device, the tokens are on {device}: use sdpa or auto")
        if fault := xformers_fault():
            raise ValueError(
                f"attention=xformers does not work here ({fault}); the wheel must be for torch {torch.__version__}, "
                f"CUDA {torch.version.cuda}, see `python -m xformers.info`: install that one, or use varlen or auto"
            )
        return xformers
    if name == "varlen":
        if device.type != "cuda":
            raise ValueError(f"attention=varlen needs a CUDA device, the tokens are on {device}: use sdpa or auto")
        return varlen
    raise ValueError(f"attention={name!r} is unknown: choose auto, sdpa, matmul, xformers or varlen")


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions; q and k are cast back to v's dtype after the fp32 rotation."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True, backend: BackendName = "auto") -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim={dim} does not divide by num_heads={num_heads}")
        self.num_heads = num_heads
        self.backend: BackendName = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, table: RopeTable, layout: Sequence[Segments]) -> Tensor:
        """x: [N, D] flat tokens of all groups -> [N, D]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # each [N, A, head_dim]
        q, k = rotate(q, table).to(v.dtype), rotate(k, table).to(v.dtype)
        v = v.contiguous()  # a view would keep the memory of all three until the backward pass
        attend = resolve_backend(self.backend, x.device, v.dtype)
        return self.proj(attend(q, k, v, layout).flatten(1))
