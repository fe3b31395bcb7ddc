"""Rotation, the write to the cache, and attention, against complex numbers and torch's own attention in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F
from op_cases import DTYPES, assert_close, noise, norm64
from torch import Tensor

from kvik import ConfigError, ops
from kvik.kernels.reference import dequantize_kv
from kvik.ops.attention import _one_token_blocks

EPS = 1e-6
HEADS = [(1, 1, 4), (4, 2, 8), (7, 1, 80), (4, 4, 64), (16, 8, 128), (3, 1, 96), (2, 1, 256)]
CPU = torch.device("cpu")


def rotated64(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """The pair (i, i + head_dim / 2) is one complex number that is turned."""
    half = x.shape[-1] // 2
    turns = theta ** -(torch.arange(half, dtype=torch.float64, device=x.device) / half)
    first, second = x.double().chunk(2, -1)
    turn = torch.polar(torch.ones((), dtype=torch.float64, device=x.device), positions[:, None].double() * turns)
    z = torch.complex(first, second) * turn[:, None]
    return torch.cat((z.real, z.imag), -1)


def attention64(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """torch's attention of q [queries, heads, head_dim] over k, v [keys, kv_heads, head_dim], in float64."""
    positions = torch.arange(len(k), device=q.device)
    queries = positions[len(k) - len(q) :, None]
    mask = (positions <= queries) & (positions > queries - (window or len(k)))
    q, k, v = (x.double().transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 4), (5, 4, 128), (1, 3, 80), (17, 2, 96), (0, 2, 8)], ids=str)
