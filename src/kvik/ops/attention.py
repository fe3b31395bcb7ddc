"""Rotary embedding and causal attention, over a paged cache and over keys and values that lie in order.

    once a step     PagedBatch: which tokens and which blocks belong to which sequence
    every layer     qk_norm_rope_store ──► KVLayer ──► paged_attention

A `KVLayer` holds k and v [num_blocks, num_kv_heads, block_size, head_dim]; slot s is position s % block_size of block
s // block_size. Keys and values in order, [num_keys, num_kv_heads, head_dim], are such a cache in blocks of one token,
so `self_attention` runs the same kernels on them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvik.attention.base import AttentionBackend, ForwardBatch
from kvik.errors import ConfigError
from kvik.kernels.api import KVLayer
from kvik.layers.rope import RopeSpec, inverse_frequencies
from kvik.ops.checks import check_alike, check_below, check_floating, check_integers, check_shape
from kvik.ops.devices import operators

__all__ = ["PagedBatch", "paged_attention", "qk_norm_rope_store", "rope", "rope_angles", "self_attention"]

_LONE_BLOCK = 16  # positions of the block of a cache without heads; any multiple of 16


class PagedBatch:
    """The sequences of one step: made once, used by every layer. On a GPU it owns the workspace of the kernels.

    query_lens    tokens of each sequence whose queries are asked: its last ones; 0 leaves it out
    seq_lens      tokens of each sequence in all, those of the step included
    block_tables  [num_seqs, max_blocks] int32 or int64, on the device of the step: block i holds positions
                  i * block_size and on. Entries past a sequence's last block may be any valid block.

    Raises ConfigError for lengths that contradict each other. Nothing is read back from the device.
    """

    def __init__(self, query_lens: Sequence[int], seq_lens: Sequence[int], block_tables: Tensor) -> None:
        if len(query_lens) != len(seq_lens) or not seq_lens:
            raise ConfigError(
                f"PagedBatch: {len(query_lens)} query_lens and {len(seq_lens)} seq_lens; give both for each sequence"
            )
        for i, (queries, length) in enumerate(zip(query_lens, seq_lens, strict=True)):
            if not 0 <= queries <= length or length == 0:
                raise ConfigError(
                    f"PagedBatch: sequence {i} has {queries} queries and {length} tokens; seq_lens counts the queries"
                )
        check_integers("PagedBatch", "block_tables", block_tables, block_tables)
        if block_tables.dim() != 2 or len(block_tables) != len(seq_lens):
            raise ConfigError(
                f"PagedBatch: block_tables must be [{len(seq_lens)}, max_blocks], one row for each sequence, got"
                f" {list(block_tables.shape)}"
            )
        starts = tuple(itertools.accumulate(query_lens, initial=0))
        device = block_tables.device
        self.step = _step(
            torch.tensor(starts, dtype=torch.int32, device=device),
            torch.tensor(seq_lens, dtype=torch.int32, device=device),
            block_tables.to(torch.int32).contiguous(),
            starts,
            tuple(seq_lens),
        )
        self.backends: dict[tuple[int, int, int, torch.dtype], AttentionBackend] = {}

    @classmethod
    def in_order(cls, num_seqs: int, num_queries: int, num_keys: int, device: torch.device) -> PagedBatch:
        """The batch of `self_attention`: equally long sequences in blocks of one token, one after the other."""
        batch = cls.__new__(cls)
        starts = range(0, (num_seqs + 1) * num_queries, num_queries)
        batch.step = _step(  # all made on the device: no copy, so it can be captured in a graph
            torch.arange(num_seqs + 1, dtype=torch.int32, device=device) * num_queries,
            torch.full((num_seqs,), num_keys, dtype=torch.int32, device=device),
            torch.arange(num_seqs * num_keys, dtype=torch.int32, device=device).view(num_seqs, num_keys),
            tuple(starts),
            (num_keys,) * num_seqs,
        )
        batch.backends = {}
        return batch


def _step(
    query_starts: Tensor, seq_lens: Tensor, tables: Tensor, starts_host: tuple[int, ...], lens_host: tuple[int, ...]
) -> ForwardBatch:
    """A `ForwardBatch` of which attention reads all that it reads."""
    none = torch.empty(0, dtype=torch.int64)
    return ForwardBatch(none, none, none, query_starts, seq_lens, tables, none, starts_host, lens_host)


@torch.no_grad()
def paged_attention(
    q: Tensor, kv: KVLayer, batch: PagedBatch, *, scale: float | None = None, window: int | None = None
) -> Tensor:
    """softmax(scale * q @ k.T) @ v over the cached context of each query's sequence -> the shape of q.

    q        [num_tokens, num_heads, head_dim], the sequences of `batch` one after the other
    kv       the cache of the layer; query head h reads key head h // (num_heads // num_kv_heads). Its type is that of
             q; on a CPU another float type or int8 will do
    scale    head_dim ** -0.5 by default
    window   a query sees so many positions, its own included; None: all before it

    Scores, softmax and sums are fp32; the weights are rounded to the type of the cache before values are multiplied.
    The keys and values of the step are in the cache already.
    """
    op = "paged_attention"
    check_floating(op, "q", q)
    _check_heads(op, q, kv, window)
    step, block_size = batch.step, kv.k.shape[2]
    check_shape(op, "q", q, (step.query_starts_host[-1], *q.shape[1:]), "for the queries of the batch")
    longest, room = max(step.seq_lens_host), step.block_tables.shape[1] * block_size
    if longest > room:
        raise ConfigError(
            f"{op}: a sequence has {longest} tokens and its row of block_tables reaches {room}:"
            f" {step.block_tables.shape[1]} blocks of {block_size}"
        )
    if step.block_tables.device != q.device:
        raise ConfigError(f"{op}: q is on {q.device} and the batch on {step.block_tables.device}; move block_tables")
    check_below(op, "block_tables", step.block_tables, len(kv.k), f"the cache has {len(kv.k)} blocks")
    if q.numel() == 0:
        return torch.empty_like(q)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ConfigError(f"{op}: scale must be above 0 and finite, got {scale}")
    window = None if window is None or window >= longest else window
    return operators(q.device).attention(q.contiguous(), kv, batch, scale, window)


@torch.no_grad()
def self_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, window: int | None = None) -> Tensor:
    """Causal attention of q [num_queries, num_heads, head_dim] over k and v [num_keys, num_kv_heads, head_dim].

    The queries are the last ones: query i stands at position num_keys - num_queries + i. All three may have a batch
    dimension in front. Returns the shape of q. `scale`, `window` and rounding are those of `paged_attention`. k and v
    are not copied where the heads of a token lie together and tokens equally far apart, as in a slice of what one
    projection of q, k and v gave.
    """
    op = "self_attention"
    check_floating(op, "q", q)
    if q.dim() not in (3, 4):
        raise ConfigError(f"{op}: q must be [num_queries, num_heads, head_dim] or a batch of it, got {list(q.shape)}")
    num_queries, num_keys = q.shape[-3], k.shape[-3] if k.dim() >= 3 else 0
    check_shape(op, "k", k, (*q.shape[:-3], num_keys, *k.shape[-2:-1], q.shape[-1]), f"for q {list(q.shape)}")
    check_shape(op, "v", v, k.shape, "like k")
    if num_queries > num_keys:
        raise ConfigError(f"{op}: {num_queries} queries and {num_keys} keys; k and v hold the queries' positions too")
    if q.numel() == 0:
        return torch.empty_like(q)
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ConfigError(f"{op}: {q.shape[-2]} query heads cannot share {k.shape[-2]} key heads; it must divide them")
    batch = PagedBatch.in_order(q[..., 0, 0, 0].numel(), num_queries, num_keys, q.device)
    tokens, kv = q.reshape(-1, *q.shape[-2:]), KVLayer(*_one_token_blocks(k, v))
    return paged_attention(tokens, kv, batch, scale=scale, window=window).view(q.shape)


def _one_token_blocks(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v [..., num_kv_heads, head_dim] as caches [tokens, num_kv_heads, 1, head_dim], equally strided."""
    k, v = (x.flatten(0, -3) for x in (k, v))  # [tokens, num_kv_heads, head_dim]
    if k.stride() != v.stride() or not k[0].is_contiguous():
        k, v = k.contiguous(), v.contiguous()
    return k.unsqueeze(2), v.unsqueeze(2)


