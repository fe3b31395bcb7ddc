"""Attention of few queries per sequence over the paged cache: softmax(scale * q @ k.T) @ v.

A work item is one chunk of one sequence's keys (flash-decoding, with chunks whose size follows from the sequence alone
in place of a number of splits, so that its result does not depend on the batch). The query heads that share a key
head, and the queries of a sequence, are the rows of one tile:

    row     0      1      2      3      4   ..
    query   0      0      1      1      -         2 queries, group of 2 heads, padded to 16 rows
    head    0      1      0      1      -         or, as columns, to 8

Each item leaves maximum, sum and acc in fp32; the one that arrives last adds them up in the order of the chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvik.kernels.triton.attention_plan import ITEM_SIZE, chunk_of
from kvik.kernels.triton.attention_tile import AttentionTiles, attend, block_rows, fits_tma, merge, tile_source
from kvik.kernels.triton.pdl import start_dependents, wait_for_inputs

__all__ = ["LOG2_E", "decode_attention"]

LOG2_E = 1.4426950408889634
ITEM = tl.constexpr(ITEM_SIZE)
MERGE_STAGES = tl.constexpr(4)  # partial results that are on their way while one is added


@triton.jit
def _store_out(out: tl.tensor, offsets: tl.tensor, held: tl.tensor, s: tl.tensor, acc: tl.tensor) -> None:
    """A sequence without context (a padding row) gets zeros."""
    s = tl.where(s > 0, s, 1.0)
    tl.store(out + offsets, (acc / s[:, None]).to(out.dtype.element_ty), mask=held)


@triton.jit
def _store_part(parts: tl.tensor, stats: tl.tensor, index: tl.tensor, rows: tl.tensor, held: tl.tensor, m: tl.tensor,
                s: tl.tensor, acc: tl.tensor, PART: tl.constexpr, HEAD_DIM: tl.constexpr) -> None:  # fmt: skip
    dims = tl.arange(0, acc.shape[1])
    row = index * PART + rows
    tl.store(stats + 2 * row, m, mask=rows < PART)
    tl.store(stats + 2 * row + 1, s, mask=rows < PART)
    tl.store(parts + row[:, None] * HEAD_DIM + dims[None, :], acc, mask=held)


@triton.jit
def _merge_parts(parts: tl.tensor, stats: tl.tensor, first: tl.tensor, count: tl.tensor, start: tl.tensor,
                 num_queries: tl.tensor, head: tl.tensor, out: tl.tensor, scale: tl.tensor, NUM_KV_HEADS: tl.constexpr,
                 GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                 PART: tl.constexpr) -> None:  # fmt: skip
    """Store what a sequence's `count` partial results add up to. Read through L2: other SMs wrote them just now."""
    rows, dims = tl.arange(0, triton.next_power_of_2(PART)), tl.arange(0, BLOCK_D)
    held = (rows < PART)[:, None] & (dims < HEAD_DIM)[None, :]
    m = tl.full([rows.shape[0]], float("-inf"), tl.float32)
    s = tl.zeros([rows.shape[0]], tl.float32)
    acc = tl.zeros([rows.shape[0], BLOCK_D], tl.float32)
    for i in tl.range(0, count, num_stages=MERGE_STAGES):
        row = (first + i * NUM_KV_HEADS) * PART + rows
        part_m = tl.load(stats + 2 * row, mask=rows < PART, other=0.0, cache_modifier=".cg")
        part_s = tl.load(stats + 2 * row + 1, mask=rows < PART, other=0.0, cache_modifier=".cg")
        part = tl.load(parts + row[:, None] * HEAD_DIM + dims[None, :], mask=held, other=0.0, cache_modifier=".cg")
        m, s, acc = merge(m, s, acc, part_m, part_s, part, scale)
    offsets = ((start + rows // GROUP) * (NUM_KV_HEADS * GROUP) + head * GROUP + rows % GROUP)[:, None] * HEAD_DIM
    _store_out(out, offsets + dims[None, :], held & (rows // GROUP < num_queries)[:, None], s, acc)


@triton.jit
def _item(items: tl.tensor, item: tl.tensor, num_items: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """(sequence, chunk, first token, context length) of a work item; zeros behind the last one."""
    place, there = items + ITEM * item, item < num_items
    return (tl.load(place, mask=there, other=0), tl.load(place + 1, mask=there, other=0),
            tl.load(place + 2, mask=there, other=0), tl.load(place + 3, mask=there, other=0))  # fmt: skip


@triton.jit(do_not_specialize=["table_stride"])  # it varies between steps
def _decode(q: tl.tensor, k: tl.tensor, v: tl.tensor, out: tl.tensor, parts: tl.tensor, stats: tl.tensor,
            arrivals: tl.tensor, items: tl.tensor, counts: tl.tensor, query_starts: tl.tensor, tables: tl.tensor,
            table_stride: tl.tensor, block_rows: tl.tensor, scale: tl.tensor,
            WINDOW: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, MAX_QUERIES: tl.constexpr,
            HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, CHUNK: tl.constexpr, SHORT_LEN: tl.constexpr,
            SHORT_CHUNK: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
            BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, ACROSS: tl.constexpr, TMA: tl.constexpr,
            PDL: tl.constexpr) -> None:  # fmt: skip
    start_dependents(PDL)
    head = tl.program_id(0)
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    PART: tl.constexpr = GROUP * MAX_QUERIES
    # The work lists and block tables of a step are complete before the first kernel that others overlap.
    num_items = tl.load(counts)
    sequence, chunk, start, seq_len = _item(items, tl.program_id(1), num_items)
    wait_for_inputs(PDL)
    for item in range(tl.program_id(1), num_items, tl.num_programs(1)):
        num_queries = 1
        if MAX_QUERIES > 1:
            num_queries = tl.load(query_starts + sequence + 1) - start
        first_position = seq_len - num_queries
        size = chunk_of(seq_len, CHUNK, SHORT_LEN, SHORT_CHUNK, UNIT)
        first_chunk = 0
        if WINDOW > 0:
            first_chunk = tl.maximum(first_position - WINDOW + 1, 0) // size
        num_parts = tl.cdiv(seq_len, size) - first_chunk
        if chunk >= first_chunk:
            token = start + rows // GROUP
            offsets = (token * (NUM_KV_HEADS * GROUP) + head * GROUP + rows % GROUP)[:, None] * HEAD_DIM + dims[None, :]
            held = (rows // GROUP < num_queries)[:, None] & (dims < HEAD_DIM)[None, :]
            if ACROSS:
                tile = tl.load(q + tl.trans(offsets), mask=tl.trans(held), other=0.0)  # [BLOCK_D, BLOCK_M]
            else:
                tile = tl.load(q + offsets, mask=held, other=0.0)  # [BLOCK_M, BLOCK_D]
            m, s, acc = attend(tile, chunk * size, (chunk + 1) * size, first_position, seq_len,
                               first_position + rows // GROUP, k, v, head,
                               tables + sequence.to(tl.int64) * table_stride, block_rows, scale, True, ACROSS, WINDOW,
                               TMA, BLOCK_SIZE, HEAD_DIM, BLOCK_N)  # fmt: skip
            if ACROSS:
                acc = tl.trans(acc)
            if num_parts <= 1:
                _store_out(out, offsets, held, s, acc)
            else:
                part = (item * NUM_KV_HEADS + head).to(tl.int64)
                _store_part(parts, stats, part, rows, held, m, s, acc, PART, HEAD_DIM)
                tl.debug_barrier()  # the stores of all threads come before the release of the one that counts
                arrival = arrivals + sequence * NUM_KV_HEADS + head
                if tl.atomic_add(arrival, 1, sem="acq_rel") == num_parts - 1:
                    first_part = part + (first_chunk - chunk) * NUM_KV_HEADS
                    _merge_parts(parts, stats, first_part, num_parts, start, num_queries, head, out, scale,
                                 NUM_KV_HEADS, GROUP, HEAD_DIM, BLOCK_D, PART)  # fmt: skip
                    tl.store(arrival, 0)
        sequence, chunk, start, seq_len = _item(items, item + tl.num_programs(1), num_items)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, *,
    parts: Tensor, stats: Tensor, arrivals: Tensor, items: Tensor, counts: Tensor,
    query_starts: Tensor, block_tables: Tensor,
    scale: float, window: int | None, max_queries: int, tiles: AttentionTiles, pdl: bool = False, tma: bool = False,
) -> None:  # fmt: skip
    """Write the attention of the sequences in `items` (from `plan_attention`) to `out`.

    q, out: [num_tokens, num_heads, head_dim]; k, v: [num_blocks, num_kv_heads, block_size, head_dim]; all
    contiguous, except that the blocks of k and v may lie apart, by the same stride.
    parts: [capacity, num_kv_heads, group * max_queries, head_dim] and stats: [capacity, num_kv_heads, group *
    max_queries, 2], fp32, where capacity is that of `items`. arrivals: [num_seqs, num_kv_heads] int32, zeros before and
    after. The other arguments are those of `ForwardBatch` and `AttentionBackend.forward`.

    The number of programs follows from shapes alone, so the launch can be captured and replayed with other lengths.
    """
    (_, num_heads, head_dim), (num_kv_heads, block_size) = q.shape, k.shape[1:3]
    assert k.stride() == v.stride()
    tma, block_d = tma and fits_tma(k, tiles.decode_n), max(triton.next_power_of_2(head_dim), 16)
    group = num_heads // num_kv_heads
    tokens = block_tables.shape[1] * block_size  # of the longest context
    longest = max(-(-tokens // tiles.chunk), -(-min(tokens, tiles.short_len) // tiles.short_chunk))
    programs = min(block_tables.shape[0] * longest, max(tiles.decode_programs // num_kv_heads, 1))
    _decode[(num_kv_heads, programs)](
        q, *(tile_source(cache, tiles.decode_n, block_d, tma) for cache in (k, v)), out,
        parts, stats, arrivals, items, counts, query_starts, block_tables, block_tables.stride(0), block_rows(k),
        scale * LOG2_E,
        WINDOW=window or 0, NUM_KV_HEADS=num_kv_heads, GROUP=group, MAX_QUERIES=max_queries, HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size, CHUNK=tiles.chunk, SHORT_LEN=tiles.short_len, SHORT_CHUNK=tiles.short_chunk,
        UNIT=tiles.unit, BLOCK_M=max(tiles.decode_rows, triton.next_power_of_2(group * max_queries)),
        BLOCK_D=block_d, BLOCK_N=tiles.decode_n, ACROSS=tiles.across, TMA=tma, PDL=pdl,
        num_warps=tiles.decode_warps, num_stages=tiles.decode_stages, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
