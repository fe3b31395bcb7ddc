"""The inner part of both attention kernels: one tile of query rows against a range of keys of one sequence.

Keys are walked in tiles of BLOCK_N that begin at absolute positions (multiples of BLOCK_N), softmax is kept in the
online form of Milakov and Gimelshein, arXiv 1805.02867, and a tile that a row cannot see changes no bit of that row:

    keys      | tile 0 | tile 1 | tile 2 | tile 3 |
    row p = 70  all seen  partly   not read or masked: max, sum and acc stay as they are

Multiplications that feed an addition are written as `fma`, so that the masked and the unmasked loop, and a merge in
registers and one from memory, round alike. fp32 goes through the tensor cores as three products of tf32 parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kvik.kernels.triton.features import NO_FEATURES

__all__ = [
    "HOPPER_TOKENS",
    "TIERS",
    "AttentionTiles",
    "attend",
    "attention_tiles",
    "block_rows",
    "fits_hopper",
    "fits_tma",
    "merge",
    "tile_source",
]


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """The tuning parameters of the attention kernels for one head size."""

    block_n: int = 64  # keys per tile of the prefill kernel
    decode_n: int = 64  # and of the decode kernel
    chunk: int = 512  # keys per work item of the decode kernel; a multiple of decode_n
    even: bool = False  # rather about so many, and all chunks of a sequence alike: a small rest costs a merge
    short_len: int = 0  # up to this context a sequence is cut more finely, so that few sequences fill the GPU:
    short_chunk: int = 128  # keys per work item then
    decode_rows: int = 16  # least rows of a decode tile, or columns
    decode_warps: int = 4
    across: bool = False  # queries are the columns of a decode tile: 8 at least, half the work of 16 rows
    decode_stages: int = 3
    decode_programs: int = 132 * 32  # at most; each takes several work items when there are more
    prefill_rows: int = 64
    prefill_warps: int = 4
    prefill_stages: int = 3
    hopper: bool = False  # prefill by the kernel of `attention_hopper.py`, which has warps and stages of its own
    merge_chunks: bool = False  # add the chunks up one by one in prefill too, as decode does

    @property
    def unit(self) -> int:
        """Of what chunks are multiples where their size depends on the sequence's length, else 0."""
        return self.decode_n if self.even else 0

    def __post_init__(self) -> None:
        assert self.chunk % self.decode_n == self.short_chunk % self.decode_n == 0, "a chunk is cut inside a tile"
        assert not self.merge_chunks or (self.decode_n == self.block_n and not self.even), "both kernels add up alike"


def attention_tiles(
    head_dim: int, num_seqs: int = 256, *, itemsize: int = 2, deterministic: bool = False, hopper: bool = False,
    shared_bytes: int = NO_FEATURES.shared_bytes,
) -> AttentionTiles:  # fmt: skip
    """The configuration for heads of `head_dim` elements of `itemsize` bytes and a step of `num_seqs` sequences.

    `deterministic` has one for all steps, and gives a query the same bits from either kernel: both add up chunk by
    chunk, on tiles of the same number of rows, which is what decides the matrix instruction (mma or wgmma) and the
    order of a row's sum. `hopper`: on such a GPU, and where `fits_hopper`.
    """
    width = head_dim * itemsize  # bytes
    huge = 512 if shared_bytes > 160 << 10 else 256
    if deterministic:
        return _EXACT_HUGE if width > huge else _EXACT_LARGE if width > 256 else _EXACT
    if width > 256 or itemsize > 2:
        return _HUGE if width > huge else _LARGE
    if head_dim & (head_dim - 1):
        return _PADDED
    tiles = next((tiles for most, tiles in _FEW if num_seqs <= most), _MANY)
    return replace(tiles, hopper=True, prefill_rows=128) if hopper else tiles