@torch.no_grad()
def qk_norm_rope_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    kv: KVLayer,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """Normalise and rotate q and k, write k and v to the cache, return q: one pass over the output of a projection.

    qkv       [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]: query, key, then value heads
    cos, sin  [num_tokens, head_dim / 2] fp32, as `rope_angles` gives them; element i turns (i, i + head_dim / 2)
    slots     [num_tokens] int64: where each token goes. On a GPU a negative one writes nothing; on a CPU it is an error
    kv        written in place
    q_norm    [head_dim], weight of an RMSNorm of each head before the rotation, or None; k_norm likewise

    Returns q [num_tokens, num_heads, head_dim]. In torch and Triton every product is rounded, in the compiled CPU
    kernels only the results are.
    """
    op = "qk_norm_rope_store"
    check_floating(op, "qkv", qkv)
    num_kv_heads, _, head_dim = _check_cache(op, kv, "qkv", qkv)
    heads, rest = divmod(qkv.shape[-1], head_dim)
    if qkv.dim() != 2 or rest or heads <= 2 * num_kv_heads:
        raise ConfigError(
            f"{op}: qkv must be [num_tokens, (num_heads + 2 * {num_kv_heads}) * {head_dim}] for a cache with"
            f" {num_kv_heads} heads of {head_dim}, got {list(qkv.shape)}"
        )
    _check_angles(op, cos, sin, qkv, head_dim)
    check_integers(op, "slots", slots, qkv)
    check_shape(op, "slots", slots, qkv.shape[:1], f"for qkv {list(qkv.shape)}")
    num_slots = len(kv.k) * kv.k.shape[2]
    check_below(op, "slots", slots, num_slots, f"the cache has {len(kv.k)} blocks of {kv.k.shape[2]}")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            check_alike(op, name, norm, "qkv", qkv)
            check_shape(op, name, norm, (head_dim,), f"for heads of {head_dim}")
    if len(qkv) == 0:
        return qkv.new_empty((0, heads - 2 * num_kv_heads, head_dim))
    angles = cos.contiguous(), sin.contiguous()
    return operators(qkv.device).qk_norm_rope_store(
        qkv.contiguous(), *angles, slots.long().contiguous(), kv, q_norm, k_norm, eps
    )


