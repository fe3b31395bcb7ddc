"""Projections of 5 to 64 tokens on tensor cores, with the operands swapped: weight rows fill the M dimension of the
matrix instruction (64 at least on Hopper), tokens are its N dimension and need padding to 16, 32 or 64 only.

out[t, i] = epilogue(sum_k w[i, k] * x'[t, k]). The weight is streamed once by a software-pipelined loop over K. Where
N / BLOCK_N programs would leave multiprocessors idle, K is split among SPLIT_K programs, whose partial sums (fp32) a
second kernel adds in the order of K, so a result never depends on who came first. Any number of tokens works; a row's
result does not depend on how many there are, as long as the plan is the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvik.kernels.api import LinearWeight
from kvik.kernels.triton.dispatch import Norm, Plan
from kvik.kernels.triton.pdl import prefetch_l2, start_dependents, wait_for_inputs
from kvik.kernels.triton.tiles import normalized, row_rstd, store_projection

__all__ = ["skinny"]


@triton.jit
def _prefetch(
    lines: tl.tensor, first: int, PREFETCH: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr
) -> None:
    """The first PREFETCH tiles of columns from `first`, of rows at `lines` [BLOCK_N, 1]: one request per 128 bytes."""
    LINE: tl.constexpr = 128 // (lines.dtype.element_ty.primitive_bitwidth // 8)
    if PDL and PREFETCH > 0 and LINE <= BLOCK_K:
        for i in tl.static_range(PREFETCH):
            columns = first + i * BLOCK_K + tl.arange(0, BLOCK_K // LINE) * LINE
            prefetch_l2(lines + tl.minimum(columns, K - 1)[None, :])


@triton.jit
def _weight_tile(lines: tl.tensor, columns: tl.tensor, K: tl.constexpr, EVEN: tl.constexpr) -> tl.tensor:
    """[BLOCK_N, BLOCK_K] of rows at `lines` [BLOCK_N, 1], zero behind K."""
    if EVEN:
        tile = tl.load(lines + columns[None, :])
    else:
        tile = tl.load(lines + columns[None, :], mask=(columns < K)[None, :], other=0.0)
    return tile


@triton.jit
def _store_part(
    acc: tl.tensor,
    up: tl.tensor,
    partial: tl.tensor,
    rows: tl.tensor,
    tokens: tl.tensor,
    n: int,
    m: int,
    SWIGLU: tl.constexpr,
) -> None:
    """What this program's part of K adds up to, to its place in partial [SPLIT_K, m, rows of weight]."""
    ok = (rows < n)[:, None] & (tokens < m)[None, :]
    width = n * 2 if SWIGLU else n
    places = partial + (tl.program_id(2) * m + tokens).to(tl.int64)[None, :] * width + rows[:, None]
    tl.store(places, acc, mask=ok)
    if SWIGLU:
        tl.store(places + n, up, mask=ok)


@triton.jit(do_not_specialize=["m"])  # one compilation for every number of tokens
def _skinny_kernel(
    x: tl.tensor,
    norm_weight: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    m: int,
    n: int,
    eps: float,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SWIGLU: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """x [m, K], weight [n, K] ([2 * n, K] with SWIGLU), out [m, n]; with SPLIT_K > 1 out is fp32 [SPLIT_K, m, rows of
    weight] and nothing is applied. Programs: token blocks (fastest, so that they share a weight tile in L2), row
    blocks, parts of K."""
    SPAN: tl.constexpr = (K + SPLIT_K * BLOCK_K - 1) // (SPLIT_K * BLOCK_K) * BLOCK_K
    EVEN: tl.constexpr = SPAN * SPLIT_K == K
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(2) * SPAN
    token_ok = tokens < m
    lines = weight + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * K
    up_lines = lines + n * K if SWIGLU else lines
    start_dependents(PDL)
    _prefetch(lines, first, PREFETCH, K, BLOCK_K, PDL)
    if SWIGLU:
        _prefetch(up_lines, first, PREFETCH, K, BLOCK_K, PDL)
    wait_for_inputs(PDL)

    acc = tl.zeros([BLOCK_N, BLOCK_T], dtype=tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_T], dtype=tl.float32)
    rstd = row_rstd(x, tokens, token_ok, eps, K, BLOCK_K)[None, :] if NORM else acc
    x_lines = x + tokens.to(tl.int64)[None, :] * K
    for step in range(0, SPAN, BLOCK_K):
        columns = first + step + tl.arange(0, BLOCK_K)
        x_ok = token_ok[None, :] if EVEN else token_ok[None, :] & (columns < K)[:, None]
        part = tl.load(x_lines + columns[:, None], mask=x_ok, other=0.0)
        if NORM:
            gain = tl.load(norm_weight + columns, mask=columns < K, other=0.0)
            part = normalized(part, rstd, gain[:, None])
        acc = tl.dot(_weight_tile(lines, columns, K, EVEN), part, acc, input_precision="ieee")
        if SWIGLU:
            up = tl.dot(_weight_tile(up_lines, columns, K, EVEN), part, up, input_precision="ieee")
    if SPLIT_K == 1:
        store_projection(acc, up, bias, residual, out, rows, tokens, n, m, BIAS, RESIDUAL, SWIGLU)
    else:
        _store_part(acc, up, out, rows, tokens, n, m, SWIGLU)