_PADDED = AttentionTiles()
_SINGLE = replace(_PADDED, decode_n=32, decode_warps=1)  # one warp waits for no other, and has just enough registers
_ACROSS = replace(_SINGLE, across=True, decode_rows=8)
_MANY = replace(_ACROSS, chunk=1024, even=True)
_FEW = (
    (16, replace(_ACROSS, short_len=1024, short_chunk=64)), (48, _ACROSS), (112, replace(_MANY, decode_stages=4))
)  # fmt: skip
TIERS = tuple(most for most, _ in _FEW)
"""Up to each of these numbers of sequences, a step has tiles of its own."""
HOPPER_TOKENS = 2048
"""From so many tokens of a step on, the prefill kernel for Hopper has enough of its larger tiles for all of a GPU."""

_LARGE = AttentionTiles(decode_warps=8, decode_stages=2, prefill_warps=8, prefill_stages=2)
_HUGE = replace(_LARGE, block_n=32, decode_n=32, decode_stages=1, prefill_stages=1)
# Single warps on tiles of 16 rows in both kernels: prefill pays for it, decode, where the time goes, does not.
_EXACT = replace(_SINGLE, block_n=32, prefill_rows=16, prefill_warps=1, merge_chunks=True)
# These have no room in one warp. wgmma in both; the running sum beside that of a chunk takes registers of its own.
_EXACT_LARGE = replace(_EXACT, decode_rows=64, decode_warps=8, decode_stages=2, prefill_rows=64, prefill_warps=8,
                       prefill_stages=2)  # fmt: skip
_EXACT_HUGE = replace(_EXACT_LARGE, block_n=16, decode_n=16, decode_stages=1, prefill_stages=1)


def fits_tma(cache: Tensor, block_n: int) -> bool:
    """Whether the tensor memory accelerator can copy tiles of `block_n` keys of a cache [num_blocks, num_kv_heads,
    block_size, head_dim]: none lies in two blocks, and rows are what it can address."""
    head_dim = cache.shape[3]
    return cache.shape[2] % block_n == 0 and cache.dtype.itemsize == 2 and head_dim % 8 == 0


def fits_hopper(group: int, head_dim: int, itemsize: int, block_size: int) -> bool:
    """Whether the prefill kernel for Hopper can take heads of `head_dim` elements of `itemsize` bytes, `group` of which
    share a key head, and blocks of `block_size` keys."""
    return head_dim == 128 and itemsize == 2 and block_size % 64 == 0 and group in (1, 2, 4, 8, 16)


def block_rows(cache: Tensor) -> int:
    """Rows of a head from one block of a cache [num_blocks, num_kv_heads, block_size, head_dim] to the next."""
    rows, rest = divmod(cache.stride(0), cache.shape[3])
    assert rest == 0 and cache[0].is_contiguous(), "blocks are whole rows, each block in one piece"
    return rows


def tile_source(cache: Tensor, block_n: int, block_d: int, tma: bool) -> Tensor | TensorDescriptor:
    """What `attend` takes as keys or values: the cache itself, or with `tma` a descriptor of it as rows of a head."""
    if not tma:
        return cache
    num_blocks, num_kv_heads, block_size, head_dim = cache.shape
    rows = (num_blocks - 1) * block_rows(cache) + num_kv_heads * block_size
    return TensorDescriptor(cache, [rows, head_dim], [head_dim, 1], [block_n, block_d])


