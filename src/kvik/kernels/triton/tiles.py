"""What the kernels share inside: the normalisation and the end of a projection, with the reference's rounding.

A product of weights and activations is held as [BLOCK_N, BLOCK_T]: weight rows first, tokens second.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["add_parts", "normalized", "row_rstd", "silu", "store_projection"]


@triton.jit
def row_rstd(
    x: tl.tensor, tokens: tl.tensor, token_ok: tl.tensor, eps: float, K: tl.constexpr, BLOCK_K: tl.constexpr
) -> tl.tensor:
    """1 / sqrt(mean(x^2) + eps) of rows `tokens` of x [num_tokens, K] -> fp32, the shape of `tokens`."""
    squares = tl.zeros_like(tokens).to(tl.float32)
    rows = x + tokens.to(tl.int64)[:, None] * K
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        part = tl.load(rows + columns[None, :], mask=token_ok[:, None] & (columns < K)[None, :], other=0.0)
        part = part.to(tl.float32)
        squares += tl.sum(part * part, axis=1)
    return tl.rsqrt(squares / K + eps)


@triton.jit
def add_parts(
    places: tl.tensor, stride: tl.tensor, bias: tl.tensor, columns: tl.tensor, ok: tl.tensor, PARTS: tl.constexpr,
    BIAS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The sum in fp32 of what PARTS tensors, `stride` elements apart, hold at `places`, and of bias at `columns`."""
    total = tl.zeros(ok.shape, dtype=tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(places + part * stride, mask=ok, other=0.0)
    if BIAS:
        total += tl.load(bias + columns, mask=ok, other=0.0).to(tl.float32)
    return total


@triton.jit
def normalized(x: tl.tensor, rstd: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """weight * (x * rstd), rounded to the dtype of `x` after each product, as transformers does."""
    scaled = (x.to(tl.float32) * rstd).to(x.dtype).to(tl.float32)
    return (scaled * weight.to(tl.float32)).to(x.dtype)


@triton.jit
def silu(x: tl.tensor) -> tl.tensor:
    """x / (1 + exp(-x)) in fp32, rounded to the dtype of `x`."""
    wide = x.to(tl.float32)
    return (wide / (1.0 + tl.exp(-wide))).to(x.dtype)


@triton.jit
def store_projection(
    acc: tl.tensor,
    up: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    tokens: tl.tensor,
    n: int,
    m: int,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SWIGLU: tl.constexpr,
) -> None:
    """Write acc [BLOCK_N, BLOCK_T] to rows `tokens`, columns `rows` of out [m, n], after bias, SwiGLU and residual.

    Rounded to out's dtype after the bias, after silu, after gate * up and after the residual. `up` is read with SWIGLU.
    """
    dtype = out.dtype.element_ty
    row_ok = rows < n
    ok = row_ok[:, None] & (tokens < m)[None, :]
    places = tokens.to(tl.int64)[None, :] * n + rows[:, None]
    if BIAS:
        acc += tl.load(bias + rows, mask=row_ok, other=0.0).to(tl.float32)[:, None]
    result = acc.to(dtype)
    if SWIGLU:
        if BIAS:
            up += tl.load(bias + n + rows, mask=row_ok, other=0.0).to(tl.float32)[:, None]
        result = (silu(result).to(tl.float32) * up.to(dtype).to(tl.float32)).to(dtype)
    if RESIDUAL:
        result = (result.to(tl.float32) + tl.load(residual + places, mask=ok, other=0.0).to(tl.float32)).to(dtype)
    tl.store(out + places, result, mask=ok)
