"""Operations on rows in Triton against the reference: norms, embedding, SwiGLU's product, rotation and KV write."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from linear_cases import DTYPES, check, noise, one_plan

from kvik.kernels.api import KVLayer
from kvik.kernels.reference import ReferenceOps
from kvik.kernels.triton.dispatch import Plan, RowPlan
from kvik.kernels.triton.ops import Parts, TritonOps

REFERENCE = ReferenceOps()
EPS = 1e-6
UGLY = [(1, 80), (2, 16), (5, 123), (3, 1), (17, 33)]


def ops_on(device: torch.device, block: int = 16) -> TritonOps:
    return TritonOps(device, table=one_plan(Plan(path="blas"), RowPlan(block=block)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", UGLY, ids=str)
def test_norms(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    ops = ops_on(device)
    x, residual = (noise(*shape, dtype=dtype, device=device, seed=s) for s in (0, 1))
    gain = noise(shape[1], dtype=dtype, device=device)
    check(ops.rms_norm(x, gain, EPS), REFERENCE.rms_norm(x, gain, EPS))
    out, total = ops.add_rms_norm(x, residual, gain, EPS)
    assert torch.equal(total, x + residual)
    check(out, REFERENCE.rms_norm(x + residual, gain, EPS))
    assert ops.add_rms_norm(x, residual, gain, EPS, total=residual)[1] is residual
    assert torch.equal(residual, total)


def test_a_norm_over_the_last_of_three_dimensions(device: torch.device) -> None:
    x, gain = noise(3, 2, 20, dtype=torch.float32, device=device), noise(20, dtype=torch.float32, device=device)
    check(ops_on(device).rms_norm(x, gain, EPS), REFERENCE.rms_norm(x, gain, EPS))


def test_the_norm_is_computed_in_fp32(device: torch.device) -> None:
    x = torch.full((1, 512), 300.0, dtype=torch.float16, device=device)  # the squares exceed the range of float16
    assert torch.equal(ops_on(device).rms_norm(x, torch.ones_like(x[0]), EPS), torch.ones_like(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", UGLY, ids=str)
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    gate_up = noise(shape[0], 2 * shape[1], dtype=dtype, device=device) * 4
    gate, up = gate_up.chunk(2, dim=-1)
    check(ops_on(device).silu_mul(gate_up), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding(dtype: torch.dtype, ids_dtype: torch.dtype, device: torch.device) -> None:
    ids = torch.tensor([3, 0, 10, 3], device=device, dtype=ids_dtype)
    for size in (1, 16, 33):
        weight = noise(11, size, dtype=dtype, device=device)
        assert torch.equal(ops_on(device).embedding(ids, weight), weight[ids.long()])


def test_no_tokens(device: torch.device) -> None:
    ops = ops_on(device)
    nothing, gain = torch.empty(0, 16, device=device), torch.ones(16, device=device)
    assert ops.rms_norm(nothing, gain, EPS).shape == (0, 16)
    assert ops.silu_mul(nothing).shape == (0, 8)
    assert ops.embedding(torch.empty(0, dtype=torch.int64, device=device), gain[None]).shape == (0, 16)
    cache = torch.zeros(1, 1, 16, 4, device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    q = ops.qk_norm_rope_store(nothing, nothing[:, :2], nothing[:, :2], none, KVLayer(cache, cache), None, None, EPS)
    assert q.shape == (0, 2, 4)


def rope_inputs(
    num_tokens: int, heads: tuple[int, int, int], block_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qkv, cos, sin, slots; slots are in no order."""
    num_heads, num_kv_heads, head_dim = heads
    qkv = noise(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype, device=device)
    angles = noise(num_tokens, head_dim // 2, dtype=torch.float32, device=device) * 3
    order = torch.randperm(5 * block_size, generator=torch.Generator().manual_seed(0))[:num_tokens]
    return qkv, angles.cos(), angles.sin(), order.to(device)


def compare_rope(
    heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device,
    *, num_tokens: int = 3, block_size: int = 16, norms: tuple[bool, bool] = (True, True), block: int = 4,
) -> None:  # fmt: skip
    qkv, cos, sin, slots = rope_inputs(num_tokens, heads, block_size, dtype, device)
    q_norm, k_norm = (noise(heads[2], dtype=dtype, device=device, seed=s) if norms[s] else None for s in (0, 1))
    shape = (5, heads[1], block_size, heads[2])
    got_cache, want_cache = ([torch.full(shape, -7.0, dtype=dtype, device=device) for _ in "kv"] for _ in range(2))
    before = qkv.clone()
    got = ops_on(device, block).qk_norm_rope_store(qkv, cos, sin, slots, KVLayer(*got_cache), q_norm, k_norm, EPS)
    want = REFERENCE.qk_norm_rope_store(qkv, cos, sin, slots, KVLayer(*want_cache), q_norm, k_norm, EPS)
    assert torch.equal(qkv, before)
    check(got, want)
    check(got_cache[0], want_cache[0])
    assert torch.equal(got_cache[1], want_cache[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_rope_of_every_head_size(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    for norms in ((True, True), (False, False)):
        compare_rope((7, 1, head_dim), dtype, device, norms=norms)
    compare_rope((4, 2, head_dim), dtype, device, num_tokens=17, block_size=48, norms=(True, False), block=16)


@pytest.mark.parametrize("group", range(1, 17))
def test_rope_of_every_group_size(group: int, device: torch.device) -> None:
    compare_rope((2 * group, 2, 16), torch.bfloat16, device, norms=(False, True))


def test_padding_writes_nothing(device: torch.device) -> None:
    heads, dtype = (2, 1, 16), torch.float32
    qkv, cos, sin, slots = rope_inputs(5, heads, 16, dtype, device)
    slots[[1, 4]] = -1
    caches = [torch.full((5, 1, 16, 16), math.nan, device=device) for _ in "kv"]
    q = ops_on(device, 4).qk_norm_rope_store(qkv, cos, sin, slots, KVLayer(*caches), None, None, EPS)
    assert not q.isnan().any()
    for cache in caches:
        written = ~cache.transpose(1, 2).flatten(0, 1).isnan().any(-1).any(-1)
        assert sorted(written.nonzero().flatten().tolist()) == sorted(slots[slots >= 0].tolist())


def test_values_in_the_cache_are_finite(device: torch.device) -> None:
    """A token with a value that is not gets a key of NaN, so that whoever sees it is as broken as it is."""
    heads, dtype = (2, 2, 16), torch.bfloat16
    qkv, cos, sin, slots = rope_inputs(4, heads, 16, dtype, device)
    qkv[1, -3], qkv[2, 4 * 16], qkv[3, 5 * 16 - 1] = math.nan, math.inf, -math.inf  # values of one head or the other
    k, v = (torch.zeros(5, 2, 16, 16, dtype=dtype, device=device) for _ in "kv")
    ops_on(device, 4).qk_norm_rope_store(qkv, cos, sin, slots, KVLayer(k, v), None, None, EPS)
    assert v.isfinite().all()
    keys, values = (cache.transpose(1, 2).flatten(0, 1)[slots] for cache in (k, v))  # [num_tokens, 2, 16]
    assert keys.isnan().any(-1).any(-1).tolist() == [False, True, True, True]
    assert keys.isnan().any(-1).tolist() == [[False, False], [False, True], [True, False], [True, False]]
    assert torch.equal(values, qkv[:, -32:].unflatten(1, (2, 16)).nan_to_num(0.0, 0.0, 0.0))


@pytest.mark.parametrize("bias", [False, True])
def test_rope_of_parts(bias: bool, device: torch.device) -> None:
    heads, dtype = (4, 2, 16), torch.bfloat16
    _, cos, sin, slots = rope_inputs(3, heads, 16, dtype, device)
    parts = noise(2, 3, 128, dtype=torch.float32, device=device)
    added = noise(128, dtype=dtype, device=device, seed=3) if bias else None
    total = parts[0] + parts[1]
    qkv = (total if added is None else total + added.float()).to(dtype)
    found = []
    for given in (qkv, Parts(parts, dtype, added)):
        caches = [torch.zeros(5, 2, 16, 16, dtype=dtype, device=device) for _ in "kv"]
        q = ops_on(device, 4).qk_norm_rope_store(given, cos, sin, slots, KVLayer(*caches), None, None, EPS)
        found.append((q, *caches))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_keys_and_values_of_a_block_may_lie_side_by_side(device: torch.device) -> None:
    heads, dtype = (2, 1, 16), torch.bfloat16
    qkv, cos, sin, slots = rope_inputs(5, heads, 16, dtype, device)
    pairs = torch.zeros(5, 2, 1, 16, 16, dtype=dtype, device=device)
    apart = [torch.zeros(5, 1, 16, 16, dtype=dtype, device=device) for _ in "kv"]
    ops = ops_on(device, 4)
    ops.qk_norm_rope_store(qkv, cos, sin, slots, KVLayer(pairs[:, 0], pairs[:, 1]), None, None, EPS)
    ops.qk_norm_rope_store(qkv, cos, sin, slots, KVLayer(*apart), None, None, EPS)
    assert torch.equal(pairs, torch.stack(apart, 1))


def test_a_cache_of_another_type(device: torch.device) -> None:
    qkv, cos, sin, slots = rope_inputs(3, (2, 1, 16), 16, torch.float32, device)
    got, want = ([torch.zeros(5, 1, 16, 16, dtype=torch.float16, device=device) for _ in "kv"] for _ in range(2))
    ops_on(device, 4).qk_norm_rope_store(qkv, cos, sin, slots, KVLayer(*got), None, None, EPS)
    REFERENCE.qk_norm_rope_store(qkv, cos, sin, slots, KVLayer(*want), None, None, EPS)
    for mine, reference in zip(got, want, strict=True):
        check(mine, reference)
