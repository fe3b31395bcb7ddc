"""Attention for CPUs, from batched matrix products of torch.

Sequences that have the same number of queries and similar lengths are computed together, which is what keeps a decode
step of many sequences from being bound by the dispatch of small operations. The query heads that share a key head are
folded into the query dimension. Queries are taken a tile at a time, so a long prompt never has a full score matrix,
and each tile gathers only the blocks that its causal mask and sliding window leave visible.

    a sequence    block 0 | block 1 | block 2 | block 3 | block 4
    one tile                [base ........... base + num_keys)          positions; base is the start of a block
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvik.attention.base import ForwardBatch
from kvik.kernels.api import KVLayer
from kvik.kernels.reference import dequantize_kv

__all__ = ["CpuAttention"]

_TILE_QUERIES = 64  # measured best of 32..256 at 1k to 4k keys, for 2 and 7 query heads per key head
_MIN_TILE_QUERIES = 8
_TILE_SCORES = 4 << 20  # elements of a score tile, so that it stays in a last-level cache
_GROUP_BYTES = 4 << 20  # of gathered keys; larger groups leave the cache between the gather and the product
_EXACT_SCORE = 8.0  # 16-bit scores below this are rounded by less than 2^-6


class CpuAttention:
    """`AttentionBackend` for the CPU."""

    def forward(self, q: Tensor, kv: KVLayer, batch: ForwardBatch, *, scale: float, window: int | None) -> Tensor:
        out = torch.empty_like(q)
        q = q.to(_product_type(q.dtype))
        for group in _groups(batch, kv.k, q.shape[1], q.element_size()):
            for start, end in group.tiles(q.shape[1]):
                tile = _Tile(group, start, end, window, block_size=kv.k.shape[2])
                tokens = group.tokens[:, start:end]
                out[tokens] = _attend(q[tokens], *_gather(tile, kv, batch, q.dtype), tile, scale).to(out.dtype)
        return out


@functools.cache
def _product_type(dtype: torch.dtype) -> torch.dtype:
    """The type to multiply in: float32 where oneDNN has no products of a 16-bit type, as on CPUs without AVX-512. There
    torch's own take 20 times as long (torch 2.13, Zen 3)."""
    if dtype not in (torch.bfloat16, torch.float16) or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return torch.float32
    kinds = torch.ops.mkldnn
    supported = kinds._is_mkldnn_bf16_supported if dtype is torch.bfloat16 else kinds._is_mkldnn_fp16_supported
    return dtype if supported() else torch.float32


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Sequences with `num_queries` queries each, shortest first."""

    members: tuple[int, ...]  # rows of the batch
    lens: tuple[int, ...]
    tokens: Tensor  # [num_seqs, num_queries] indices into the batch's tokens

    @property
    def num_queries(self) -> int:
        return self.tokens.shape[1]

    def tiles(self, num_heads: int) -> Iterator[tuple[int, int]]:
        """Ranges of queries whose scores against all keys fit in a tile."""
        rows = _TILE_SCORES // (len(self.members) * num_heads * self.lens[-1])
        step = max(min(rows, _TILE_QUERIES), _MIN_TILE_QUERIES)
        return ((a, min(a + step, self.num_queries)) for a in range(0, self.num_queries, step))


class _Tile:
    """Queries [start, end) of a group, and the blocks that hold the keys which any of them sees."""

    def __init__(self, group: _Group, start: int, end: int, window: int | None, *, block_size: int) -> None:
        first = group.lens[0] - group.num_queries + start  # position of the shortest sequence's first query
        beyond = group.lens[-1] - group.num_queries + end  # one past the longest sequence's last query
        self.group, self.start, self.end, self.window = group, start, end, window
        self.first_block = 0 if window is None else max(0, first - window + 1) // block_size
        self.last_block = -(-beyond // block_size)
        self.base = self.first_block * block_size
        self.num_keys = beyond - self.base
        # Keys up to the position `first` are seen by every query, unless a window hides old ones.
        self.first_hidden = 0 if window is not None else first + 1 - self.base

    def hidden(self) -> Tensor:
        """[num_seqs, 1, 1, num_queries, keys from first_hidden on]: True where a query must not see the key."""
        lens = torch.tensor(self.group.lens)[:, None, None]
        positions = lens - self.group.num_queries + torch.arange(self.start, self.end)[:, None]
        keys = torch.arange(self.base + self.first_hidden, self.base + self.num_keys)
        mask = keys > positions
        if self.window is not None:
            mask |= keys <= positions - self.window
        return mask[:, None, None]

    def mask(self, scores: Tensor) -> None:
        """Set to -inf what is hidden in scores [num_seqs, num_kv_heads, group, num_queries, gathered keys]."""
        scores[..., self.num_keys :].fill_(float("-inf"))
        if self.first_hidden < self.num_keys:
            scores[..., self.first_hidden : self.num_keys].masked_fill_(self.hidden(), float("-inf"))

    def clear(self, v: Tensor) -> None:
        """Zero what lies past each sequence's end in v: a weight of 0 does not cancel a NaN that was there before."""
        v[:, :, self.num_keys :].zero_()
        shortest = max(self.group.lens[0] - self.base, 0)
        if shortest < self.num_keys:
            keys = torch.arange(self.base + shortest, self.base + self.num_keys)
            past = keys >= torch.tensor(self.group.lens)[:, None]  # [num_seqs, keys]
            v[:, :, shortest : self.num_keys].masked_fill_(past[:, None, :, None], 0)