@triton.jit
def _blocks(table: tl.tensor, start: tl.tensor, end: tl.tensor, BLOCK_SIZE: tl.constexpr,
            BLOCK_N: tl.constexpr) -> tl.tensor:  # fmt: skip
    """The block of each of the keys [start, start + BLOCK_N) that lie before `end`, in the shape that is needed: one
    number where a tile lies in one block, else int32 [BLOCK_N]."""
    if BLOCK_SIZE % BLOCK_N == 0:
        blocks = tl.load(table + start // BLOCK_SIZE, mask=start < end, other=0)
    else:
        keys = start + tl.arange(0, BLOCK_N)
        blocks = tl.load(table + keys // BLOCK_SIZE, mask=keys < end, other=0)
    return blocks


@triton.jit
def _tile(kv: tl.tensor, block: tl.tensor, start: tl.tensor, head: tl.tensor, block_rows: tl.tensor, held: tl.tensor,
          MASKED: tl.constexpr, TMA: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
          BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Keys or values [BLOCK_N, BLOCK_D] from `start` on. kv: a descriptor with TMA, else the cache of one layer."""
    if TMA:
        tile = kv.load([block * block_rows + head * BLOCK_SIZE + start % BLOCK_SIZE, 0])
    else:
        keys, dims = start + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
        offsets = (block.to(tl.int64) * block_rows + head * BLOCK_SIZE + keys % BLOCK_SIZE) * HEAD_DIM
        if MASKED or BLOCK_D != HEAD_DIM:
            tile = tl.load(kv + offsets[:, None] + dims[None, :], mask=held, other=0.0)
        else:
            tile = tl.load(kv + offsets[:, None] + dims[None, :])
    return tile


@triton.jit
def _walk(q: tl.tensor, m: tl.tensor, s: tl.tensor, acc: tl.tensor, first: tl.tensor, stop: tl.tensor, end: tl.tensor,
          positions: tl.tensor, k: tl.tensor, v: tl.tensor, head: tl.tensor, table: tl.tensor, block_rows: tl.tensor,
          scale: tl.tensor, MASKED: tl.constexpr, ACROSS: tl.constexpr, WINDOW: tl.constexpr, TMA: tl.constexpr,
          BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Add the keys [first, stop) to the running maximum m [rows], sum s [rows] and acc [rows, BLOCK_D]; with ACROSS to
    acc [BLOCK_D, columns]."""
    KEYS: tl.constexpr = 0 if ACROSS else 1  # the axis of keys in scores, and that of BLOCK_D in q and acc
    BLOCK_D: tl.constexpr = acc.shape[KEYS]
    dims = tl.arange(0, BLOCK_D)
    # The blocks of a tile are looked up a tile ahead: Triton's pipeline keeps one tile less in flight for each load
    # that another load of the same iteration waits for.
    blocks = _blocks(table, first, end, BLOCK_SIZE, BLOCK_N)
    for start in tl.range(first, stop, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        held = dims[None, :] < HEAD_DIM
        # What lies past the end may be NaN, which a weight of 0 does not cancel. With TMA, values there are finite.
        if MASKED:
            held = held & (keys < end)[:, None]
        key_tile = _tile(k, blocks, start, head, block_rows, held, MASKED, TMA, BLOCK_SIZE, HEAD_DIM, BLOCK_N,
                         BLOCK_D)  # fmt: skip
        value_block = blocks
        blocks = _blocks(table, start + BLOCK_N, end, BLOCK_SIZE, BLOCK_N)
        if ACROSS:
            scores = tl.dot(key_tile, q, input_precision="tf32x3")  # [BLOCK_N, columns] fp32
        else:
            scores = tl.dot(q, tl.trans(key_tile), input_precision="tf32x3")  # [rows, BLOCK_N] fp32
        if MASKED:
            key, position = tl.expand_dims(keys, 1 - KEYS), tl.expand_dims(positions, KEYS)
            visible = key <= position
            if WINDOW > 0:
                visible = visible & (key > position - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        top = tl.maximum(m, tl.max(scores, KEYS))
        base = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp2(tl.fma(scores, scale, tl.expand_dims(-base * scale, KEYS)))
        old = tl.exp2((m - base) * scale)
        s = tl.fma(s, old, tl.sum(weights, KEYS))
        value_tile = _tile(v, value_block, start, head, block_rows, held, MASKED, TMA, BLOCK_SIZE, HEAD_DIM, BLOCK_N,
                           BLOCK_D)  # fmt: skip
        weights, acc = weights.to(value_tile.dtype), acc * tl.expand_dims(old, KEYS)
        if ACROSS:
            acc = tl.dot(tl.trans(value_tile), weights, acc, input_precision="tf32x3")
        else:
            acc = tl.dot(weights, value_tile, acc, input_precision="tf32x3")
        m = top
    return m, s, acc


@triton.jit
def attend(q: tl.tensor, lo: tl.tensor, hi: tl.tensor, first_position: tl.tensor, end: tl.tensor,
           positions: tl.tensor, k: tl.tensor, v: tl.tensor, head: tl.tensor, table: tl.tensor, block_rows: tl.tensor,
           scale: tl.tensor, ONE_LOOP: tl.constexpr, ACROSS: tl.constexpr, WINDOW: tl.constexpr, TMA: tl.constexpr,
           BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Query rows against the keys [lo, hi) that any of them sees; lo is a multiple of BLOCK_N.

    q: [rows, BLOCK_D]; positions: [rows], of which the lowest is `first_position` and the highest `end - 1`.
    k, v: of the layer, as `tile_source` gives them; head: of keys and values; table: the sequence's block table;
    block_rows: rows from block to block; scale: of the scores, times log2(e).
    ACROSS: queries are columns, of q and acc [BLOCK_D, columns]. The matrix instruction has 16 rows and 8 columns at
    least; few queries in rows leave most of its work, and of acc's registers, to padding.
    ONE_LOOP masks every tile rather than those that need it in a second loop, whose first tile would be waited for.
    Returns the maximum of the unscaled scores [rows], the sum of weights [rows] and acc [rows, BLOCK_D], in fp32.
    """
    QUERIES: tl.constexpr = 1 if ACROSS else 0
    m = tl.full([q.shape[QUERIES]], float("-inf"), tl.float32)
    s = tl.zeros([q.shape[QUERIES]], tl.float32)
    acc = tl.zeros([q.shape[0], q.shape[1]], tl.float32)
    stop = tl.minimum(hi, end)
    if WINDOW > 0 or ONE_LOOP:
        first = lo
        if WINDOW > 0:
            first = tl.maximum(lo, tl.maximum(first_position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N)
        m, s, acc = _walk(q, m, s, acc, first, stop, end, positions, k, v, head, table, block_rows, scale,
                          True, ACROSS, WINDOW, TMA, BLOCK_SIZE, HEAD_DIM, BLOCK_N)  # fmt: skip
    else:
        full = tl.maximum(lo, tl.minimum(stop, (first_position + 1) // BLOCK_N * BLOCK_N))
        m, s, acc = _walk(q, m, s, acc, lo, full, end, positions, k, v, head, table, block_rows, scale,
                          False, ACROSS, WINDOW, TMA, BLOCK_SIZE, HEAD_DIM, BLOCK_N)  # fmt: skip
        m, s, acc = _walk(q, m, s, acc, full, stop, end, positions, k, v, head, table, block_rows, scale,
                          True, ACROSS, WINDOW, TMA, BLOCK_SIZE, HEAD_DIM, BLOCK_N)  # fmt: skip
    return m, s, acc


@triton.jit
def merge(m: tl.tensor, s: tl.tensor, acc: tl.tensor, new_m: tl.tensor, new_s: tl.tensor, new_acc: tl.tensor,
          scale: tl.tensor) -> tl.tensor:  # fmt: skip
    """What two ranges of keys gave, as one; (-inf, 0, 0) is neutral, and leaves the other's bits as they are."""
    top = tl.maximum(m, new_m)
    base = tl.where(top == float("-inf"), 0.0, top)
    old, new = tl.exp2((m - base) * scale), tl.exp2((new_m - base) * scale)
    return top, tl.fma(new_s, new, s * old), tl.fma(new_acc, new[:, None], acc * old[:, None])
