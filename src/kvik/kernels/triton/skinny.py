"""Projections of 5 to 64 tokens on tensor cores, with the operands swapped: weight rows fill the M dimension of the
matrix instruction (64 at least on Hopper), tokens are its N dimension and need padding to 16, 32 or 64 only.

out[t, i] = epilogue(sum_k w[i, k] * x[t, k]). The weight is streamed once by a software-pipelined loop over K. Where
N / BLOCK_N programs would leave multiprocessors idle, K is split among SPLIT_K programs; the one that is done last adds
their partial sums (fp32) in the order of K, so a result never depends on who came first. Any number of tokens works; a
row's result does not depend on how many there are, as long as the plan is the same.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvik.kernels.api import LinearWeight
from kvik.kernels.triton.dispatch import Plan
from kvik.kernels.triton.pdl import prefetch_l2, start_dependents, wait_for_inputs
from kvik.kernels.triton.tiles import store_projection

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
def _add_parts(
    acc: tl.tensor, parts: tl.tensor, arrivals: tl.tensor, SPLIT_K: tl.constexpr, SWIGLU: tl.constexpr, up: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Leave this program's sums in parts [tile, SPLIT_K, 1 or 2, BLOCK_N, BLOCK_T]; the program that is the last of its
    tile to do so gets (sums over all of K in the order of K, for up too, True)."""
    SIZE: tl.constexpr = acc.shape[0] * acc.shape[1]
    STRIDE: tl.constexpr = SIZE * (2 if SWIGLU else 1)
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    within = tl.arange(0, acc.shape[0])[:, None] * acc.shape[1] + tl.arange(0, acc.shape[1])[None, :]
    first = parts + (tile * SPLIT_K).to(tl.int64) * STRIDE + within
    mine = first + tl.program_id(2) * STRIDE
    tl.store(mine, acc)
    if SWIGLU:
        tl.store(mine + SIZE, up)
    tl.debug_barrier()  # the stores of all threads come before the release of the one that counts
    last = tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == SPLIT_K - 1
    if last:
        tl.store(arrivals + tile, 0)
        acc = tl.zeros_like(acc)
        up = tl.zeros_like(up)
        for part in tl.static_range(SPLIT_K):  # through L2: other multiprocessors wrote them just now
            acc += tl.load(first + part * STRIDE, cache_modifier=".cg")
            if SWIGLU:
                up += tl.load(first + part * STRIDE + SIZE, cache_modifier=".cg")
    return acc, up, last


@triton.jit(do_not_specialize=["m"])  # one compilation for every number of tokens
def _skinny_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    parts: tl.tensor,
    arrivals: tl.tensor,
    m: int,
    n: int,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SWIGLU: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """x [m, K], weight [n, K] ([2 * n, K] with SWIGLU), out [m, n]; parts, arrivals [tiles] with SPLIT_K > 1.
    Programs: token blocks (fastest, so that they share a weight tile in L2), row blocks, parts of K."""
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
    x_lines = x + tokens.to(tl.int64)[None, :] * K
    for step in range(0, SPAN, BLOCK_K):
        columns = first + step + tl.arange(0, BLOCK_K)
        x_ok = token_ok[None, :] if EVEN else token_ok[None, :] & (columns < K)[:, None]
        part = tl.load(x_lines + columns[:, None], mask=x_ok, other=0.0)
        acc = tl.dot(_weight_tile(lines, columns, K, EVEN), part, acc, input_precision="ieee")
        if SWIGLU:
            up = tl.dot(_weight_tile(up_lines, columns, K, EVEN), part, up, input_precision="ieee")
    if SPLIT_K == 1:
        store_projection(acc, up, bias, residual, out, rows, tokens, n, m, BIAS, RESIDUAL, SWIGLU)
    else:
        acc, up, last = _add_parts(acc, parts, arrivals, SPLIT_K, SWIGLU, up)
        if last:
            store_projection(acc, up, bias, residual, out, rows, tokens, n, m, BIAS, RESIDUAL, SWIGLU)


def skinny(
    x: Tensor,
    w: LinearWeight,
    plan: Plan,
    out: Tensor,
    arrivals: Tensor,
    *,
    residual: Tensor | None = None,
    swiglu: bool = False,
    pdl: bool = False,
) -> Tensor:
    """residual + act(x @ weight.T + bias) of x [num_tokens, K] into `out` [num_tokens, N], which is returned.

    `residual` has the shape of `out`. With `swiglu` the weight has 2 * N rows, gates first, and act is silu(gate) * up.
    All tensors are contiguous. `arrivals` [at least as many as there are output tiles] int32 is zeros before and after;
    with plan.split_k > 1 the partial sums are allocated here.
    """
    m, k = x.shape
    n = out.shape[1]
    assert w.weight.shape == (n * (1 + swiglu), k)
    # A part of K that would begin behind its end has nothing to add up.
    split_k = min(plan.split_k, triton.cdiv(k, plan.block_k))
    grid = (triton.cdiv(m, plan.block_t), triton.cdiv(n, plan.block_n), split_k)
    parts = None
    if split_k > 1:
        assert grid[0] * grid[1] <= len(arrivals), "more tiles than counters"
        parts = x.new_empty(math.prod(grid) * plan.block_n * plan.block_t * (1 + swiglu), dtype=torch.float32)
    _skinny_kernel[grid](
        x,
        w.weight,
        w.bias,
        residual,
        out,
        parts,
        arrivals,
        m,
        n,
        K=k,
        BLOCK_T=plan.block_t,
        BLOCK_N=plan.block_n,
        BLOCK_K=plan.block_k,
        SPLIT_K=split_k,
        PREFETCH=plan.prefetch,
        BIAS=w.bias is not None,
        RESIDUAL=residual is not None,
        SWIGLU=swiglu,
        PDL=pdl,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        launch_pdl=pdl,
    )
    return out
