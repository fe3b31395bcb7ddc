"""The work lists of the attention kernels, built on the device once per step and read by every layer.

A sequence with at most `max_queries` queries is cut into chunks of keys for the decode kernel, one with more into tiles
of queries for the prefill kernel. Which of them depends on the sequence alone, never on the rest of the batch.

    seq 0: 1 query, 1300 keys     ->  decode items  (0, 0) (0, 1) (0, 2), those of the longest chunks first
    seq 1: 100 queries            ->  prefill items (1, 0) (1, 1) (1, 2) (1, 3)
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvik.kernels.triton.attention_tile import AttentionTiles

__all__ = ["ITEM_SIZE", "chunk_of", "plan_attention"]

ITEM_SIZE = 4
"""Numbers of a work item: sequence, chunk or tile, first token of the sequence in the step, its context length."""

WRITE = 64  # items written at a time
ITEM = tl.constexpr(ITEM_SIZE)


@triton.jit
def chunk_of(seq_len: tl.tensor, CHUNK: tl.constexpr, SHORT_LEN: tl.constexpr, SHORT_CHUNK: tl.constexpr,
             UNIT: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Keys of a work item of a sequence, which depends on its length only: with UNIT, a multiple of it, as even as
    possible and nearest to CHUNK, since to merge a small rest costs more than to read it in the same item."""
    size = seq_len * 0 + CHUNK
    if UNIT > 0:
        count = tl.maximum((seq_len + CHUNK // 2) // CHUNK, 1)
        size = tl.maximum(tl.cdiv(tl.cdiv(seq_len, count), UNIT), 1) * UNIT
    return tl.where(seq_len <= SHORT_LEN, SHORT_CHUNK, size)


@triton.jit
def _write(items: tl.tensor, start: tl.tensor, count: tl.tensor, sequence: tl.tensor, token: tl.tensor,
           length: tl.tensor, BLOCK: tl.constexpr) -> None:  # fmt: skip
    for first in range(0, count, BLOCK):
        part = first + tl.arange(0, BLOCK)
        item = items + ITEM * (start + part)
        tl.store(item, sequence, mask=part < count)
        tl.store(item + 1, part, mask=part < count)
        tl.store(item + 2, token, mask=part < count)
        tl.store(item + 3, length, mask=part < count)


@triton.jit(do_not_specialize=["num_seqs"])
def _plan(query_starts: tl.tensor, seq_lens: tl.tensor, decode_items: tl.tensor, prefill_items: tl.tensor,
          counts: tl.tensor, num_seqs: tl.tensor, MAX_QUERIES: tl.constexpr, CHUNK: tl.constexpr,
          SHORT_LEN: tl.constexpr, SHORT_CHUNK: tl.constexpr, UNIT: tl.constexpr, TILE_QUERIES: tl.constexpr,
          SEQS: tl.constexpr, BLOCK: tl.constexpr) -> None:  # fmt: skip
    sequence = tl.program_id(0)
    ids = tl.arange(0, SEQS)
    held = ids < num_seqs
    queries = tl.load(query_starts + ids + 1, mask=held, other=0) - tl.load(query_starts + ids, mask=held, other=0)
    lens = tl.load(seq_lens + ids, mask=held, other=0)
    sizes = chunk_of(lens, CHUNK, SHORT_LEN, SHORT_CHUNK, UNIT)
    chunks = tl.maximum(tl.cdiv(lens, sizes), 1)
    chunks = tl.where((queries > 0) & (queries <= MAX_QUERIES), chunks, 0)
    tiles = tl.where(queries > MAX_QUERIES, tl.cdiv(queries, TILE_QUERIES), 0)
    before, mine = ids < sequence, ids == sequence
    # Longest chunks first, since all of the GPU waits for the one that begins last.
    sizes = tl.minimum(lens, sizes)
    size = tl.sum(tl.where(mine, sizes, 0))
    first = (sizes > size) | ((sizes == size) & before)
    before_chunks, my_chunks = tl.sum(tl.where(first, chunks, 0)), tl.sum(tl.where(mine, chunks, 0))
    before_tiles, my_tiles = tl.sum(tl.where(before, tiles, 0)), tl.sum(tl.where(mine, tiles, 0))
    token, length = tl.load(query_starts + sequence), tl.load(seq_lens + sequence)
    _write(decode_items, before_chunks, my_chunks, sequence, token, length, BLOCK)
    _write(prefill_items, before_tiles, my_tiles, sequence, token, length, BLOCK)
    if sequence == num_seqs - 1:
        tl.store(counts, tl.sum(chunks))
        tl.store(counts + 1, before_tiles + my_tiles)


def plan_attention(
    query_starts: Tensor, seq_lens: Tensor, decode_items: Tensor, prefill_items: Tensor, counts: Tensor, *,
    max_seqs: int, max_queries: int, tiles: AttentionTiles, tile_queries: int,
) -> None:  # fmt: skip
    """Fill the lists of (sequence, chunk) and (sequence, tile of queries), and how many there are of each.

    query_starts: [num_seqs + 1] int32; seq_lens: [num_seqs] int32, 0 for a padding row, which gets one decode item.
    max_seqs bounds num_seqs; the kernel is compiled for it, once.
    decode_items, prefill_items: [capacity, ITEM_SIZE] int32, those of a sequence in a row; counts: [2] int32.
    """
    num_seqs = seq_lens.shape[0]
    _plan[(num_seqs,)](
        query_starts, seq_lens, decode_items, prefill_items, counts, num_seqs,
        MAX_QUERIES=max_queries, CHUNK=tiles.chunk, SHORT_LEN=tiles.short_len, SHORT_CHUNK=tiles.short_chunk,
        UNIT=tiles.unit, TILE_QUERIES=tile_queries, SEQS=triton.next_power_of_2(max_seqs),
        BLOCK=WRITE, num_warps=1,
    )  # fmt: skip