@torch.no_grad()
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (https://arxiv.org/abs/2104.09864), half-split: x [num_tokens, num_heads, head_dim], its shape.

    cos and sin [num_tokens, head_dim / 2] fp32, as `rope_angles` gives them: (a, b) = (x[i], x[i + head_dim / 2])
    becomes (a cos - b sin, b cos + a sin). Rounded as in `qk_norm_rope_store`.
    """
    check_floating("rope", "x", x)
    if x.dim() != 3 or x.shape[2] % 2 or 0 in x.shape[1:]:
        raise ConfigError(f"rope: x must be [num_tokens, num_heads, head_dim], head_dim even, got {list(x.shape)}")
    _check_angles("rope", cos, sin, x, x.shape[2])
    if len(x) == 0:
        return torch.empty_like(x)
    # The same kernel with no keys and values to store. A float16 cache would keep it from the compiled CPU kernels.
    dtype = torch.float32 if x.device.type == "cpu" and x.dtype == torch.float16 else x.dtype
    nothing = torch.empty((1, 0, _LONE_BLOCK, x.shape[2]), dtype=dtype, device=x.device)
    slots = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return operators(x.device).qk_norm_rope_store(
        x.flatten(1).contiguous(), cos.contiguous(), sin.contiguous(), slots, KVLayer(nothing, nothing), None, None, 0.0
    )


@torch.no_grad()
def rope_angles(positions: Tensor, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [num_tokens, head_dim / 2] fp32, of the angles positions[t] * theta ** (-2 i / head_dim).

    positions [num_tokens], int64 or int32. Scaled kinds of RoPE are `kvik.layers.rope.RopeTable`'s.
    """
    check_integers("rope_angles", "positions", positions, positions)
    if head_dim < 2 or head_dim % 2 or positions.dim() != 1:
        raise ConfigError(
            f"rope_angles: positions must be [num_tokens] and head_dim even, got {list(positions.shape)} and {head_dim}"
        )
    turns = inverse_frequencies(RopeSpec("default", head_dim, theta)).to(positions.device)
    angles = positions[:, None].float() * turns
    return angles.cos(), angles.sin()


def _check_angles(op: str, cos: Tensor, sin: Tensor, x: Tensor, head_dim: int) -> None:
    for name, angle in (("cos", cos), ("sin", sin)):
        if angle.dtype != torch.float32 or angle.device != x.device:
            raise ConfigError(f"{op}: {name} must be float32 on {x.device}, got {angle.dtype} on {angle.device}")
        check_shape(op, name, angle, (len(x), head_dim // 2), f"for {len(x)} tokens and heads of {head_dim}")


def _check_cache(op: str, kv: KVLayer, name: str, like: Tensor) -> tuple[int, int, int]:
    """(num_kv_heads, block_size, head_dim) of a cache that can be used beside `like`."""
    if kv.k.dim() != 4 or kv.v.shape != kv.k.shape or 0 in kv.k.shape:
        raise ConfigError(
            f"{op}: a cache is two equal tensors [num_blocks, num_kv_heads, block_size, head_dim], got"
            f" {list(kv.k.shape)} and {list(kv.v.shape)}"
        )
    if kv.k.stride() != kv.v.stride() or not kv.k[0].is_contiguous():
        raise ConfigError(f"{op}: the blocks of a cache must be contiguous, got strides {kv.k.stride()}; copy it first")
    num_kv_heads, block_size, head_dim = kv.k.shape[1:]
    if like.device.type != "cpu":
        check_alike(op, "the cache", kv.k, name, like)
    elif kv.k.dtype != torch.int8:
        check_floating(op, "the cache", kv.k)
    elif kv.k_scale is None or kv.v_scale is None:
        raise ConfigError(f"{op}: an int8 cache needs k_scale and v_scale; KVLayer.zeros makes one with them")
    for scale_name, scale in (("k_scale", kv.k_scale), ("v_scale", kv.v_scale)):
        if scale is not None:
            _check_scale(op, scale_name, scale, kv.k)
    check_alike(op, "the cache's v", kv.v, "its k", kv.k)
    if kv.k.device != like.device:
        raise ConfigError(f"{op}: {name} is on {like.device} and the cache on {kv.k.device}; move one of them")
    return num_kv_heads, block_size, head_dim


def _check_scale(op: str, name: str, scale: Tensor, cache: Tensor) -> None:
    if cache.dtype != torch.int8:
        raise ConfigError(f"{op}: {name} belongs to an int8 cache; this one is {cache.dtype}")
    if scale.dtype != torch.float32 or scale.device != cache.device:
        raise ConfigError(f"{op}: {name} must be float32 on {cache.device}, got {scale.dtype} on {scale.device}")
    check_shape(op, name, scale, cache.shape[:3], f"for a cache {list(cache.shape)}")
    if not scale[0].is_contiguous():
        raise ConfigError(f"{op}: {name} must be contiguous within a block, got strides {scale.stride()}")


def _check_heads(op: str, q: Tensor, kv: KVLayer, window: int | None) -> None:
    num_kv_heads, _, head_dim = _check_cache(op, kv, "q", q)
    if q.dim() != 3 or q.shape[2] != head_dim or q.shape[1] % num_kv_heads:
        raise ConfigError(
            f"{op}: q must be [num_tokens, a multiple of {num_kv_heads} heads, {head_dim}] for this cache, got"
            f" {list(q.shape)}"
        )
    if window is not None and window < 1:
        raise ConfigError(f"{op}: window must be at least 1, a query's own position, or None, got {window}")
