"""Rotary embedding of q and k (https://arxiv.org/abs/2104.09864, half-split form) and the write of k and v to their
slots of the paged cache, with Qwen3's RMSNorm of each head before it: one pass over the output of the qkv projection.

(a, b) = (x[i], x[i + D/2]) becomes (a cos - b sin, b cos + a sin); every product is rounded, as in transformers.

Values in the cache are finite, whatever a model gives: attention multiplies what lies in a block behind a sequence's
end by 0, which must be 0, whoever wrote there before. A head of a token with a value that is not finite gets a key of
NaN instead, so that the sequence itself stays as broken as it is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvik.kernels.triton.dispatch import RowPlan
from kvik.kernels.triton.pdl import start_dependents, wait_for_inputs
from kvik.kernels.triton.tiles import add_parts, normalized

__all__ = ["qk_norm_rope_store"]


@triton.jit
def _rounded_product(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """a * b rounded to the dtype of `a`, as fp32."""
    return (a.to(tl.float32) * b).to(a.dtype).to(tl.float32)


@triton.jit
def _normed(
    a: tl.tensor, b: tl.tensor, weight: tl.tensor, i: tl.tensor, eps: float, HALF: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Both halves of each head, normalised with weight [2 * HALF]."""
    wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide_a * wide_a + wide_b * wide_b, axis=1) / (2 * HALF) + eps)[:, None]
    gain_a = tl.load(weight + i, mask=i < HALF, other=0.0)[None, :]
    gain_b = tl.load(weight + HALF + i, mask=i < HALF, other=0.0)[None, :]
    return normalized(a, rstd, gain_a), normalized(b, rstd, gain_b)


