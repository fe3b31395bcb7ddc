"""Projections of few tokens on tensor cores: the weight's rows are the M dimension of the product, the tokens N.

out[t, i] = epilogue(sum_k w[i, k] * x[t, k]); a tile [BLOCK_N, BLOCK_K] of the weight times one [BLOCK_K, BLOCK_T] of x
at a time, so that matrices of 64 rows are full at any number of tokens. With less than a GPU full of output tiles,
K is split among SPLIT_K programs, which leave their sums for the kernel that reads the result to add up, in the order
of K (`Parts`): that kernel starts when all of them are done anyway, so nobody waits within this one. Any number of
tokens works; a row's result does not depend on how many there are, as long as the plan is the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kvik.kernels.api import LinearWeight
from kvik.kernels.triton.dispatch import Plan
from kvik.kernels.triton.pdl import prefetch_l2, start_dependents, wait_for_inputs
from kvik.kernels.triton.tiles import store_projection

__all__ = ["skinny"]


@triton.jit
def _prefetch(
    weight: tl.tensor, rows: tl.tensor, n: int, first: int, K: tl.constexpr, SPAN: tl.constexpr, COUNT: tl.constexpr
) -> None:
    """The first COUNT of the SPAN columns from `first` of each row, where the copy engine can address them."""
    if COUNT > 0 and K % SPAN == 0 and K * weight.dtype.element_ty.primitive_bitwidth % 128 == 0:
        num_bytes: tl.constexpr = COUNT * weight.dtype.element_ty.primitive_bitwidth // 8
        prefetch_l2(weight + rows.to(tl.int64) * K + first, tl.where(rows < n, num_bytes, 0))


@triton.jit
def _weight_tile(
    weight: tl.tensor, rows: tl.tensor, column: int, K: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr
) -> tl.tensor:
    """[len(rows), BLOCK_K] of `rows` from `column` on, zero behind K."""
    columns = column + tl.arange(0, BLOCK_K)
    places = weight + rows.to(tl.int64)[:, None] * K + columns[None, :]
    return tl.load(places) if EVEN else tl.load(places, mask=(columns < K)[None, :], other=0.0)


@triton.jit(do_not_specialize=["m"])  # one compilation for every number of tokens
def _skinny_kernel(
    x: tl.tensor, weight: tl.tensor, weight_tiles: tl.tensor, bias: tl.tensor, residual: tl.tensor, out: tl.tensor,
    m: int, n: int, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr, PREFETCH: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr,
    TMA: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """x [m, K], weight [n, K] ([2 * n, K] with SWIGLU), out [m, n], or parts [SPLIT_K, m, n] fp32 with SPLIT_K > 1.
    x and weight_tiles are descriptors with TMA. Programs: token blocks (fastest, so that they share a weight tile in
    L2), row blocks, parts of K."""
    SPAN: tl.constexpr = (K + SPLIT_K * BLOCK_K - 1) // (SPLIT_K * BLOCK_K) * BLOCK_K
    EVEN: tl.constexpr = SPAN * SPLIT_K == K
    COUNT: tl.constexpr = min(PREFETCH * BLOCK_K, SPAN)
    token, row, first = tl.program_id(0) * BLOCK_T, tl.program_id(1) * BLOCK_N, tl.program_id(2) * SPAN
    tokens, rows = token + tl.arange(0, BLOCK_T), row + tl.arange(0, BLOCK_N)
    STACKED: tl.constexpr = SWIGLU and not TMA  # gates and ups are the rows of one product
    lines = tl.minimum(rows, n - 1)
    if STACKED:
        line = tl.arange(0, 2 * BLOCK_N)
        lines = tl.minimum(row + line % BLOCK_N, n - 1) + tl.where(line < BLOCK_N, 0, n)
    start_dependents(PDL)
    if PDL:
        _prefetch(weight, rows, n, first, K, SPAN, COUNT)
        if SWIGLU:
            _prefetch(weight + n * K, rows, n, first, K, SPAN, COUNT)
    wait_for_inputs(PDL)

    acc = tl.zeros([2 * BLOCK_N if STACKED else BLOCK_N, BLOCK_T], dtype=tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_T], dtype=tl.float32)
    for column in range(first, first + SPAN, BLOCK_K):
        if TMA:
            part = tl.trans(x.load([token, column]))
            acc = tl.dot(weight_tiles.load([row, column]), part, acc)
            if SWIGLU:
                up = tl.dot(weight_tiles.load([n + row, column]), part, up)
        else:
            columns = column + tl.arange(0, BLOCK_K)
            x_ok = (tokens < m)[None, :] if EVEN else (tokens < m)[None, :] & (columns < K)[:, None]
            part = tl.load(x + tokens.to(tl.int64)[None, :] * K + columns[:, None], mask=x_ok, other=0.0)
            acc = tl.dot(_weight_tile(weight, lines, column, K, EVEN, BLOCK_K), part, acc, input_precision="ieee")
    if STACKED:
        acc, up = tl.split(tl.permute(tl.reshape(acc, [2, BLOCK_N, BLOCK_T]), (1, 2, 0)))
    if SPLIT_K == 1:
        store_projection(acc, up, bias, residual, out, rows, tokens, n, m, BIAS, RESIDUAL, SWIGLU)
    else:
        places = (tl.program_id(2) * m + tokens).to(tl.int64)[None, :] * n + rows[:, None]
        tl.store(out + places, acc, mask=(rows < n)[:, None] & (tokens < m)[None, :])


def _fits_tma(x: Tensor, weight: Tensor) -> bool:
    return x.dtype.itemsize == 2 and x.shape[1] % 8 == 0 and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0


def skinny(
    x: Tensor,
    w: LinearWeight,
    plan: Plan,
    *,
    residual: Tensor | None = None,
    swiglu: bool = False,
    pdl: bool = False,
    tma: bool = False,
) -> Tensor:
    """residual + act(x @ weight.T + bias) of x [num_tokens, K] -> [num_tokens, N].

    With plan.split_k > 1, [split_k, num_tokens, N] fp32 that add up to x @ weight.T, and nothing else.
    `residual` has the shape of the result. With `swiglu` the weight has 2 * N rows, gates first, act is
    silu(gate) * up, and K is never split. All tensors are contiguous. `tma` lets the tensor memory accelerator copy
    tiles (Hopper).
    """
    (m, k), n = x.shape, w.weight.shape[0] // (1 + swiglu)
    # A part that would begin behind K has nothing to add.
    split_k = 1 if swiglu else min(plan.split_k, triton.cdiv(k, plan.block_k))
    out = x.new_empty((m, n)) if split_k == 1 else x.new_empty((split_k, m, n), dtype=torch.float32)
    tma = tma and plan.tma and _fits_tma(x, w.weight)
    tiles: list[Tensor | TensorDescriptor] = [x, w.weight]
    if tma:
        blocks = ([plan.block_t, plan.block_k], [plan.block_n, plan.block_k])
        tiles = [TensorDescriptor.from_tensor(*pair) for pair in zip(tiles, blocks, strict=True)]
    _skinny_kernel[triton.cdiv(m, plan.block_t), triton.cdiv(n, plan.block_n), split_k](
        tiles[0],
        w.weight,
        tiles[1],
        w.bias,
        residual,
        out,
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
        TMA=tma,
        PDL=pdl,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        launch_pdl=pdl,
    )
    return out