def _groups(batch: ForwardBatch, k_cache: Tensor, num_heads: int, element_size: int) -> Iterator[_Group]:
    """Partition the sequences: same number of queries, at most twice the blocks of the shortest, a bounded gather."""
    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    block_bytes = num_kv_heads * block_size * head_dim * element_size
    starts, lens = batch.query_starts_host, batch.seq_lens_host
    counts = [end - start for start, end in itertools.pairwise(starts)]
    members: list[int] = []
    for i in sorted((i for i, count in enumerate(counts) if count), key=lambda i: (counts[i], lens[i])):
        if members:
            blocks = -(-lens[i] // block_size)
            alike = counts[i] == counts[members[0]] and blocks <= 2 * -(-lens[members[0]] // block_size)
            size = len(members) + 1
            scores = size * counts[i] * num_heads * lens[i]
            if not alike or size * blocks * block_bytes > _GROUP_BYTES or scores > _TILE_SCORES:
                yield _group(batch, members)
                members = []
        members.append(i)
    if members:
        yield _group(batch, members)


def _group(batch: ForwardBatch, members: list[int]) -> _Group:
    starts = batch.query_starts_host
    num_queries = starts[members[0] + 1] - starts[members[0]]
    tokens = torch.tensor([starts[i] for i in members])[:, None] + torch.arange(num_queries)
    return _Group(tuple(members), tuple(batch.seq_lens_host[i] for i in members), tokens)


def _gather(tile: _Tile, kv: KVLayer, batch: ForwardBatch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of the tile's blocks: two [num_seqs, num_kv_heads, num_blocks * block_size, head_dim]."""
    num_kv_heads, _, head_dim = kv.k.shape[1:]
    table = batch.block_tables[list(tile.group.members), tile.first_block : tile.last_block]  # [num_seqs, num_blocks]

    def gather(cache: Tensor, scales: Tensor | None) -> Tensor:
        picked = None if scales is None else _pick_heads(scales, table)
        return dequantize_kv(_pick_heads(cache, table), picked, dtype).view(len(table), num_kv_heads, -1, head_dim)

    return gather(kv.k, kv.k_scale), gather(kv.v, kv.v_scale)


def _pick_heads(cache: Tensor, table: Tensor) -> Tensor:
    """The blocks in `table` [num_seqs, num_blocks] of `cache` [num_blocks, num_kv_heads, block_size, ...], those of one
    sequence and head one after the other: [num_seqs * num_kv_heads * num_blocks, block_size, ...]."""
    num_heads, size = cache.shape[1], math.prod(cache.shape[2:])
    if cache.stride(0) % size:
        cache = cache.contiguous()
    between = cache.stride(0) // size  # heads from a block to the next one, other layers' among them
    shape = ((len(cache) - 1) * between + num_heads, *cache.shape[2:])
    rows = table[:, None].long() * between + torch.arange(num_heads)[:, None]
    return cache.as_strided(shape, (size, *cache.stride()[2:])).index_select(0, rows.flatten())


def _attend(q: Tensor, k: Tensor, v: Tensor, tile: _Tile, scale: float) -> Tensor:
    """q [num_seqs, num_queries, num_heads, head_dim] against the gathered keys -> the shape of q."""
    num_seqs, num_queries, num_heads, head_dim = q.shape
    folded = q.view(num_seqs, num_queries, k.shape[1], -1, head_dim).permute(0, 2, 3, 1, 4)
    # [num_seqs * num_kv_heads, group * num_queries, gathered keys]
    scores = _scores(folded.reshape(num_seqs * k.shape[1], -1, head_dim), k.flatten(0, 1), scale)
    tile.mask(scores.view(num_seqs, k.shape[1], -1, num_queries, k.shape[2]))
    tile.clear(v)
    context = torch.bmm(scores.softmax(dim=-1).to(q.dtype), v.flatten(0, 1))
    return context.view(num_seqs, num_heads, num_queries, head_dim).transpose(1, 2)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale * q @ k.T per batch entry; of 16-bit inputs, in fp32 and exact to fp32 when that matters.

    torch has no 16-bit product with a 32-bit result on the CPU. Scores of 100, which some models have, would be rounded
    by 0.25; a second product gives the rounding error, since what is subtracted inside it is not rounded.

    k must be dense: with a slice of a larger tensor the bfloat16 product is 16 times slower (torch 2.13, Zen 5).
    """
    k = k.transpose(1, 2)
    scores = torch.baddbmm(q.new_empty(1), q, k, beta=0, alpha=scale)
    if q.dtype == torch.float32 or max(abs(x) for x in torch.stack(torch.aminmax(scores)).tolist()) < _EXACT_SCORE:
        return scores
    return scores.float() + torch.baddbmm(scores, q, k, beta=-1, alpha=scale).float()
