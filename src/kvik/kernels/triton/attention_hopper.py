"""The prefill kernel for Hopper: what `attention_prefill` computes, with warps that copy and warps that compute.

Written in Gluon, Triton's language without hidden layouts, after FlashAttention-3 (Shah et al., arXiv 2407.08608). A
program has three parts, which meet at barriers in shared memory: one warp copies, by TMA, and two groups of four warps
have 64 rows each. Within a group, the weights of one tile of keys are computed while the tensor cores work for the
tile before:

    tensor cores   scores of tile t | values of tile t - 1         | scores of tile t + 1 | values of tile t
    group of warps                  | weights of tile t in registers                       | weights of tile t + 1

Programs stay: each takes the next piece of work, a tile of queries and a key head, from a counter, longest first, and
the copying warp is a piece ahead of the others.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kvik.kernels.triton.attention_decode import LOG2_E
from kvik.kernels.triton.attention_plan import ITEM_SIZE
from kvik.kernels.triton.attention_tile import block_rows
from kvik.kernels.triton.barriers import barriers, meet
from kvik.kernels.triton.pdl import start_dependents, wait_for_inputs

__all__ = ["hopper_prefill_attention"]

ITEM = gl.constexpr(ITEM_SIZE)
ROWS = gl.constexpr(128)  # of a program, half of them in each group of warps
KEYS = gl.constexpr(128)  # of a tile
PAGE = gl.constexpr(64)  # keys that are copied at a time
HALF = gl.constexpr(64)  # dimensions of a head that lie together in shared memory: 128 bytes, as wgmma wants them
DIM = gl.constexpr(128)
TILE_BYTES = gl.constexpr(128 * 128 * 2)  # of keys, of values and of queries alike
FACTS = gl.constexpr(8)  # numbers about a piece of work that the copying warp hands on, and room for three more
SCALAR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))  # [64 rows, KEYS] in a group of warps
SCORE_ROW = gl.constexpr(gl.SliceLayout(1, SCORES.value))
SCORE_KEY = gl.constexpr(gl.SliceLayout(0, SCORES.value))
ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))  # [64 rows, HALF]
ACC_ROW = gl.constexpr(gl.SliceLayout(1, ACC.value))
ACC_DIM = gl.constexpr(gl.SliceLayout(0, ACC.value))
WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, ACC.value, 2))


@gluon.jit
def _first_tile(position: gl.tensor, WINDOW: gl.constexpr) -> gl.tensor:
    """The first tile of keys that the query at `position` sees."""
    tile = 0
    if WINDOW > 0:
        tile = gl.maximum(position - WINDOW + 1, 0) // KEYS
    return tile


@gluon.jit
def _page(table: gl.tensor, page: gl.tensor, last: gl.tensor, block_rows: gl.tensor, head: gl.tensor,
          BLOCK_SIZE: gl.constexpr) -> gl.tensor:  # fmt: skip
    """The row of the cache at which a page of keys begins; past the last key, that of the last page."""
    start = gl.minimum(page, last // PAGE) * PAGE
    return gl.load(table + start // BLOCK_SIZE) * block_rows + head * BLOCK_SIZE + start % BLOCK_SIZE


@gluon.jit
def _copy_tile(cache: gl.tensor, low: gl.tensor, high: gl.tensor, ring: gl.tensor, count: gl.tensor) -> None:
    """Copy two pages of keys or values, from rows `low` and `high` on, as the program's tile number `count`."""
    pages, full, empty = ring
    slot = count & 1
    mbarrier.wait(empty.index(slot), ((count >> 1) & 1) ^ 1)
    mbarrier.expect(full.index(slot), TILE_BYTES)
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(cache, [low, HALF * half], full.index(slot), pages.index(4 * slot + 2 * half))
        tma.async_copy_global_to_shared(
            cache, [high, HALF * half], full.index(slot), pages.index(4 * slot + 2 * half + 1)
        )


