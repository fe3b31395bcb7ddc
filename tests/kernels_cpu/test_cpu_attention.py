"""Native attention, rotation with the KV store, embedding, norm and argmax against the torch reference."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
from native_cases import ISAS, noise, pool
from torch import Tensor

from kvik.attention.base import ForwardBatch, KVLayer
from kvik.attention.reference import ReferenceAttention
from kvik.errors import ConfigError
from kvik.kernels.cpu.native import available
from kvik.kernels.cpu.ops import NativeOps
from kvik.kernels.cpu.packing import pack_linear
from kvik.kernels.reference import ReferenceOps

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels were not compiled")

UGLY = (1, 2, 15, 16, 17, 31, 33, 64, 65, 123)
TOLERANCE = {torch.float32: 6e-6, torch.bfloat16: 2e-2}


def case(
    lens: list[int], counts: list[int], heads: tuple[int, int, int], dtype: torch.dtype, block_size: int = 16
) -> tuple[Tensor, KVLayer, ForwardBatch]:
    """Random q, a cache that is NaN wherever no sequence has a key, and the batch that says who is where."""
    num_heads, num_kv_heads, head_dim = heads
    blocks = [-(-n // block_size) for n in lens]
    order = torch.randperm(sum(blocks) + 2, generator=torch.Generator().manual_seed(sum(lens))).tolist()
    k, v = (torch.full((len(order), num_kv_heads, block_size, head_dim), math.nan, dtype=dtype) for _ in "kv")
    tables = torch.full((len(lens), max(blocks)), order.pop(), dtype=torch.int32)
    for i, n in enumerate(lens):
        tables[i, : blocks[i]] = torch.tensor([order.pop() for _ in range(blocks[i])])
        positions = torch.arange(n)
        for seed, cache in enumerate((k, v)):
            content = noise(n, num_kv_heads, head_dim, seed=seed, dtype=dtype)
            cache[tables[i, positions // block_size].long(), :, positions % block_size] = content
    starts = [0, *accumulate(counts)]
    none = torch.empty(0, dtype=torch.int64)
    batch = ForwardBatch(
        none, none, none, torch.tensor(starts, dtype=torch.int32), torch.tensor(lens, dtype=torch.int32), tables, none,
        tuple(starts), tuple(lens),
    )  # fmt: skip
    return noise(starts[-1], num_heads, head_dim, seed=7, dtype=dtype), KVLayer(k, v), batch


def native(q: Tensor, kv: KVLayer, batch: ForwardBatch, ops: NativeOps, scale: float, window: int | None) -> Tensor:
    return ops.attention(
        q, kv.k, kv.v, batch.query_starts, batch.seq_lens, batch.block_tables, scale=scale, window=window
    )


def check(
    lens: list[int],
    counts: list[int],
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    isa: str,
    window: int | None = None,
    block_size: int = 16,
) -> None:
    q, kv, batch = case(lens, counts, heads, dtype, block_size)
    scale = heads[2] ** -0.5
    got = native(q, kv, batch, NativeOps(pool(isa)), scale, window)
    want = ReferenceAttention().forward(q, kv, batch, scale=scale, window=window)
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("heads", [(4, 4, 64), (6, 2, 80), (14, 2, 96), (16, 1, 128), (4, 2, 16)], ids=str)
def test_ugly_prefills_decodes_and_mixes(heads: tuple[int, int, int], dtype: torch.dtype, isa: str) -> None:
    for window in (None, 20):
        check(list(UGLY), list(UGLY), heads, dtype, isa, window)
        check(list(UGLY), [1] * len(UGLY), heads, dtype, isa, window)
        check([*UGLY, 60, 17, 90, 300], [*[1] * len(UGLY), 60, 9, 1, 0], heads, dtype, isa, window)


@pytest.mark.parametrize("group", range(1, 17))
def test_every_group_size(group: int) -> None:
    for dtype in TOLERANCE:
        check([33, 40, 20], [1, 1, 20], (group * 2, 2, 32), dtype, ISAS[-1])


@pytest.mark.parametrize("block_size", [16, 48, 64, 256])
@pytest.mark.parametrize("window", [None, 1, 16, 70])
def test_block_sizes_and_windows(block_size: int, window: int | None) -> None:
    lens = [block_size - 1, block_size, block_size + 1, 200, 201, 199, 300, 700]
    for dtype in TOLERANCE:
        check(lens, [1] * 5 + [150, 5, 1], (4, 2, 32), dtype, ISAS[-1], window, block_size)


@pytest.mark.parametrize("head_dim", [2, 8, 48, 160, 256, 320, 512])
def test_head_sizes(head_dim: int) -> None:
    for dtype in TOLERANCE:
        check([70, 300, 33], [70, 1, 7], (6, 2, head_dim), dtype, ISAS[-1])


def test_long_contexts_are_split_and_merged() -> None:
    for window in (None, 700):
        check([1000, 257, 256, 255, 2000], [1, 1, 1, 1, 300], (4, 2, 64), torch.float32, ISAS[-1], window)
        check([20000], [1], (2, 1, 16), torch.float32, ISAS[-1], window)


def test_large_scores_keep_their_precision() -> None:
    q, kv, batch = case([300, 200], [300, 1], (4, 2, 64), torch.bfloat16)
    got = native(q * 8, kv, batch, NativeOps(pool()), 1.0, None)
    want = ReferenceAttention().forward(q * 8, kv, batch, scale=1.0, window=None)
    torch.testing.assert_close(got, want, rtol=0, atol=0.05)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_bits_depend_on_neither_threads_nor_batch(dtype: torch.dtype) -> None:
    q, kv, batch = case([1000, 90, 300, 7], [1, 90, 40, 1], (6, 2, 80), dtype)
    whole = native(q, kv, batch, NativeOps(pool(threads=1)), 0.1, None)
    for threads in (2, 4):
        assert torch.equal(native(q, kv, batch, NativeOps(pool(threads=threads)), 0.1, None), whole)
    alone = NativeOps(pool()).attention(
        q[:1], kv.k, kv.v, torch.tensor([0, 1]), batch.seq_lens[:1], batch.block_tables[:1], scale=0.1, window=None
    )
    assert torch.equal(alone, whole[:1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_rotation_and_store(dtype: torch.dtype, isa: str) -> None:
    ops, reference = NativeOps(pool(isa)), ReferenceOps()
    for num_heads, num_kv_heads, head_dim in ((4, 2, 16), (7, 1, 80), (3, 3, 96), (2, 1, 6)):
        for tokens in (1, 5, 31):
            qkv = noise(tokens, (num_heads + 2 * num_kv_heads) * head_dim)
            cos, sin = noise(tokens, head_dim // 2, seed=1).cos(), noise(tokens, head_dim // 2, seed=1).sin()
            slots = torch.randperm(48, generator=torch.Generator().manual_seed(1))[:tokens]
            for norms in ((None, None), (noise(head_dim, seed=2), noise(head_dim, seed=3))):
                caches = [[torch.zeros(3, num_kv_heads, 16, head_dim, dtype=dtype) for _ in "kv"] for _ in range(2)]
                got = ops.qk_norm_rope_store(qkv, cos, sin, slots, *caches[0], *norms, 1e-6)
                want = reference.qk_norm_rope_store(qkv, cos, sin, slots, *caches[1], *norms, 1e-6)
                tolerance = 1e-5 if dtype == torch.float32 else 3e-2
                torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
                for mine, theirs in zip(*caches, strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


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
        ((2, 1, 16, 16), torch.float16, "float32 or bfloat16"),
    ):
        cache = torch.zeros(shape, dtype=dtype)
        starts, lens, table = torch.tensor([0, 1]), torch.tensor([1]), torch.zeros(1, 1)
        with pytest.raises(ConfigError, match=match):
            ops.attention(torch.zeros(1, 1, shape[3]), cache, cache, starts, lens, table, scale=1.0, window=None)
