"""Rotary embedding of q and k (https://arxiv.org/abs/2104.09864, half-split form) and the write of k and v to their
slots of the paged cache, with Qwen3's RMSNorm of each head before it: one pass over the output of the qkv projection.

(a, b) = (x[i], x[i + D/2]) becomes (a cos - b sin, b cos + a sin); every product is rounded, as in transformers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvik.kernels.triton.dispatch import RowPlan
from kvik.kernels.triton.pdl import start_dependents, wait_for_inputs
from kvik.kernels.triton.tiles import normalized

__all__ = ["qk_norm_rope_store"]


@triton.jit
def _rounded_product(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """a * b rounded to the dtype of `a`, as fp32."""
    return (a.to(tl.float32) * b).to(a.dtype).to(tl.float32)


@triton.jit
def _normed_where(
    chosen: tl.tensor, a: tl.tensor, b: tl.tensor, rstd: tl.tensor, weight: tl.tensor, i: tl.tensor, HALF: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Both halves of each head, normalised with weight [2 * HALF] where `chosen`."""
    gain_a = tl.load(weight + i, mask=i < HALF, other=0.0)[None, :]
    gain_b = tl.load(weight + HALF + i, mask=i < HALF, other=0.0)[None, :]
    return tl.where(chosen, normalized(a, rstd, gain_a), a), tl.where(chosen, normalized(b, rstd, gain_b), b)


@triton.jit
def _store_halves(places: tl.tensor, a: tl.tensor, b: tl.tensor, mask: tl.tensor, HALF: tl.constexpr) -> None:
    """Both halves of each head to `places` (of the first half), in the dtype of what is there."""
    tl.store(places, a.to(places.dtype.element_ty), mask=mask)
    tl.store(places + HALF, b.to(places.dtype.element_ty), mask=mask)


@triton.jit
def _rope_kernel(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    slots: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    q_out: tl.tensor,
    k_block_stride: int,
    v_block_stride: int,
    eps: float,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """BLOCK_H of the heads (query, key, value) of one token, each as two tiles [BLOCK_H, HALF_PADDED]."""
    HEADS: tl.constexpr = Q_HEADS + 2 * KV_HEADS
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, HALF_PADDED)
    half_ok = i < HALF
    is_q, is_k = (heads < Q_HEADS)[:, None], ((heads >= Q_HEADS) & (heads < Q_HEADS + KV_HEADS))[:, None]
    is_v = ((heads >= Q_HEADS + KV_HEADS) & (heads < HEADS))[:, None]
    ok = (heads < HEADS)[:, None] & half_ok[None, :]
    start_dependents(PDL)
    wait_for_inputs(PDL)

    token = tl.program_id(0).to(tl.int64)
    source = qkv + (token * HEADS + heads[:, None]) * (2 * HALF) + i[None, :]
    raw_a, raw_b = tl.load(source, mask=ok, other=0.0), tl.load(source + HALF, mask=ok, other=0.0)
    a, b = raw_a, raw_b
    if Q_NORM or K_NORM:
        wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
        squares = tl.sum(wide_a * wide_a + wide_b * wide_b, axis=1)
        rstd = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
    if Q_NORM:
        a, b = _normed_where(is_q, a, b, rstd, q_norm, i, HALF)
    if K_NORM:
        a, b = _normed_where(is_k, a, b, rstd, k_norm, i, HALF)
    c = tl.load(cos + token * HALF + i, mask=half_ok, other=0.0).to(raw_a.dtype).to(tl.float32)[None, :]
    s = tl.load(sin + token * HALF + i, mask=half_ok, other=0.0).to(raw_a.dtype).to(tl.float32)[None, :]
    turned_a = (_rounded_product(a, c) - _rounded_product(b, s)).to(raw_a.dtype)
    turned_b = (_rounded_product(b, c) + _rounded_product(a, s)).to(raw_a.dtype)

    q_places = q_out + (token * Q_HEADS + heads[:, None]) * (2 * HALF) + i[None, :]
    _store_halves(q_places, turned_a, turned_b, is_q & half_ok[None, :], HALF)
    slot = tl.load(slots + token).to(tl.int64)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    written = (slot >= 0) & half_ok[None, :]
    kv_head = tl.where(is_v, heads[:, None] - Q_HEADS - KV_HEADS, heads[:, None] - Q_HEADS)
    within = (kv_head * BLOCK_SIZE + offset) * (2 * HALF) + i[None, :]
    _store_halves(k_cache + block * k_block_stride + within, turned_a, turned_b, is_k & written, HALF)
    _store_halves(v_cache + block * v_block_stride + within, raw_a, raw_b, is_v & written, HALF)


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
    pdl: bool = False,
) -> Tensor:
    """`kvik.kernels.api.Ops.qk_norm_rope_store` into `out` [num_tokens, num_heads, head_dim], which is returned.

    A negative slot writes nothing to the cache: the token is padding. Blocks of the caches may lie apart
    (`stride(0)` is free), everything else is contiguous; num_tokens is not 0. plan.block is a number of heads.
    """
    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    num_heads = out.shape[1]
    assert k_cache[0].is_contiguous() and v_cache[0].is_contiguous() and head_dim % 2 == 0
    _rope_kernel[(len(qkv), triton.cdiv(num_heads + 2 * num_kv_heads, plan.block))](
        qkv,
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
        eps,
        Q_HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        HALF=head_dim // 2,
        HALF_PADDED=triton.next_power_of_2(head_dim // 2),
        BLOCK_H=plan.block,
        Q_NORM=q_norm is not None,
        K_NORM=k_norm is not None,
        PDL=pdl,
        num_warps=plan.num_warps,
        enable_fp_fusion=False,  # bf16 products are rounded before they are added
        launch_pdl=pdl,
    )
    return out
