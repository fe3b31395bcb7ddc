"""Causal attention of many queries per sequence over the paged cache: softmax(scale * q @ k.T) @ v.

A program takes one tile of a sequence's queries and one key/value head (FlashAttention-2, Dao, arXiv 2307.08691); the
query heads that share the key head are folded into the rows, as in decode. Tiles of keys that no row sees are not read,
and only those that some row sees in part are masked.

    keys ->   tile 0   tile 1   tile 2
    queries   [ full ] [masked] [ not read ]
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvik.kernels.triton.attention_decode import ITEM, LOG2_E
from kvik.kernels.triton.attention_tile import AttentionTiles, attend, block_rows, fits_tma, merge, tile_source
from kvik.kernels.triton.pdl import start_dependents, wait_for_inputs

__all__ = ["prefill_attention", "tile_queries"]


def tile_queries(group: int, tiles: AttentionTiles) -> int:
    """Queries of a tile when `group` query heads share a key head."""
    return tiles.prefill_rows // group


@triton.jit(do_not_specialize=["table_stride"])  # it varies between steps
def _prefill(q: tl.tensor, k: tl.tensor, v: tl.tensor, out: tl.tensor, items: tl.tensor, counts: tl.tensor,
             query_starts: tl.tensor, tables: tl.tensor, table_stride: tl.tensor,
             block_rows: tl.tensor, scale: tl.tensor, WINDOW: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
             GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, CHUNK: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
             PDL: tl.constexpr) -> None:  # fmt: skip
    start_dependents(PDL)
    wait_for_inputs(PDL)
    head = tl.program_id(0)
    item = tl.load(counts + 1) - 1 - tl.program_id(1)  # the last tiles of a sequence have the most keys: they go first
    if item >= 0:
        TILE: tl.constexpr = BLOCK_M // GROUP
        rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        sequence, first = tl.load(items + ITEM * item), tl.load(items + ITEM * item + 1) * TILE
        start, seq_len = tl.load(items + ITEM * item + 2), tl.load(items + ITEM * item + 3)
        num_queries = tl.load(query_starts + sequence + 1) - start
        query = first + rows // GROUP
        offset = (start + query).to(tl.int64) * (NUM_KV_HEADS * GROUP) + head * GROUP + rows % GROUP
        offsets = offset[:, None] * HEAD_DIM + dims[None, :]
        held = ((rows < TILE * GROUP) & (query < num_queries))[:, None] & (dims < HEAD_DIM)[None, :]
        tile = tl.load(q + offsets, mask=held, other=0.0)  # [BLOCK_M, BLOCK_D]
        table = tables + sequence.to(tl.int64) * table_stride
        before = seq_len - num_queries
        first_position, end = before + first, before + tl.minimum(first + TILE, num_queries)
        if CHUNK > 0:
            m = tl.full([BLOCK_M], float("-inf"), tl.float32)
            s = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            first_chunk = 0
            if WINDOW > 0:
                first_chunk = tl.maximum(first_position - WINDOW + 1, 0) // CHUNK
            for chunk in range(first_chunk, tl.cdiv(end, CHUNK)):
                new_m, new_s, new_acc = attend(tile, chunk * CHUNK, (chunk + 1) * CHUNK, first_position, end,
                                               before + query, k, v, head, table, block_rows, scale, True, False,
                                               WINDOW, TMA, BLOCK_SIZE, HEAD_DIM, BLOCK_N)  # fmt: skip
                m, s, acc = merge(m, s, acc, new_m, new_s, new_acc, scale)
        else:
            m, s, acc = attend(tile, 0, end, first_position, end, before + query, k, v, head, table, block_rows, scale,
                               False, False, WINDOW, TMA, BLOCK_SIZE, HEAD_DIM, BLOCK_N)  # fmt: skip
        tl.store(out + offsets, (acc / s[:, None]).to(out.dtype.element_ty), mask=held)


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, *,
    items: Tensor, counts: Tensor, query_starts: Tensor, block_tables: Tensor, next_work: Tensor,
    scale: float, window: int | None, tiles: AttentionTiles, pdl: bool = False, tma: bool = False,
) -> None:  # fmt: skip
    """Write the attention of the sequences in `items` (from `plan_attention`) to `out`.

    q, out: [num_tokens, num_heads, head_dim]; k, v: [num_blocks, num_kv_heads, block_size, head_dim]; all
    contiguous, except that the blocks of k and v may lie apart, by the same stride. The other arguments are those of
    `ForwardBatch` and `AttentionBackend.forward`. The number of programs follows from shapes alone, so the launch can
    be captured and replayed with other lengths. next_work: [2] int32, zeros between kernels.
    """
    if tiles.hopper:
        from kvik.kernels.triton.attention_hopper import hopper_prefill_attention  # needs a Triton that has Gluon

        hopper_prefill_attention(
            q, k, v, out, items=items, counts=counts, query_starts=query_starts, block_tables=block_tables,
            next_work=next_work, scale=scale, window=window, pdl=pdl,
        )  # fmt: skip
        return
    (num_tokens, num_heads, head_dim), (num_kv_heads, block_size) = q.shape, k.shape[1:3]
    assert k.stride() == v.stride()
    tma, block_d = tma and fits_tma(k, tiles.block_n), max(triton.next_power_of_2(head_dim), 16)
    group = num_heads // num_kv_heads
    most_tiles = num_tokens // tile_queries(group, tiles) + block_tables.shape[0]
    _prefill[(num_kv_heads, most_tiles)](
        q, *(tile_source(cache, tiles.block_n, block_d, tma) for cache in (k, v)), out, items, counts, query_starts,
        block_tables, block_tables.stride(0), block_rows(k), scale * LOG2_E,
        WINDOW=window or 0, NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        CHUNK=tiles.chunk if tiles.merge_chunks else 0, BLOCK_M=tiles.prefill_rows,
        BLOCK_D=block_d, BLOCK_N=tiles.block_n, TMA=tma, PDL=pdl,
        num_warps=tiles.prefill_warps, num_stages=tiles.prefill_stages,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
