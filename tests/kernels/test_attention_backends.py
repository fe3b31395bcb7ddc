"""The CPU backend against the reference, and the reference against torch's own attention."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvik.attention import cpu
from kvik.attention.base import ForwardBatch
from kvik.attention.cpu import CpuAttention
from kvik.attention.reference import ReferenceAttention
from kvik.attention.registry import select_backend
from kvik.errors import ConfigError
from kvik.kernels.api import KVLayer
from kvik.kernels.reference import quantize_kv

BLOCK = 16
UGLY = (1, BLOCK - 1, BLOCK, BLOCK + 1, 123)
# 16-bit results agree to about the rounding of the softmax weights and of the result
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2.5e-2, torch.float16: 4e-3}


def case(
    lens: list[int],
    counts: list[int],
    heads: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    block_size: int = BLOCK,
    spread: float = 1.0,
) -> tuple[Tensor, KVLayer, ForwardBatch]:
    """Random q, a cache that is NaN wherever no sequence has a key, and the batch that says who is where."""
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(sum(lens) + num_heads)
    blocks = [-(-n // block_size) for n in lens]
    num_blocks = sum(blocks) + 2
    order = torch.randperm(num_blocks, generator=generator).tolist()
    unused = order.pop()
    # a layer as the KV pool has it: its blocks lie apart, with other layers between them
    k, v = torch.full((num_blocks, 3, 2, num_kv_heads, block_size, head_dim), math.nan, dtype=dtype)[:, 1].unbind(1)
    tables = torch.full((len(lens), max(blocks)), unused, dtype=torch.int32)
    for i, n in enumerate(lens):
        tables[i, : blocks[i]] = torch.tensor([order.pop() for _ in range(blocks[i])])
        for cache in (k, v):
            context = (torch.randn(n, num_kv_heads, head_dim, generator=generator) * spread).to(dtype)
            for position in range(n):
                cache[tables[i, position // block_size], :, position % block_size] = context[position]
    starts = [0, *accumulate(counts)]
    none = torch.empty(0, dtype=torch.int64)
    batch = ForwardBatch(
        none, none, none, torch.tensor(starts), torch.tensor(lens), tables, none, tuple(starts), tuple(lens)
    )  # fmt: skip
    q = (torch.randn(starts[-1], num_heads, head_dim, generator=generator) * spread).to(dtype)
    return q, KVLayer(k, v), batch


def check(q: Tensor, kv: KVLayer, batch: ForwardBatch, window: int | None = None) -> None:
    scale = q.shape[-1] ** -0.5
    got = CpuAttention().forward(q, kv, batch, scale=scale, window=window)
    want = ReferenceAttention().forward(q, kv, batch, scale=scale, window=window)
    assert got.shape == q.shape
    assert got.dtype == q.dtype
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[q.dtype])


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("num_tokens", UGLY)
def test_reference_agrees_with_torch(num_tokens: int, window: int | None) -> None:
    q, kv, batch = case([num_tokens], [num_tokens], (6, 2, 16))
    got = ReferenceAttention().forward(q, kv, batch, scale=0.3, window=window)
    k, v = (
        torch.cat([cache[b] for b in batch.block_tables[0]], dim=1)[:, :num_tokens].repeat_interleave(3, 0)
        for cache in (kv.k, kv.v)
    )
    age = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)
    mask = (age >= 0) & (age < (window or num_tokens))
    want = F.scaled_dot_product_attention(q.transpose(0, 1), k, v, attn_mask=mask, scale=0.3).transpose(0, 1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("heads", [(4, 4, 64), (6, 2, 80), (14, 2, 96), (16, 1, 128)], ids=str)
def test_ugly_prefills_decodes_and_mixes(dtype: torch.dtype, window: int | None, heads: tuple[int, int, int]) -> None:
    for n in UGLY:
        check(*case([n], [n], heads, dtype), window=window)
        check(*case([n], [1], heads, dtype), window=window)
    check(*case([*UGLY, 60, 17, 90], [1, 1, 1, 1, 1, 60, 9, 1], heads, dtype), window=window)


@pytest.mark.parametrize("wide", [False, True], ids=["its own", "float32"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_both_types_of_products(dtype: torch.dtype, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_product_type", lambda given: torch.float32 if wide else given)
    check(*case([*UGLY, 60, 17], [1, 1, 1, 1, 1, 60, 9], (6, 2, 80), dtype), window=20)


@pytest.mark.parametrize("group", range(1, 17))
def test_every_group_size(group: int) -> None:
    check(*case([33, 40, 20], [1, 1, 20], (group * 2, 2, 16)))


@pytest.mark.parametrize("block_size", [16, 48, 64, 256])
@pytest.mark.parametrize("window", [None, 1, 16, 70])
def test_block_sizes_and_windows(block_size: int, window: int | None) -> None:
    lens = [block_size - 1, block_size, block_size + 1, 200, 201, 199, 300]
    check(*case(lens, [1] * 6 + [150], (4, 2, 16), block_size=block_size), window=window)


def test_several_queries_each_as_speculation_has() -> None:
    check(*case([50, 61, 33, 64], [5, 5, 5, 5], (4, 2, 16)))
    check(*case([50, 61, 33, 64], [5, 5, 5, 5], (4, 2, 16)), window=9)


def test_sequences_without_queries_are_skipped() -> None:
    check(*case([20, 30, 40], [1, 0, 3], (4, 2, 16)))


def test_small_tiles_and_groups_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_TILE_SCORES", 500)
    monkeypatch.setattr(cpu, "_GROUP_BYTES", 5000)
    for window in (None, 30):
        check(*case([123, 40, 41, 45, 90], [100, 1, 1, 1, 9], (4, 2, 16)), window=window)


def test_a_long_prompt_has_no_full_score_matrix() -> None:
    _, kv, batch = case([3000], [3000], (16, 1, 16), block_size=64)
    (group,) = cpu._groups(batch, kv.k, 16, 4)
    tiles = list(group.tiles(16))
    assert [a for a, _ in tiles] == [0, *(b for _, b in tiles[:-1])]
    assert tiles[-1][1] == 3000
    assert max((b - a) * 16 * 3000 for a, b in tiles) <= cpu._TILE_SCORES


def test_large_scores_keep_their_precision_in_16_bits() -> None:
    """Scores in the hundreds: rounded to bfloat16 they would be wrong by up to 1, a factor of e in the weights."""
    q, kv, batch = case([300, 200], [300, 1], (4, 2, 64), torch.bfloat16, spread=6.0)
    got = CpuAttention().forward(q, kv, batch, scale=1.0, window=None)
    want = ReferenceAttention().forward(q, kv, batch, scale=1.0, window=None)
    torch.testing.assert_close(got, want, rtol=0, atol=0.15)


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_cache_of_another_type_than_the_queries(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    lens, counts = [*UGLY, 60, 90], [1, 1, 1, 1, 1, 60, 9]
    q, exact, batch = case(lens, counts, (6, 2, 32), dtype)
    if cache_dtype == torch.int8:
        (k, k_scale), (v, v_scale) = quantize_kv(exact.k), quantize_kv(exact.v)
        kv = KVLayer(k, v, k_scale, v_scale)
    else:
        kv = KVLayer(exact.k.to(cache_dtype), exact.v.to(cache_dtype))
    check(q, kv, batch)
    check(q, kv, batch, window=20)
    got = CpuAttention().forward(q, kv, batch, scale=0.2, window=None)
    want = ReferenceAttention().forward(q, exact, batch, scale=0.2, window=None)
    torch.testing.assert_close(got, want, rtol=0, atol=0.05)


def test_selection() -> None:
    device = torch.device("cpu")
    assert isinstance(select_backend("auto", device), CpuAttention)
    assert isinstance(select_backend("cpu", device), CpuAttention)
    assert isinstance(select_backend("reference", device), ReferenceAttention)
    assert isinstance(select_backend("auto", torch.device("meta")), ReferenceAttention)
    with pytest.raises(ConfigError, match="cannot run on meta"):
        select_backend("cpu", torch.device("meta"))
    with pytest.raises(ConfigError, match="did you mean 'reference'"):
        select_backend("referense", device)