@triton.jit
def _turned(a: tl.tensor, b: tl.tensor, cos: tl.tensor, sin: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Both halves of each head, rotated."""
    turned_a = (_rounded_product(a, cos) - _rounded_product(b, sin)).to(a.dtype)
    return turned_a, (_rounded_product(b, cos) + _rounded_product(a, sin)).to(a.dtype)


@triton.jit
def _is_finite(x: tl.tensor) -> tl.tensor:
    wide = x.to(tl.float32)
    return wide - wide == 0.0


@triton.jit
def _store_halves(places: tl.tensor, a: tl.tensor, b: tl.tensor, mask: tl.tensor, HALF: tl.constexpr) -> None:
    """Both halves of each head to `places` (of the first half), in the dtype of what is there."""
    tl.store(places, a.to(places.dtype.element_ty), mask=mask)
    tl.store(places + HALF, b.to(places.dtype.element_ty), mask=mask)


@triton.jit
def _load_halves(
    qkv: tl.tensor, bias: tl.tensor, token: tl.tensor, heads: tl.tensor, i: tl.tensor, ok: tl.tensor, like: tl.tensor,
    HEADS: tl.constexpr, HALF: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Both halves of each of `heads` of a token; with PARTS of the sum of parts, in `like`'s dtype."""
    column = heads[:, None] * (2 * HALF) + i[None, :]
    place = token * (HEADS * 2 * HALF) + column
    if PARTS > 0:
        stride = tl.num_programs(0).to(tl.int64) * (HEADS * 2 * HALF)
        a = add_parts(qkv + place, stride, bias, column, ok, PARTS, BIAS).to(like.dtype.element_ty)
        b = add_parts(qkv + place + HALF, stride, bias, column + HALF, ok, PARTS, BIAS).to(like.dtype.element_ty)
    else:
        a, b = tl.load(qkv + place, mask=ok, other=0.0), tl.load(qkv + place + HALF, mask=ok, other=0.0)
    return a, b


@triton.jit
def _rope_kernel(
    qkv: tl.tensor, bias: tl.tensor, cos: tl.tensor, sin: tl.tensor, slots: tl.tensor, k_cache: tl.tensor,
    v_cache: tl.tensor, q_norm: tl.tensor, k_norm: tl.tensor, q_out: tl.tensor, k_block_stride: int,
    v_block_stride: int, angle_stride: int, eps: float, Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, BLOCK_H: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """BLOCK_H query heads of a token, or as many keys and their values, each as two tiles [BLOCK_H, HALF_PADDED].
    With PARTS, qkv is [PARTS, num_tokens, HEADS * 2 * HALF] fp32, to which bias is added with BIAS."""
    HEADS: tl.constexpr = Q_HEADS + 2 * KV_HEADS
    Q_PROGRAMS: tl.constexpr = (Q_HEADS + BLOCK_H - 1) // BLOCK_H
    i = tl.arange(0, HALF_PADDED)
    start_dependents(PDL)
    wait_for_inputs(PDL)

    token = tl.program_id(0).to(tl.int64)
    dtype = q_out.dtype.element_ty
    c = tl.load(cos + token * angle_stride + i, mask=i < HALF, other=0.0).to(dtype).to(tl.float32)[None, :]
    s = tl.load(sin + token * angle_stride + i, mask=i < HALF, other=0.0).to(dtype).to(tl.float32)[None, :]
    if tl.program_id(1) < Q_PROGRAMS:
        heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        ok = (heads < Q_HEADS)[:, None] & (i < HALF)[None, :]
        a, b = _load_halves(qkv, bias, token, heads, i, ok, q_out, HEADS, HALF, PARTS, BIAS)
        if Q_NORM:
            a, b = _normed(a, b, q_norm, i, eps, HALF)
        a, b = _turned(a, b, c, s)
        places = q_out + (token * Q_HEADS + heads[:, None]) * (2 * HALF) + i[None, :]
        _store_halves(places, a, b, ok, HALF)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        heads = (tl.program_id(1) - Q_PROGRAMS) * BLOCK_H + tl.arange(0, BLOCK_H)
        ok = (heads < KV_HEADS)[:, None] & (i < HALF)[None, :]
        a, b = _load_halves(qkv, bias, token, Q_HEADS + heads, i, ok, q_out, HEADS, HALF, PARTS, BIAS)
        value_a, value_b = _load_halves(
            qkv, bias, token, Q_HEADS + KV_HEADS + heads, i, ok, q_out, HEADS, HALF, PARTS, BIAS
        )
        if K_NORM:
            a, b = _normed(a, b, k_norm, i, eps, HALF)
        a, b = _turned(a, b, c, s)
        fine_a, fine_b = _is_finite(value_a), _is_finite(value_b)
        broken = tl.max((~(fine_a & fine_b)).to(tl.int32), axis=1) > 0
        key_a = tl.where(broken[:, None], float("nan"), a.to(tl.float32))
        ok &= slot >= 0
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        within = (heads[:, None] * BLOCK_SIZE + offset) * (2 * HALF) + i[None, :]
        _store_halves(k_cache + block * k_block_stride + within, key_a, b, ok, HALF)
        finite_a = tl.where(fine_a, value_a.to(tl.float32), 0.0)
        finite_b = tl.where(fine_b, value_b.to(tl.float32), 0.0)
        _store_halves(v_cache + block * v_block_stride + within, finite_a, finite_b, ok, HALF)


def qk_norm_rope_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    plan: RowPlan,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """`kvik.kernels.api.Ops.qk_norm_rope_store` into `out` [num_tokens, num_heads, head_dim], which is returned.

    A negative slot writes nothing to the cache: the token is padding. Blocks of the caches and rows of cos and sin may
    lie apart (`stride(0)` is free), everything else is contiguous; num_tokens is not 0. plan.block is a number of
    heads.
    qkv may be the parts of a projection with a split K, [num_parts, num_tokens, ...] fp32, to which `bias` is added.
    """
    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    num_tokens, num_heads = out.shape[:2]
    assert cos.stride() == sin.stride() and cos.stride(1) == 1
    assert k_cache[0].is_contiguous() and v_cache[0].is_contiguous() and head_dim % 2 == 0
    _rope_kernel[(num_tokens, triton.cdiv(num_heads, plan.block) + triton.cdiv(num_kv_heads, plan.block))](
        qkv,
        bias,
        cos,
        sin,
        slots,
        k_cache,
        v_cache,
        q_norm,
        k_norm,
        out,
        k_cache.stride(0),
        v_cache.stride(0),
        cos.stride(0),
        eps,
        Q_HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        HALF=head_dim // 2,
        HALF_PADDED=triton.next_power_of_2(head_dim // 2),
        BLOCK_H=plan.block,
        Q_NORM=q_norm is not None,
        K_NORM=k_norm is not None,
        PARTS=len(qkv) if qkv.dim() == 3 else 0,
        BIAS=bias is not None,
        PDL=pdl,
        num_warps=plan.num_warps,
        enable_fp_fusion=False,  # bf16 products are rounded before they are added
        launch_pdl=pdl,
    )
    return out
