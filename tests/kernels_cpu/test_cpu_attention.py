"""Native attention, rotation with the KV store, embedding, norm and argmax against the torch reference."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
from native_cases import ISAS, noise, pool
from torch import Tensor

from kvik.attention.base import ForwardBatch
from kvik.attention.reference import ReferenceAttention
from kvik.errors import ConfigError
from kvik.kernels.api import KVLayer
from kvik.kernels.cpu.native import available
from kvik.kernels.cpu.ops import NativeOps
from kvik.kernels.cpu.packing import pack_linear
from kvik.kernels.reference import ReferenceOps, quantize_kv

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels were not compiled")

UGLY = (1, 2, 15, 16, 17, 31, 33, 64, 65, 123)
# types of queries and of the cache, and how far results may be from the reference
KINDS = {
    "fp32": (torch.float32, torch.float32, 6e-6),
    "bf16": (torch.bfloat16, torch.bfloat16, 2e-2),
    "int8": (torch.float32, torch.int8, 6e-6),
    "int8 in bf16": (torch.bfloat16, torch.int8, 2e-2),
}


def pool_layer(shape: tuple[int, int, int, int], dtype: torch.dtype) -> KVLayer:
    """A layer as the KV pool has it: its blocks lie apart, with other layers between them, which are NaN here."""
    num_blocks, *block = shape
    blocks, scales = (
        torch.full((num_blocks, 3, 2, *block), math.nan),
        torch.full((num_blocks, 3, 2, *block[:-1]), math.nan),
    )
    if dtype == torch.int8:
        return KVLayer(*blocks.to(dtype)[:, 1].unbind(1), *scales[:, 1].unbind(1))
    return KVLayer(*blocks.to(dtype)[:, 1].unbind(1))


def case(
    lens: list[int], counts: list[int], heads: tuple[int, int, int], kind: str, block_size: int = 16
) -> tuple[Tensor, KVLayer, ForwardBatch]:
    """Random q, a cache that is NaN wherever no sequence has a key, and the batch that says who is where."""
    num_heads, num_kv_heads, head_dim = heads
    blocks = [-(-n // block_size) for n in lens]
    order = torch.randperm(sum(blocks) + 2, generator=torch.Generator().manual_seed(sum(lens))).tolist()
    dtype, cache_dtype, _ = KINDS[kind]
    kv = pool_layer((len(order), num_kv_heads, block_size, head_dim), cache_dtype)
    caches = ((kv.k, kv.k_scale), (kv.v, kv.v_scale))
    for values, scales in caches:
        (values if scales is None else scales).fill_(math.nan)
    tables = torch.full((len(lens), max(blocks)), order.pop(), dtype=torch.int32)
    for i, n in enumerate(lens):
        tables[i, : blocks[i]] = torch.tensor([order.pop() for _ in range(blocks[i])])
        positions = torch.arange(n)
        block, offset = tables[i, positions // block_size].long(), positions % block_size
        for seed, (values, scales) in enumerate(caches):
            content = noise(n, num_kv_heads, head_dim, seed=seed, dtype=dtype)
            if scales is None:
                values[block, :, offset] = content
            else:
                values[block, :, offset], scales[block, :, offset] = quantize_kv(content)
    starts = [0, *accumulate(counts)]
    none = torch.empty(0, dtype=torch.int64)
    batch = ForwardBatch(
        none, none, none, torch.tensor(starts, dtype=torch.int32), torch.tensor(lens, dtype=torch.int32), tables, none,
        tuple(starts), tuple(lens),
    )  # fmt: skip
    return noise(starts[-1], num_heads, head_dim, seed=7, dtype=dtype), kv, batch


def native(q: Tensor, kv: KVLayer, batch: ForwardBatch, ops: NativeOps, scale: float, window: int | None) -> Tensor:
    return ops.attention(q, kv, batch.query_starts, batch.seq_lens, batch.block_tables, scale=scale, window=window)


def check(
    lens: list[int],
    counts: list[int],
    heads: tuple[int, int, int],
    kind: str,
    isa: str,
    window: int | None = None,
    block_size: int = 16,
) -> None:
    q, kv, batch = case(lens, counts, heads, kind, block_size)
    scale = heads[2] ** -0.5
    got = native(q, kv, batch, NativeOps(pool(isa)), scale, window)
    want = ReferenceAttention().forward(q, kv, batch, scale=scale, window=window)
    torch.testing.assert_close(got, want, rtol=0, atol=KINDS[kind][2])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [(4, 4, 64), (6, 2, 80), (14, 2, 96), (16, 1, 128), (4, 2, 16)], ids=str)
def test_ugly_prefills_decodes_and_mixes(heads: tuple[int, int, int], kind: str, isa: str) -> None:
    for window in (None, 20):
        check(list(UGLY), list(UGLY), heads, kind, isa, window)
        check(list(UGLY), [1] * len(UGLY), heads, kind, isa, window)
        check([*UGLY, 60, 17, 90, 300], [*[1] * len(UGLY), 60, 9, 1, 0], heads, kind, isa, window)


@pytest.mark.parametrize("group", range(1, 17))
def test_every_group_size(group: int) -> None:
    for kind in KINDS:
        check([33, 40, 20], [1, 1, 20], (group * 2, 2, 32), kind, ISAS[-1])


@pytest.mark.parametrize("block_size", [16, 48, 64, 256])
@pytest.mark.parametrize("window", [None, 1, 16, 70])
def test_block_sizes_and_windows(block_size: int, window: int | None) -> None:
    lens = [block_size - 1, block_size, block_size + 1, 200, 201, 199, 300, 700]
    for kind in KINDS:
        check(lens, [1] * 5 + [150, 5, 1], (4, 2, 32), kind, ISAS[-1], window, block_size)


@pytest.mark.parametrize("head_dim", [2, 8, 48, 160, 256, 320, 512])
def test_head_sizes(head_dim: int) -> None:
    for kind in KINDS:
        check([70, 300, 33], [70, 1, 7], (6, 2, head_dim), kind, ISAS[-1])


def test_long_contexts_are_split_and_merged() -> None:
    for window in (None, 700):
        for kind in ("fp32", "int8"):
            check([1000, 257, 256, 255, 2000], [1, 1, 1, 1, 300], (4, 2, 64), kind, ISAS[-1], window)
            check([20000], [1], (2, 1, 16), kind, ISAS[-1], window)


def test_more_chunks_in_a_step_than_a_range_of_items_counts() -> None:
    num_seqs, length, block_size = 16400, 16384, 64  # 64 chunks each: more than 2^20
    kv = KVLayer.zeros((length // block_size, 1, block_size, 2), torch.float32, torch.device("cpu"))
    kv.v[..., 0], kv.v[..., 1] = 1.0, torch.arange(float(block_size))
    tables = torch.arange(length // block_size).expand(num_seqs, -1)
    starts, lens = torch.arange(num_seqs + 1), torch.full((num_seqs,), length)
    got = NativeOps(pool()).attention(torch.zeros(num_seqs, 1, 2), kv, starts, lens, tables, scale=1.0, window=None)
    torch.testing.assert_close(got, torch.tensor([1.0, (block_size - 1) / 2]).expand(num_seqs, 1, 2))


def test_large_scores_keep_their_precision() -> None:
    q, kv, batch = case([300, 200], [300, 1], (4, 2, 64), "bf16")
    got = native(q * 8, kv, batch, NativeOps(pool()), 1.0, None)
    want = ReferenceAttention().forward(q * 8, kv, batch, scale=1.0, window=None)
    torch.testing.assert_close(got, want, rtol=0, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_depend_on_neither_threads_nor_batch(kind: str) -> None:
    q, kv, batch = case([1000, 90, 300, 7], [1, 90, 40, 1], (6, 2, 80), kind)
    whole = native(q, kv, batch, NativeOps(pool(threads=1)), 0.1, None)
    for threads in (2, 4):
        assert torch.equal(native(q, kv, batch, NativeOps(pool(threads=threads)), 0.1, None), whole)
    alone = NativeOps(pool()).attention(
        q[:1], kv, torch.tensor([0, 1]), batch.seq_lens[:1], batch.block_tables[:1], scale=0.1, window=None
    )
    assert torch.equal(alone, whole[:1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_rotation_and_store(kind: str, isa: str) -> None:
    ops, reference = NativeOps(pool(isa)), ReferenceOps()
    dtype, cache_dtype, _ = KINDS[kind]
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for num_heads, num_kv_heads, head_dim in ((4, 2, 16), (7, 1, 80), (3, 3, 96), (2, 1, 6)):
        for tokens in (1, 5, 31):
            qkv = noise(tokens, (num_heads + 2 * num_kv_heads) * head_dim)
            if cache_dtype == torch.int8:  # a float cache itself has the type of the query
                qkv = qkv.to(dtype)
            cos, sin = noise(tokens, head_dim // 2, seed=1).cos(), noise(tokens, head_dim // 2, seed=1).sin()
            slots = torch.randperm(48, generator=torch.Generator().manual_seed(1))[:tokens]
            for norms in ((None, None), (noise(head_dim, seed=2), noise(head_dim, seed=3))):
                mine, theirs = (
                    KVLayer.zeros((3, num_kv_heads, 16, head_dim), cache_dtype, torch.device("cpu")) for _ in range(2)
                )
                got = ops.qk_norm_rope_store(qkv, cos, sin, slots, mine, *norms, 1e-6)
                want = reference.qk_norm_rope_store(qkv.float(), cos, sin, slots, theirs, *norms, 1e-6)
                torch.testing.assert_close(got.float(), want, rtol=0, atol=tolerance)
                if cache_dtype != torch.int8:
                    torch.testing.assert_close(mine.k, theirs.k, rtol=0, atol=tolerance)
                    torch.testing.assert_close(mine.v, theirs.v, rtol=0, atol=tolerance)
                    continue
                for values, scales, others, other_scales in (
                    (mine.k, mine.k_scale, theirs.k, theirs.k_scale),
                    (mine.v, mine.v_scale, theirs.v, theirs.v_scale),
                ):
                    torch.testing.assert_close(scales, other_scales, rtol=0, atol=1e-6)
                    steps = (values.int() - others.int()).abs()  # one step where the rounding is a near tie
                    assert steps.max() <= 1 and steps.float().mean() < 0.01


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_int8_keys_and_values_do_not_hide_what_is_not_finite(bad: float, isa: str) -> None:
    head_dim = 24
    kv = KVLayer.zeros((1, 2, 16, head_dim), torch.int8, torch.device("cpu"))
    qkv, angles = noise(1, 6 * head_dim), torch.zeros(1, head_dim // 2)
    qkv[0, 4 * head_dim + 3], qkv[0, 3 * head_dim + 23] = bad, bad  # the first value head, the second key head
    NativeOps(pool(isa)).qk_norm_rope_store(qkv, angles.cos(), angles, torch.tensor([5]), kv, None, None, 1e-6)
    assert kv.k_scale is not None and kv.v_scale is not None
    assert kv.k_scale[0, :, 5].isfinite().tolist() == [True, False]
    assert kv.v_scale[0, :, 5].isfinite().tolist() == [False, True]


@pytest.mark.parametrize("isa", ISAS)
def test_embedding_norm_and_argmax(isa: str) -> None:
    ops, reference = NativeOps(pool(isa)), ReferenceOps()
    ids = torch.tensor([3, 0, 66, 3])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for features in (8, 37, 128):
            table = noise(67, features, dtype=dtype)
            assert torch.equal(ops.embedding(ids, table), reference.embedding(ids, table))
    for features in (1, 7, 64, 100):
        x, norm = noise(5, features), noise(features, seed=1)
        torch.testing.assert_close(ops.rms_norm(x, norm, 1e-6), reference.rms_norm(x, norm, 1e-6), rtol=2e-6, atol=2e-6)
        x[1] = x[1, 0]  # ties: the first one wins
        assert torch.equal(ops.argmax(x), x.argmax(1))
    assert ops.linear(torch.empty(0, 64), pack_linear(noise(32, 64), pool=pool(isa))).shape == (0, 32)


def test_what_the_cache_must_be() -> None:
    ops = NativeOps(pool())
    for shape, dtype, match in (
        ((2, 1, 24, 16), torch.float32, "multiple of 16"),
        ((2, 1, 16, 15), torch.float32, "even head_dim"),
        ((2, 1, 16, 514), torch.float32, "at most 512"),
        ((2, 1, 16, 16), torch.float16, "float32, bfloat16 or int8"),
    ):
        cache = KVLayer.zeros(shape, dtype, torch.device("cpu"))
        starts, lens, table = torch.tensor([0, 1]), torch.tensor([1]), torch.zeros(1, 1)
        with pytest.raises(ConfigError, match=match):
            ops.attention(torch.zeros(1, 1, shape[3]), cache, starts, lens, table, scale=1.0, window=None)