@gluon.jit
def _hand_on(ring: gl.tensor, number: gl.tensor, token: gl.tensor, left: gl.tensor, position: gl.tensor,
             last: gl.tensor, head: gl.tensor) -> None:  # fmt: skip
    """Tell both groups what the program's piece of work `number` is; a head of -1 is the end."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    facts, full, empty = ring
    slot = number & 1
    mbarrier.wait(empty.index(slot), ((number >> 1) & 1) ^ 1)
    facts.index(FACTS * slot).store(gl.full([1], token, gl.int32, layout))
    facts.index(FACTS * slot + 1).store(gl.full([1], left, gl.int32, layout))
    facts.index(FACTS * slot + 2).store(gl.full([1], position, gl.int32, layout))
    facts.index(FACTS * slot + 3).store(gl.full([1], last, gl.int32, layout))
    facts.index(FACTS * slot + 4).store(gl.full([1], head, gl.int32, layout))
    mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def _fact(facts: gl.tensor, number: gl.tensor, INDEX: gl.constexpr) -> gl.tensor:
    return gl.max(facts.index(FACTS * (number & 1) + INDEX).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _copy(q: gl.tensor, k: gl.tensor, v: gl.tensor, items: gl.tensor, counts: gl.tensor, query_starts: gl.tensor,
          tables: gl.tensor, table_stride: gl.tensor, block_rows: gl.tensor, next_work: gl.tensor, queries: gl.tensor,
          keys: gl.tensor, values: gl.tensor, facts: gl.tensor, NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr,
          BLOCK_SIZE: gl.constexpr, WINDOW: gl.constexpr) -> None:  # fmt: skip
    """The part of the warp that copies. The last program to end leaves the counter as it was."""
    TILE: gl.constexpr = ROWS // GROUP
    boxes, q_full, q_empty = queries
    num_items = gl.load(counts + 1)
    work, number, count = gl.program_id(0), 0, 0
    while work < num_items * NUM_KV_HEADS:
        upcoming = gl.num_programs(0) + gl.atomic_add(next_work, 1, sem="relaxed")
        item, head = items + ITEM * (num_items - 1 - work // NUM_KV_HEADS), work % NUM_KV_HEADS
        sequence, first, start, seq_len = gl.load(item), gl.load(item + 1) * TILE, gl.load(item + 2), gl.load(item + 3)
        num_queries = gl.load(query_starts + sequence + 1) - start
        table = tables + sequence.to(gl.int64) * table_stride
        before = seq_len - num_queries
        last = before + gl.minimum(first + TILE, num_queries) - 1
        begin = _first_tile(before + first, WINDOW)
        low = _page(table, 2 * begin, last, block_rows, head, BLOCK_SIZE)
        high = _page(table, 2 * begin + 1, last, block_rows, head, BLOCK_SIZE)
        _hand_on(facts, number, start + first, num_queries - first, before + first, last, head)
        mbarrier.wait(q_empty, (number & 1) ^ 1)
        mbarrier.expect(q_full, TILE_BYTES)
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(q, [start + first, head * GROUP, HALF * half], q_full, boxes.index(half))
        for tile in range(begin, last // KEYS + 1):
            next_low = _page(table, 2 * tile + 2, last, block_rows, head, BLOCK_SIZE)
            next_high = _page(table, 2 * tile + 3, last, block_rows, head, BLOCK_SIZE)
            _copy_tile(k, low, high, keys, count)
            _copy_tile(v, low, high, values, count)
            low, high, count = next_low, next_high, count + 1
        work, number = upcoming, number + 1
    _hand_on(facts, number, 0, 0, 0, 0, -1)
    if gl.atomic_add(next_work + 1, 1) == gl.num_programs(0) - 1:
        gl.store(next_work, 0)
        gl.store(next_work + 1, 0)


@gluon.jit
def _score(queries: gl.tensor, keys: gl.tensor, slot: gl.tensor, scores: gl.tensor, PART: gl.constexpr) -> gl.tensor:
    """Begin the scores of this half of the rows; what `scores` holds is not read."""
    low, high = keys.index(2 * slot).permute((1, 0)), keys.index(2 * slot + 1).permute((1, 0))
    scores = warpgroup_mma(queries.index(PART), low, scores, use_acc=False, is_async=True)
    return warpgroup_mma(queries.index(2 + PART), high, scores, is_async=True)


@gluon.jit
def _weigh(scores: gl.tensor, m: gl.tensor, s: gl.tensor, scale: gl.tensor, start: gl.tensor, positions: gl.tensor,
           MASKED: gl.constexpr, WINDOW: gl.constexpr) -> gl.tensor:  # fmt: skip
    """Weights of a tile of keys from `start` on, by what acc so far is to be multiplied, the new maximum and sum."""
    if MASKED:
        keys = start + gl.arange(0, KEYS, SCORE_KEY)
        visible = keys[None, :] <= positions[:, None]
        if WINDOW > 0:
            visible = visible & (keys[None, :] > positions[:, None] - WINDOW)
        scores = gl.where(visible, scores, float("-inf"))
    top = gl.maximum(m, gl.max(scores, 1))
    base = top
    if MASKED:
        base = gl.where(top == float("-inf"), 0.0, top)
    weights = gl.exp2(gl.fma(scores, gl.to_tensor(scale), (-base * scale)[:, None]))
    old = gl.exp2((m - base) * scale)
    s = gl.fma(s, old, gl.sum(weights, 1))
    return weights, gl.convert_layout(old, ACC_ROW)[:, None], top, s


@gluon.jit
def _add_values(weights: gl.tensor, values: gl.tensor, slot: gl.tensor, low: gl.tensor, high: gl.tensor) -> gl.tensor:
    """Begin to add weighted values to both halves of acc."""
    weights = gl.convert_layout(weights.to(values.dtype), WEIGHTS)
    low = warpgroup_mma(weights, values.index(2 * slot), low, is_async=True)
    return low, warpgroup_mma(weights, values.index(2 * slot + 1), high, is_async=True)


@gluon.jit
def _step(scores: gl.tensor, weights: gl.tensor, low: gl.tensor, high: gl.tensor, m: gl.tensor, s: gl.tensor,
          start: gl.tensor, count: gl.tensor, positions: gl.tensor, scale: gl.tensor, queries: gl.tensor,
          key_ring: gl.tensor, value_ring: gl.tensor, PART: gl.constexpr, MASKED: gl.constexpr,
          WINDOW: gl.constexpr) -> gl.tensor:  # fmt: skip
    """The scores of the program's tile number `count`, which begins at key `start`, and the values of the one before.

    Weights stay in fp32 until they are multiplied: a loop that carries them in 16 bits takes pairs apart to do so.
    """
    keys, k_full, k_empty = key_ring
    values, v_full, v_empty = value_ring
    slot, before = count & 1, (count - 1) & 1
    mbarrier.wait(k_full.index(slot), (count >> 1) & 1)
    scores = _score(queries, keys, slot, scores, PART)
    mbarrier.wait(v_full.index(before), ((count - 1) >> 1) & 1)
    low, high = _add_values(weights, values, before, low, high)
    scores = warpgroup_mma_wait(2, deps=(scores,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    weights, old, m, s = _weigh(scores, m, s, scale, start, positions, MASKED, WINDOW)
    # Is complete already. ptxas would move the wait below up, above the exponentials; this it cannot pass.
    mbarrier.wait(v_full.index(before), ((count - 1) >> 1) & 1)
    low, high = warpgroup_mma_wait(0, deps=(low, high))
    mbarrier.arrive(v_empty.index(before), count=1)
    return scores, weights, low * old, high * old, m, s


@gluon.jit
def _store(out: gl.tensor, low: gl.tensor, high: gl.tensor, s: gl.tensor, token: gl.tensor, left: gl.tensor,
           head: gl.tensor, PART: gl.constexpr, NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr) -> None:  # fmt: skip
    rows, dims = PART * 64 + gl.arange(0, 64, ACC_ROW), gl.arange(0, HALF, ACC_DIM)
    query = rows // GROUP
    offset = (token + query).to(gl.int64) * (NUM_KV_HEADS * GROUP) + head * GROUP + rows % GROUP
    offsets, held = offset[:, None] * DIM + dims[None, :], (query < left)[:, None] & (dims < DIM)[None, :]
    s = gl.convert_layout(s, ACC_ROW)[:, None]
    gl.store(out + offsets, (low / s).to(out.dtype.element_ty), mask=held)
    gl.store(out + offsets + HALF, (high / s).to(out.dtype.element_ty), mask=held)


@gluon.jit
def _attend(PART: gl.constexpr, out: gl.tensor, scale: gl.tensor, query_ring: gl.tensor, key_ring: gl.tensor,
            value_ring: gl.tensor, fact_ring: gl.tensor, NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr,
            WINDOW: gl.constexpr) -> None:  # fmt: skip
    """The part of a group of warps: one half of the rows of every piece of work."""
    queries, q_full, q_empty = query_ring
    keys, k_full, k_empty = key_ring
    values, v_full, v_empty = value_ring
    facts, f_full, f_empty = fact_ring
    number, count = 0, 0
    mbarrier.wait(f_full.index(0), 0)
    while _fact(facts, number, 4) >= 0:
        position, last = _fact(facts, number, 2), _fact(facts, number, 3)
        positions = position + (PART * 64 + gl.arange(0, 64, SCORE_ROW)) // GROUP
        begin, final = _first_tile(position, WINDOW), last // KEYS
        masked = begin
        if WINDOW == 0:
            masked = gl.minimum((position + 1) // KEYS, final)  # the first tile that some rows see in part
        m, s = gl.full([64], float("-inf"), gl.float32, SCORE_ROW), gl.zeros([64], gl.float32, SCORE_ROW)
        low, high = gl.zeros([64, HALF], gl.float32, ACC), gl.zeros([64, HALF], gl.float32, ACC)
        mbarrier.wait(q_full, number & 1)
        mbarrier.wait(k_full.index(count & 1), (count >> 1) & 1)
        scores = _score(queries, keys, count & 1, gl.zeros([64, KEYS], gl.float32, SCORES), PART)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(k_empty.index(count & 1), count=1)
        weights, _, m, s = _weigh(scores, m, s, scale, begin * KEYS, positions, True, WINDOW)
        for tile in range(begin + 1, masked):
            count += 1
            scores, weights, low, high, m, s = _step(
                scores, weights, low, high, m, s, tile * KEYS, count, positions, scale, queries, key_ring, value_ring,
                PART, False, WINDOW)  # fmt: skip
        for tile in range(gl.maximum(begin + 1, masked), final + 1):
            count += 1
            scores, weights, low, high, m, s = _step(
                scores, weights, low, high, m, s, tile * KEYS, count, positions, scale, queries, key_ring, value_ring,
                PART, True, WINDOW)  # fmt: skip
        mbarrier.arrive(q_empty, count=1)
        mbarrier.wait(v_full.index(count & 1), (count >> 1) & 1)
        low_sum, high_sum = _add_values(weights, values, count & 1, low, high)
        low, high = warpgroup_mma_wait(0, deps=(low_sum, high_sum))
        mbarrier.arrive(v_empty.index(count & 1), count=1)
        token, left, head = _fact(facts, number, 0), _fact(facts, number, 1), _fact(facts, number, 4)
        mbarrier.arrive(f_empty.index(number & 1), count=1)
        _store(out, low, high, s, token, left, head, PART, NUM_KV_HEADS, GROUP)
        number, count = number + 1, count + 1
        mbarrier.wait(f_full.index(number & 1), (number >> 1) & 1)


@gluon.jit(do_not_specialize=["table_stride"])
def _hopper_prefill(q: gl.tensor, k: gl.tensor, v: gl.tensor, out: gl.tensor, items: gl.tensor, counts: gl.tensor,
                    query_starts: gl.tensor, tables: gl.tensor, table_stride: gl.tensor, block_rows: gl.tensor,
                    next_work: gl.tensor, scale: gl.tensor, NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr,
                    BLOCK_SIZE: gl.constexpr, WINDOW: gl.constexpr, PDL: gl.constexpr) -> None:  # fmt: skip
    start_dependents(PDL)
    wait_for_inputs(PDL)
    dtype: gl.constexpr = out.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PAGE, HALF], dtype)
    box: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS // GROUP, GROUP, HALF], dtype)
    queries = gl.allocate_shared_memory(dtype, [4, 64, HALF], layout)
    keys = gl.allocate_shared_memory(dtype, [4, KEYS, HALF], layout)
    values = gl.allocate_shared_memory(dtype, [4, KEYS, HALF], layout)
    facts = gl.allocate_shared_memory(gl.int32, [2 * FACTS, 1], SCALAR)
    query_pair = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_full, q_empty = query_pair.index(0), query_pair.index(1)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    k_full, k_empty = barriers(2, 1), barriers(2, 2)
    v_full, v_empty = barriers(2, 1), barriers(2, 2)
    fact_ring = (facts, barriers(2, 1), barriers(2, 2))
    # As the copies see them: boxes of [queries, heads, half], and pages.
    boxes = queries._reinterpret(dtype, [2, ROWS // GROUP, GROUP, HALF], box)
    key_pages = keys._reinterpret(dtype, [8, PAGE, HALF], layout)
    value_pages = values._reinterpret(dtype, [8, PAGE, HALF], layout)
    meet()
    query_ring, key_ring, value_ring = (queries, q_full, q_empty), (keys, k_full, k_empty), (values, v_full, v_empty)
    gl.warp_specialize(
        [
            (_attend, (0, out, scale, query_ring, key_ring, value_ring, fact_ring, NUM_KV_HEADS, GROUP, WINDOW)),
            (_attend, (1, out, scale, query_ring, key_ring, value_ring, fact_ring, NUM_KV_HEADS, GROUP, WINDOW)),
            (_copy, (q, k, v, items, counts, query_starts, tables, table_stride, block_rows, next_work,
                     (boxes, q_full, q_empty), (key_pages, k_full, k_empty), (value_pages, v_full, v_empty), fact_ring,
                     NUM_KV_HEADS, GROUP, BLOCK_SIZE, WINDOW)),
        ],
        [4, 1],  # warps beside the first four
        [240, 24],  # and registers of their threads; the first group is left as many as the second
    )  # fmt: skip


def hopper_prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, *,
    items: Tensor, counts: Tensor, query_starts: Tensor, block_tables: Tensor, next_work: Tensor,
    scale: float, window: int | None, pdl: bool,
) -> None:  # fmt: skip
    """`prefill_attention` for what `fits_hopper` says, with tiles of 128 rows.

    next_work: [2] int32 of zeros, and zeros again when the kernel has ended.
    """
    (num_tokens, num_heads, head_dim), (num_kv_heads, block_size) = q.shape, k.shape[1:3]
    group, dtype = num_heads // num_kv_heads, gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16
    page, half = [PAGE.value, HALF.value], [ROWS.value // group, group, HALF.value]
    rows = (k.shape[0] - 1) * block_rows(k) + num_kv_heads * block_size
    pages, boxes = (gl.NVMMASharedLayout.get_default_for(shape, dtype) for shape in (page, half))
    caches = (TensorDescriptor(cache, [rows, head_dim], [head_dim, 1], page, pages) for cache in (k, v))
    queries = TensorDescriptor(q, list(q.shape), list(q.stride()), half, boxes)
    most_work = (num_tokens // (ROWS.value // group) + block_tables.shape[0]) * num_kv_heads
    # A program takes most of the shared memory of a multiprocessor; one more would only wait.
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    _hopper_prefill[(min(programs, most_work),)](
        queries, *caches, out, items, counts, query_starts, block_tables, block_tables.stride(0), block_rows(k),
        next_work, scale * LOG2_E,
        NUM_KV_HEADS=num_kv_heads, GROUP=group, BLOCK_SIZE=block_size, WINDOW=window or 0, PDL=pdl, num_warps=4,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
