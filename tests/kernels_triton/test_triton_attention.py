"""Paged attention in Triton against the reference, and the bits that must not depend on batch or chunking."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kvik.attention.base import ForwardBatch
from kvik.attention.reference import ReferenceAttention
from kvik.attention.triton import AttentionLimits, TritonAttention
from kvik.errors import CapacityError, ConfigError
from kvik.kernels.api import KVLayer
from kvik.kernels.triton.attention_plan import plan_attention
from kvik.kernels.triton.attention_tile import AttentionTiles, attention_tiles
from kvik.kernels.triton.features import Features
from kvik.ops import PagedBatch
from kvik.ops.gpu import GpuOperators

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2.5e-2, torch.float16: 4e-3}
SMALL = AttentionTiles(
    block_n=16, decode_n=16, chunk=32, prefill_rows=64, prefill_warps=4
)  # so that short contexts have several tiles and chunks
EXACT = replace(SMALL, decode_rows=64, merge_chunks=True)
EVEN = replace(SMALL, even=True)
ACROSS = replace(SMALL, across=True, decode_rows=8, decode_warps=1)

Heads = tuple[int, int, int]  # query heads, key/value heads, head size


def make_cache(
    lens: list[int], heads: Heads, dtype: torch.dtype, block_size: int, device: torch.device, unused: float = math.nan
) -> tuple[KVLayer, Tensor]:
    """A cache with keys of NaN and values of `unused` where no sequence has any, and the block tables [num_seqs,
    max_blocks]. Layers are views of a larger tensor, as those of a `KVPool`."""
    generator = torch.Generator().manual_seed(sum(lens) + heads[0])
    blocks = [-(-n // block_size) for n in lens]
    order = torch.randperm(sum(blocks) + 2, generator=generator).tolist()
    tables = torch.full((len(lens), max(1, *blocks)), order.pop(), dtype=torch.int32)
    shape = (sum(blocks) + 2, heads[1], block_size, heads[2])
    both = torch.full((shape[0], 2, *shape[1:]), math.nan, dtype=dtype)
    both[:, 1] = unused
    caches = [both[:, 0], both[:, 1]]
    for i, n in enumerate(lens):
        tables[i, : blocks[i]] = torch.tensor([order.pop() for _ in range(blocks[i])])
        for cache, rest in zip(caches, (math.nan, unused), strict=True):
            context = torch.randn(heads[1], blocks[i] * block_size, heads[2], generator=generator).to(dtype)
            context[:, n:] = rest
            cache[tables[i, : blocks[i]].long()] = context.unflatten(1, (-1, block_size)).transpose(0, 1)
    on_device = both.to(device)
    return KVLayer(on_device[:, 0], on_device[:, 1]), tables.to(device)


def make_batch(lens: list[int], counts: list[int], tables: Tensor) -> ForwardBatch:
    starts = [0, *accumulate(counts)]
    none = torch.empty(0, dtype=torch.int64)
    on_device = [torch.tensor(values, dtype=torch.int32, device=tables.device) for values in (starts, lens)]
    return ForwardBatch(none, none, none, *on_device, tables, none, tuple(starts), tuple(lens))


def backend(
    heads: Heads, device: torch.device, tiles: AttentionTiles = SMALL, max_queries: int = 1, tma: bool = False,
    **sizes: int,
) -> TritonAttention:  # fmt: skip
    given = {"max_num_seqs": 16, "max_num_tokens": 512, "max_context_tokens": 4096} | sizes
    return TritonAttention(AttentionLimits(*heads, max_queries=max_queries, **given), device, tiles=tiles, tma=tma)


def check(
    lens: list[int], counts: list[int], heads: Heads, device: torch.device, *, dtype: torch.dtype = torch.float32,
    window: int | None = None, block_size: int = 16, max_queries: int = 1, tiles: AttentionTiles = SMALL,
    tma: bool = False,
) -> None:  # fmt: skip
    kv, tables = make_cache(lens, heads, dtype, block_size, device, 1e4 if tma else math.nan)
    batch = make_batch(lens, counts, tables)
    q = torch.randn(sum(counts), heads[0], heads[2]).to(dtype).to(device)
    scale = heads[2] ** -0.5
    got = backend(heads, device, tiles, max_queries, tma).forward(q, kv, batch, scale=scale, window=window)
    want = ReferenceAttention().forward(q, kv, batch, scale=scale, window=window)
    assert got.shape == q.shape
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("heads", [(2, 2, 64), (3, 1, 80), (7, 1, 96), (4, 2, 128), (1, 1, 256)], ids=str)
def test_decode_prefill_and_both(window: int | None, heads: Heads, device: torch.device) -> None:
    check([1, 31, 32, 33, 100], [1, 1, 1, 1, 1], heads, device, window=window)
    check([33, 1, 70, 40], [33, 1, 1, 20], heads, device, window=window)


@pytest.mark.parametrize("window", [None, 20])
def test_even_chunks(window: int | None, device: torch.device) -> None:
    """Of 1, 47, 48, 79, 80, ... keys: in one chunk, two, three, and more than there are tiles in CHUNK."""
    check([1, 47, 48, 79, 80, 81, 145, 200], [1] * 8, (4, 2, 64), device, window=window, tiles=EVEN)
    check([47, 100, 1, 70], [2, 2, 1, 40], (3, 1, 80), device, window=window, tiles=EVEN, max_queries=2)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("heads", [(2, 2, 64), (7, 1, 16), (4, 2, 128), (16, 1, 16)], ids=str)
def test_queries_as_columns(heads: Heads, window: int | None, device: torch.device) -> None:
    lens = [1, 31, 32, 33, 100]
    check(lens, [1] * 5, heads, device, window=window, tiles=ACROSS)
    check(lens, [1] * 5, heads, device, window=window, tiles=ACROSS, dtype=torch.bfloat16)
    check([33, 2, 70, 40], [2, 2, 1, 20], heads, device, window=window, tiles=ACROSS, max_queries=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 20])
def test_16_bits(dtype: torch.dtype, window: int | None, device: torch.device) -> None:
    check([33, 1, 70, 40], [33, 1, 1, 20], (5, 1, 80), device, dtype=dtype, window=window)
    check([33, 1, 70, 40], [33, 1, 1, 20], (2, 1, 64), device, dtype=dtype, window=window)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("heads", [(2, 2, 64), (3, 1, 80), (4, 2, 128)], ids=str)
def test_tiles_copied_by_tma(heads: Heads, window: int | None, device: torch.device) -> None:
    if device.type == "cuda" and not Features.of(device).pdl:
        pytest.skip("the tensor memory accelerator came with Hopper")
    for block_size in (16, 64, 24):  # tiles of 16 keys do not fit into blocks of 24: those are loaded
        for lens, counts in (([1, 31, 32, 33, 100], [1] * 5), ([33, 1, 70, 40], [33, 1, 1, 20])):
            check(lens, counts, heads, device, dtype=torch.bfloat16, window=window, block_size=block_size, tma=True)
    if heads[2] != 80:
        check([1, 32, 100], [1] * 3, heads, device, dtype=torch.bfloat16, window=window, tma=True, tiles=ACROSS)


def skip_without_hopper(device: torch.device) -> None:
    if not Features.of(device).hopper:
        pytest.skip("needs a Hopper GPU and a Triton whose Gluon is known; Gluon has no interpreter")


@pytest.mark.parametrize(
    ("heads", "window", "dtype", "block_size"),
    [
        ((2, 2, 128), None, torch.bfloat16, 64), ((4, 2, 128), None, torch.bfloat16, 64),
        ((4, 2, 128), 70, torch.bfloat16, 64), ((8, 2, 128), None, torch.float16, 128),
        ((8, 1, 128), 200, torch.bfloat16, 64), ((16, 1, 128), None, torch.bfloat16, 192),
    ],
    ids=str,
)  # fmt: skip
def test_prefill_for_hopper(
    heads: Heads, window: int | None, dtype: torch.dtype, block_size: int, device: torch.device
) -> None:
    skip_without_hopper(device)
    tiles = attention_tiles(128, hopper=True)
    for lens, counts in (
        ([1, 31, 300, 129, 700, 128], [1, 31, 300, 65, 3, 112]),
        ([64, 65, 2, 63, 640], [64, 65, 2, 63, 2]),
        ([1500, 512], [510, 2]),
    ):
        check(lens, counts, heads, device, dtype=dtype, window=window, block_size=block_size, tiles=tiles, tma=True)


@pytest.mark.parametrize("window", [None, 70])
def test_prefill_for_hopper_does_not_depend_on_chunks(window: int | None, device: torch.device) -> None:
    """And leaves its counter as it was, also when there is more work than programs."""
    skip_without_hopper(device)
    heads, lens, n = (4, 2, 128), [500] * 40, 500 * 40
    kv, tables = make_cache(lens, heads, torch.bfloat16, 64, device, 1e4)
    q = torch.randn(n, 4, 128).bfloat16().to(device)
    sizes = {"max_num_seqs": 64, "max_num_tokens": n, "max_context_tokens": n}
    attention = backend(heads, device, attention_tiles(128, hopper=True), tma=True, **sizes)
    whole, again = (
        attention.forward(q, kv, make_batch(lens, lens, tables), scale=0.1, window=window) for _ in range(2)
    )
    assert torch.equal(whole, again)
    parts = [
        attention.forward(q[a:b].contiguous(), kv, make_batch([b], [b - a], tables[:1]), scale=0.1, window=window)
        for a, b in pairwise([0, 37, 39, 164, 500])
    ]
    assert torch.equal(torch.cat(parts), whole[:500])
    assert attention._next_work.tolist() == [0, 0]


def test_which_prompts_take_the_kernel_for_hopper() -> None:
    def kernel(heads: Heads, *, deterministic: bool = False, hopper: bool = True, **limits: int) -> bool:
        given = {"max_num_seqs": 16, "max_num_tokens": 2048, "max_context_tokens": 4096, "block_size": 64} | limits
        sizes, device = AttentionLimits(*heads, **given), torch.device("meta")
        attention = TritonAttention(sizes, device, hopper=hopper, deterministic=deterministic)
        assert attention._tiles.hopper == (attention._tiles.prefill_rows == 128)
        return attention._tiles.hopper

    assert kernel((16, 8, 128)) and kernel((32, 2, 128))
    assert not any((
        kernel((16, 8, 128), hopper=False), kernel((16, 8, 128), deterministic=True),
        kernel((16, 8, 128), block_size=16), kernel((16, 8, 128), max_num_tokens=2047),
        kernel((16, 8, 128), itemsize=4), kernel((16, 8, 64)), kernel((14, 2, 128)), kernel((64, 2, 128)),
    ))  # fmt: skip


@pytest.mark.parametrize("group", range(1, 17))
def test_every_group_size(group: int, device: torch.device) -> None:
    check([33, 20], [1, 20], (group, 1, 16), device)


def test_a_group_that_no_tile_holds(device: torch.device) -> None:
    check([33, 20], [1, 20], (64, 1, 16), device)
    with pytest.raises(ConfigError, match=r"71 query heads over 1 key heads are groups of 71; .* groups of up to 64"):
        backend((71, 1, 64), device)


@pytest.mark.parametrize("block_size", [16, 48, 64, 256])
@pytest.mark.parametrize("window", [None, 1, 16, 70])
def test_block_sizes_and_windows(block_size: int, window: int | None, device: torch.device) -> None:
    lens = [block_size - 1, block_size, block_size + 1, 130]
    check(lens, [1, 1, 1, 30], (2, 1, 16), device, block_size=block_size, window=window)


def test_the_tiles_of_a_real_configuration(device: torch.device) -> None:
    for deterministic in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            tiles = attention_tiles(128, itemsize=dtype.itemsize, deterministic=deterministic)
            check([600, 513, 64, 1], [1, 9, 1, 1], (2, 1, 128), device, dtype=dtype, block_size=64, tiles=tiles)


@pytest.mark.parametrize("window", [None, 9])
def test_several_queries_each_as_speculation_has(window: int | None, device: torch.device) -> None:
    check([50, 61, 33, 64, 8], [5, 8, 1, 4, 8], (6, 2, 16), device, max_queries=8, window=window)


def test_sequences_without_queries_are_skipped(device: torch.device) -> None:
    check([20, 70, 40, 80], [1, 0, 3, 1], (4, 2, 16), device)


@pytest.mark.parametrize("tiles", [SMALL, EVEN], ids=["small", "even"])
def test_padding_rows_get_zeros_and_a_workspace_is_left_as_it_was(tiles: AttentionTiles, device: torch.device) -> None:
    heads = (4, 2, 16)
    kv, tables = make_cache([70, 0, 0], heads, torch.float32, 16, device)
    batch = make_batch([70, 0, 0], [1, 1, 1], tables)
    q = torch.randn(3, 4, 16).to(device)
    attention = backend(heads, device, tiles)
    first, second = (attention.forward(q, kv, batch, scale=0.25, window=None) for _ in range(2))
    assert first[1:].abs().max() == 0
    assert torch.equal(first, second)


@pytest.mark.parametrize("window", [None, 40])
def test_a_result_does_not_depend_on_the_batch(window: int | None, device: torch.device) -> None:
    heads = (3, 1, 16)
    lens, counts = [100, 64, 7, 130, 90], [1, 1, 1, 40, 3]
    kv, tables = make_cache(lens, heads, torch.float32, 16, device)
    q = torch.randn(sum(counts), 3, 16).to(device)
    attention = backend(heads, device)
    together = attention.forward(q, kv, make_batch(lens, counts, tables), scale=0.25, window=window)
    for i, (start, end) in enumerate(pairwise([0, *accumulate(counts)])):
        batch = make_batch(lens[i : i + 1], counts[i : i + 1], tables[i : i + 1])
        alone = attention.forward(q[start:end].contiguous(), kv, batch, scale=0.25, window=window)
        assert torch.equal(together[start:end], alone)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tiles", "cuts"),
    [(EXACT, [0, 37, 38, 99, 100]), (EXACT, [0, 64, 65, 80, 100]), (SMALL, [0, 37, 39, 64, 100])],
    ids=["exact", "exact at tiles", "prefill alone"],
)
def test_chunking_is_invisible(
    tiles: AttentionTiles, cuts: list[int], window: int | None, dtype: torch.dtype, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With deterministic tiles, and without them as long as no chunk is a single query."""
    if device.type == "cpu":  # a BLAS may add up in an order that depends on where a row stands
        monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.einsum("ik,kj->ij", a, b, dtype=dtype))
    heads, n = (2, 1, 16), 100
    kv, tables = make_cache([n], heads, dtype, 16, device)
    q = torch.randn(n, 2, 16).to(dtype).to(device)
    attention = backend(heads, device, tiles)
    whole = attention.forward(q, kv, make_batch([n], [n], tables), scale=0.25, window=window)
    parts = [
        attention.forward(q[a:b].contiguous(), kv, make_batch([b], [b - a], tables), scale=0.25, window=window)
        for a, b in pairwise(cuts)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_a_step_beyond_the_limits_is_refused(device: torch.device) -> None:
    _, tables = make_cache([40, 40], (2, 1, 16), torch.float32, 16, device)
    attention = backend((2, 1, 16), device, max_num_seqs=1)
    with pytest.raises(CapacityError, match=r"\(1, 512, 4096\) and got a step of \(2, 2, 80\)"):
        attention.prepare(make_batch([40, 40], [1, 1], tables))


def test_the_work_list_begins_with_the_longest_chunks(device: torch.device) -> None:
    lens = [1, 700, 33, 1300, 64, 512, 1300]
    tiles = AttentionTiles(decode_n=32, chunk=512, even=True)
    starts = torch.arange(len(lens) + 1, dtype=torch.int32, device=device)
    decode, prefill = (torch.zeros(64, 4, dtype=torch.int32, device=device) for _ in range(2))
    counts = torch.zeros(2, dtype=torch.int32, device=device)
    plan_attention(
        starts, torch.tensor(lens, dtype=torch.int32, device=device), decode, prefill, counts,
        max_seqs=8, max_queries=1, tiles=tiles, tile_queries=16,
    )  # fmt: skip
    items = decode[: int(counts[0])].tolist()
    # 1300 keys are three chunks of up to 448; 700 are one, which is nearer to 512 than two are.
    assert [(sequence, chunk) for sequence, chunk, _, _ in items] == [
        (1, 0), (5, 0), (3, 0), (3, 1), (3, 2), (6, 0), (6, 1), (6, 2), (4, 0), (2, 0), (0, 0)
    ]  # fmt: skip
    assert [item[2:] for item in items] == [[item[0], lens[item[0]]] for item in items] and counts[1] == 0


def test_operators_on_one_batch_have_tiles_for_each_type(device: torch.device) -> None:
    """Those of 16 bits take more shared memory than there is if elements have 32."""
    batch, operators = PagedBatch([3], [3], torch.zeros(1, 1, dtype=torch.int32, device=device)), GpuOperators(device)
    for dtype in (torch.bfloat16, torch.float32):
        q = torch.randn(3, 2, 128).to(dtype).to(device)
        kv = KVLayer(*(torch.randn(1, 1, 16, 128).to(dtype).to(device) for _ in "kv"))
        got = operators.attention(q, kv, batch, 0.1, None)
        want = ReferenceAttention().forward(q, kv, batch.step, scale=0.1, window=None)
        torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[dtype])
    found = {backend.limits.itemsize for backend in batch.backends.values() if isinstance(backend, TritonAttention)}
    assert found == {2, 4}