@triton.jit(do_not_specialize=["m"])
def _reduce_kernel(
    partial: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    m: int,
    n: int,
    SPLIT_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SWIGLU: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """out [m, n] = epilogue(partial [SPLIT_K, m, n or 2 * n] added up along the first dimension, in order)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    ok = (rows < n)[:, None] & (tokens < m)[None, :]
    start_dependents(PDL)
    wait_for_inputs(PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_T], dtype=tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_T], dtype=tl.float32)
    width = n * 2 if SWIGLU else n
    for part in tl.static_range(SPLIT_K):
        places = partial + (part * m + tokens).to(tl.int64)[None, :] * width + rows[:, None]
        acc += tl.load(places, mask=ok, other=0.0)
        if SWIGLU:
            up += tl.load(places + n, mask=ok, other=0.0)
    store_projection(acc, up, bias, residual, out, rows, tokens, n, m, BIAS, RESIDUAL, SWIGLU)


def skinny(
    x: Tensor,
    w: LinearWeight,
    plan: Plan,
    out: Tensor,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
    pdl: bool = False,
) -> Tensor:
    """residual + act(norm(x) @ weight.T + bias) of x [num_tokens, K] into `out` [num_tokens, N], which is returned.

    `residual` has the shape of `out`. With `swiglu` the weight has 2 * N rows, gates first, and act is silu(gate) * up.
    All tensors are contiguous. With plan.split_k > 1 the partial sums are allocated here.
    """
    m, k = x.shape
    n = out.shape[1]
    assert w.weight.shape == (n * (1 + swiglu), k)
    # A part of K that would begin behind its end has nothing to add up.
    split_k = min(plan.split_k, triton.cdiv(k, plan.block_k))
    partial = out if split_k == 1 else x.new_empty((split_k, m, w.weight.shape[0]), dtype=torch.float32)
    flags = {"BIAS": w.bias is not None, "RESIDUAL": residual is not None, "SWIGLU": swiglu, "PDL": pdl}
    _skinny_kernel[(triton.cdiv(m, plan.block_t), triton.cdiv(n, plan.block_n), split_k)](
        x,
        norm.weight if norm else None,
        w.weight,
        w.bias,
        residual,
        partial,
        m,
        n,
        norm.eps if norm else 0.0,
        K=k,
        BLOCK_T=plan.block_t,
        BLOCK_N=plan.block_n,
        BLOCK_K=plan.block_k,
        SPLIT_K=split_k,
        PREFETCH=plan.prefetch,
        NORM=norm is not None,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        launch_pdl=pdl,
        **flags,
    )
    if split_k > 1:
        grid = (triton.cdiv(n, plan.reduce_n), triton.cdiv(m, plan.reduce_t))
        blocks = {"SPLIT_K": split_k, "BLOCK_N": plan.reduce_n, "BLOCK_T": plan.reduce_t}
        _reduce_kernel[grid](partial, w.bias, residual, out, m, n, **blocks, **flags, launch_pdl=pdl)
    return out
