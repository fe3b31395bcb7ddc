"""Projections of 1 to 4 tokens: every program streams BLOCK_N whole rows of the weight once, without tensor cores.

out[t, i] = epilogue(sum_k w[i, k] * x'[t, k]), x' = x or rms_norm(x), which every program recomputes: a row of x is a
few KiB and stays in L2. The first BLOCK_K columns (all of them, where K allows) are loaded before the programmatic
dependency wait, because weights do not depend on the predecessor; the recipe is that of
https://github.com/msaroufim/megakernels-vs-cuda-graphs. Products and sums are fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvik.kernels.api import LinearWeight
from kvik.kernels.triton.dispatch import Norm, Plan
from kvik.kernels.triton.pdl import start_dependents, wait_for_inputs
from kvik.kernels.triton.tiles import normalized, row_rstd, store_projection

__all__ = ["MAX_TOKENS", "gemv"]

MAX_TOKENS = 4


@triton.jit(do_not_specialize=["m"])  # one compilation for every number of tokens that share BLOCK_T
def _gemv_kernel(
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
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SWIGLU: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """x [m, K], weight [n, K] ([2 * n, K] with SWIGLU), out [m, n]; the program's rows of the weight are one tile."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = (rows < n)[:, None]
    lines = weight + rows.to(tl.int64)[:, None] * K
    up_lines = lines + n * K if SWIGLU else lines
    columns = tl.arange(0, BLOCK_K)
    w = tl.load(lines + columns[None, :], mask=row_ok & (columns < K)[None, :], other=0.0)
    w_up = tl.load(up_lines + columns[None, :], mask=row_ok & (columns < K)[None, :], other=0.0) if SWIGLU else w
    start_dependents(PDL)
    wait_for_inputs(PDL)

    tokens = tl.arange(0, BLOCK_T)
    acc = tl.zeros([BLOCK_N, BLOCK_T], dtype=tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_T], dtype=tl.float32)
    rstd = row_rstd(x, tokens, tokens < m, eps, K, BLOCK_K) if NORM else acc
    for start in tl.static_range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        column_ok = columns < K
        if start > 0:
            w = tl.load(lines + columns[None, :], mask=row_ok & column_ok[None, :], other=0.0)
            if SWIGLU:
                w_up = tl.load(up_lines + columns[None, :], mask=row_ok & column_ok[None, :], other=0.0)
        for token in tl.static_range(BLOCK_T):
            part = tl.load(x + token * K + columns, mask=column_ok & (token < m), other=0.0)
            if NORM:
                gain = tl.load(norm_weight + columns, mask=column_ok, other=0.0)
                part = normalized(part, tl.sum(tl.where(tokens == token, rstd, 0.0), axis=0), gain)
            wide = part.to(tl.float32)[None, :]
            here = (tokens == token)[None, :]
            acc += tl.where(here, tl.sum(w.to(tl.float32) * wide, axis=1)[:, None], 0.0)
            if SWIGLU:
                up += tl.where(here, tl.sum(w_up.to(tl.float32) * wide, axis=1)[:, None], 0.0)
    store_projection(acc, up, bias, residual, out, rows, tokens, n, m, BIAS, RESIDUAL, SWIGLU)


def gemv(
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
    """residual + act(norm(x) @ weight.T + bias) of x [1..4, K] into `out` [num_tokens, N], which is returned.

    `residual` has the shape of `out`. With `swiglu` the weight has 2 * N rows, gates first, and act is silu(gate) * up.
    All tensors are contiguous.
    """
    m, k = x.shape
    n = out.shape[1]
    assert m <= MAX_TOKENS and w.weight.shape == (n * (1 + swiglu), k)
    _gemv_kernel[(triton.cdiv(n, plan.block_n),)](
        x,
        norm.weight if norm else None,
        w.weight,
        w.bias,
        residual,
        out,
        m,
        n,
        norm.eps if norm else 0.0,
        K=k,
        BLOCK_T=triton.next_power_of_2(m),
        BLOCK_N=plan.block_n,
        BLOCK_K=min(plan.block_k, triton.next_power_of_2(k)),
        NORM=norm is not None,
        BIAS=w.bias is not None,
        RESIDUAL=residual is not None,
        SWIGLU=swiglu,
        PDL=pdl,
        num_warps=plan.num_warps,
        launch_pdl=pdl,
    )
    return out