def test_rope(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    x, positions = noise(*shape, dtype=dtype, device=device), torch.arange(shape[0], device=device) * 3 + 5
    cos, sin = ops.rope_angles(positions, shape[2], theta=1000.0)
    assert_close(ops.rope(x, cos, sin), rotated64(x, positions, 1000.0))
    assert torch.equal(ops.rope(x.transpose(0, 1).contiguous().transpose(0, 1), cos, sin), ops.rope(x, cos, sin))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("block_size", [16, 24, 64])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qk_norm_rope_store(
    dtype: torch.dtype, heads: tuple[int, int, int], block_size: int, normed: bool, device: torch.device
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    num_tokens, num_blocks = block_size + 1, 3
    qkv = noise(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype, device=device)
    norms = [noise(head_dim, dtype=dtype, device=device, seed=s) if normed else None for s in (3, 4)]
    positions = torch.arange(num_tokens, device=device) + 7
    order = torch.randperm(num_blocks * block_size, generator=torch.Generator().manual_seed(0))
    slots = order[:num_tokens].to(device)
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    kv = ops.KVLayer(*(torch.full(shape, math.nan, dtype=dtype, device=device) for _ in "kv"))
    q = ops.qk_norm_rope_store(qkv, *ops.rope_angles(positions, head_dim), slots, kv, *norms, eps=EPS)

    want_q, want_k, want_v = qkv.view(num_tokens, -1, head_dim).split((num_heads, num_kv_heads, num_kv_heads), 1)
    want_q, want_k = (
        x if norm is None else norm64(x, norm, EPS) for x, norm in ((want_q, norms[0]), (want_k, norms[1]))
    )
    assert q.dtype == dtype
    assert_close(q, rotated64(want_q, positions, 10000.0))
    keys, values = (cache.transpose(1, 2).flatten(0, 1) for cache in (kv.k, kv.v))  # by slot
    assert_close(keys[slots], rotated64(want_k, positions, 10000.0))
    assert torch.equal(values[slots], want_v)
    assert keys[order[num_tokens:].to(device)].isnan().all()


def paged(
    lens: list[int], heads: tuple[int, int, int], block_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[ops.KVLayer, Tensor, list[tuple[Tensor, Tensor]]]:
    """A cache that is NaN where no sequence has a key, its block tables, and each sequence's k and v in order."""
    blocks = [-(-n // block_size) for n in lens]
    ids = torch.randperm(sum(blocks) + 1, generator=torch.Generator().manual_seed(1)).tolist()
    tables = torch.full((len(lens), max(blocks)), ids.pop())
    shape = (sum(blocks) + 1, heads[1], block_size, heads[2])
    kv = ops.KVLayer(*(torch.full(shape, math.nan, dtype=dtype, device=device) for _ in "kv"))
    contexts = []
    for i, n in enumerate(lens):
        tables[i, : blocks[i]] = torch.tensor([ids.pop() for _ in range(blocks[i])])
        context = [noise(n, *heads[1:], dtype=dtype, device=device, seed=s) for s in (i, 99 + i)]
        block, offset = tables[i].to(device)[torch.arange(n, device=device) // block_size], torch.arange(n) % block_size
        for cache, x in zip((kv.k, kv.v), context, strict=True):
            cache[block, :, offset.to(device)] = x
        contexts.append((context[0], context[1]))
    return kv, tables.to(device), contexts


def check_paged(
    heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device, block_size: int, window: int | None
) -> None:
    lens, counts = [1, 15, 64, 65, 123, 70, 33], [1, 1, 1, 1, 1, 30, 33]
    kv, tables, contexts = paged(lens, heads, block_size, dtype, device)
    q = noise(sum(counts), heads[0], heads[2], dtype=dtype, device=device)
    batch = ops.PagedBatch(counts, lens, tables)
    got = ops.paged_attention(q, kv, batch, scale=0.2, window=window)
    starts = pairwise(accumulate(counts, initial=0))
    want = [attention64(q[a:b], *context, 0.2, window) for (a, b), context in zip(starts, contexts, strict=True)]
    assert_close(got, torch.cat(want))
    assert torch.equal(ops.paged_attention(q, kv, batch, scale=0.2, window=window), got), "a batch serves every layer"


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_paged_attention(
    dtype: torch.dtype, heads: tuple[int, int, int], window: int | None, device: torch.device
) -> None:
    check_paged(heads, dtype, device, 16, window)


@pytest.mark.parametrize("block_size", [1, 24, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_paged_attention_with_other_blocks(dtype: torch.dtype, block_size: int, device: torch.device) -> None:
    check_paged((4, 2, 64), dtype, device, block_size, None)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 2, 1, 1, 4), (5, 11, 4, 2, 8), (1, 1, 4, 2, 8), (1, 600, 16, 8, 128), (130, 130, 6, 2, 80), (3, 65, 5, 1, 64)],
    ids=str,
)
def test_self_attention(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, window: int | None, device: torch.device
) -> None:
    queries, keys, num_heads, num_kv_heads, head_dim = shape
    q = noise(2, queries, num_heads, head_dim, dtype=dtype, device=device)
    k, v = (noise(2, keys, num_kv_heads, head_dim, dtype=dtype, device=device, seed=s) for s in (1, 2))
    want = torch.stack([attention64(q[i], k[i], v[i], head_dim**-0.5, window) for i in range(2)])
    assert_close(ops.self_attention(q, k, v, window=window), want)
    assert_close(ops.self_attention(q[1], k[1], v[1], window=window), want[1])


def test_slices_of_one_projection_are_not_copied(device: torch.device) -> None:
    qkv = noise(2, 9, 8, 16, dtype=torch.float32, device=device)
    q, k, v = qkv.split((4, 2, 2), 2)
    assert [x.data_ptr() for x in _one_token_blocks(k, v)] == [k.data_ptr(), v.data_ptr()]
    want = torch.stack([attention64(q[i], k[i], v[i], 0.25, None) for i in range(2)])
    assert_close(ops.self_attention(q, k, v), want)
    assert_close(ops.self_attention(q, k.transpose(1, 2).contiguous().transpose(1, 2), v), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.bfloat16])
def test_a_cache_of_another_type_on_a_cpu(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    heads, n = (4, 2, 32), 40
    kv = ops.KVLayer.zeros((4, heads[1], 16, heads[2]), cache_dtype, CPU)
    qkv, positions = noise(n, 8 * heads[2], dtype=dtype, device=CPU), torch.arange(n)
    q = ops.qk_norm_rope_store(qkv, *ops.rope_angles(positions, heads[2]), positions, kv)
    got = ops.paged_attention(q, kv, ops.PagedBatch([n], [n], torch.arange(4)[None]))
    k, v = (
        dequantize_kv(cache, scales, torch.float32).transpose(1, 2).flatten(0, 1)[:n]
        for cache, scales in ((kv.k, kv.k_scale), (kv.v, kv.v_scale))
    )
    want = attention64(q, k, v, heads[2] ** -0.5, None)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-2)


def test_nothing_to_attend(device: torch.device) -> None:
    q, k = (noise(*shape, dtype=torch.float32, device=device) for shape in ((0, 4, 8), (5, 2, 8)))
    assert ops.self_attention(q, k, k).shape == (0, 4, 8)


def test_wrong_arguments_are_named(device: torch.device) -> None:
    q, k = (noise(*shape, dtype=torch.float32, device=device) for shape in ((3, 4, 8), (5, 2, 8)))
    kv = ops.KVLayer.zeros((4, 2, 16, 8), torch.float32, device)
    tables = torch.zeros(1, 1, dtype=torch.int64, device=device)
    batch, cos = ops.PagedBatch([3], [5], tables), torch.ones(3, 4, device=device)
    slots, qkv = torch.zeros(3, dtype=torch.int64, device=device), noise(3, 64, dtype=torch.float32, device=device)
    for call, text in (
        (lambda: ops.self_attention(k, q[:, :2], q[:, :2]), "5 queries and 3 keys"),
        (lambda: ops.self_attention(q, k, k[:4]), r"v must be \[5, 2, 8\] like k, got \[4, 2, 8\]"),
        (lambda: ops.self_attention(q[:, :3], k, k), "3 query heads cannot share 2 key heads"),
        (lambda: ops.paged_attention(q[:, :3], kv, batch), r"q must be \[num_tokens, a multiple of 2 heads, 8\]"),
        (lambda: ops.self_attention(q[0], k, k), "or a batch of it"),
        (lambda: ops.self_attention(q, k, k, window=0), "window must be at least 1"),
        (lambda: ops.self_attention(q, k, k, scale=0.0), "scale must be above 0"),
        (lambda: ops.paged_attention(q, kv, batch, scale=-0.5), "scale must be above 0"),
        (lambda: ops.paged_attention(q, replace(kv, k_scale=cos), batch), "k_scale belongs to an int8 cache"),
        (lambda: ops.PagedBatch([3], [2], tables), "sequence 0 has 3 queries and 2 tokens"),
        (lambda: ops.PagedBatch([3], [3, 4], tables), "1 query_lens and 2 seq_lens"),
        (lambda: ops.PagedBatch([1, 1], [3, 4], tables), r"block_tables must be \[2, max_blocks\]"),
        (lambda: ops.paged_attention(q[:2], kv, batch), r"q must be \[3, 4, 8\] for the queries of the batch"),
        (lambda: ops.paged_attention(q, kv, ops.PagedBatch([3], [17], tables)), "17 tokens .* reaches 16: 1 blocks"),
        (lambda: ops.paged_attention(q, ops.KVLayer(kv.k.mT, kv.v.mT), batch), "blocks of a cache must be contiguous"),
        (lambda: ops.paged_attention(q, ops.KVLayer(kv.k, kv.v[:2]), batch), "two equal tensors"),
        (lambda: ops.rope(q, cos[:2], cos), r"rope: cos must be \[3, 4\] for 3 tokens and heads of 8, got \[2, 4\]"),
        (lambda: ops.rope(q, cos, cos.half()), "sin must be float32"),
        (lambda: ops.rope(q[..., :7], cos, cos), r"head_dim even, got \[3, 4, 7\]"),
        (lambda: ops.qk_norm_rope_store(qkv[:, :20], cos, cos, slots, kv), r"qkv must be \[num_tokens, \(num_heads"),
        (lambda: ops.qk_norm_rope_store(qkv, cos, cos, slots[:2], kv), r"slots must be \[3\]"),
        (lambda: ops.qk_norm_rope_store(qkv, cos, cos, slots, kv, qkv[0]), r"q_norm must be \[8\] for heads of 8"),
        (lambda: ops.rope_angles(slots, 7), "head_dim even"),
    ):
        with pytest.raises(ConfigError, match=text):
            call()


def test_what_lies_outside_of_a_cache_is_an_error_on_a_cpu() -> None:
    kv = ops.KVLayer.zeros((4, 2, 16, 8), torch.float32, CPU)
    q, qkv, cos = torch.ones(1, 4, 8), torch.ones(1, 64), torch.ones(1, 4)
    with pytest.raises(ConfigError, match=r"block_tables holds 4; the cache has 4 blocks, so it must lie in \[0, 4\)"):
        ops.paged_attention(q, kv, ops.PagedBatch([1], [20], torch.tensor([[0, 4]])))
    for slot in (-1, 64):
        with pytest.raises(ConfigError, match=f"slots holds {slot}; the cache has 4 blocks of 16"):
            ops.qk_norm_rope_store(qkv, cos, cos, torch.tensor([slot]), kv)


def test_scales_of_an_int8_cache_are_those_of_its_slots() -> None:
    kv = ops.KVLayer.zeros((4, 2, 16, 8), torch.int8, CPU)
    assert kv.k_scale is not None and kv.v_scale is not None
    q, batch = torch.ones(1, 4, 8), ops.PagedBatch([1], [20], torch.tensor([[0, 3]]))
    for wrong in (kv.k_scale[:1], kv.k_scale.double(), kv.k_scale[..., None], kv.k_scale.mT.contiguous().mT):
        for name in ("k_scale", "v_scale"):
            with pytest.raises(ConfigError, match=f"{name} must be"):
                ops.paged_attention(q, replace(kv, **{name: wrong}), batch)
    seen = [ops.paged_attention(q, kv, batch, window=window) for window in (None, 20, 2**40)]
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


@pytest.mark.gpu
def test_a_gpu_takes_a_cache_of_the_queries_type_only() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    device = torch.device("cuda", 0)
    kv = ops.KVLayer.zeros((4, 2, 16, 8), torch.int8, device)
    batch = ops.PagedBatch([1], [1], torch.zeros(1, 1, dtype=torch.int32, device=device))
    with pytest.raises(ConfigError, match="the cache is int8 and q is float32"):
        ops.paged_attention(torch.ones(1, 4, 8, device=device), kv, batch)
    with pytest.raises(ConfigError, match="65 query heads share a key head, and the kernels have room for 64"):
        ops.self_attention(torch.ones(1, 65, 8, device=device), *torch.ones(2, 1, 1, 8, device=device))
