"""Every reference operation against its formula, written independently in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvik.kernels.api import KVLayer, LinearWeight, Ops
from kvik.kernels.reference import ReferenceOps, dequantize_kv

OPS: Ops = ReferenceOps()
EPS = 1e-6
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def close(got: Tensor, want: Tensor) -> bool:
    scale = max(1.0, float(want.abs().max()))
    return float((got.double() - want).abs().max()) <= TOLERANCE[got.dtype] * scale


def norm64(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 123])
def test_projections_and_norms(dtype: torch.dtype, num_tokens: int) -> None:
    x, norm = random(num_tokens, 24, dtype=dtype), random(24, dtype=dtype)
    w = LinearWeight(random(36, 24, dtype=dtype), random(36, dtype=dtype, seed=1))
    assert w.bias is not None
    matrix, bias = w.weight.double().T, w.bias.double()
    if num_tokens == 0:
        assert OPS.norm_linear(x, norm, EPS, w).shape == (0, 36)
        return
    assert close(OPS.rms_norm(x, norm, EPS), norm64(x, norm))
    assert close(OPS.linear(x, w), x.double() @ matrix + bias)
    assert close(OPS.linear(x, LinearWeight(w.weight)), x.double() @ matrix)
    assert close(OPS.norm_linear(x, norm, EPS, w), norm64(x, norm) @ matrix + bias)
    residual = random(num_tokens, 36, dtype=dtype, seed=2)
    assert close(OPS.linear_add(x, w, residual), residual.double() + x.double() @ matrix + bias)
    gate, up = (norm64(x, norm) @ matrix + bias).chunk(2, dim=-1)
    assert close(OPS.norm_linear_swiglu(x, norm, EPS, w), gate / (1 + (-gate).exp()) * up)


def test_the_norm_is_computed_in_fp32() -> None:
    x = torch.full((1, 4096), 300.0, dtype=torch.float16)  # the sum of squares exceeds the range of float16
    assert torch.equal(OPS.rms_norm(x, torch.ones(4096, dtype=torch.float16), EPS), torch.ones_like(x))


def test_embedding_gathers_rows() -> None:
    weight = random(11, 6, dtype=torch.float32)
    ids = torch.tensor([3, 0, 10, 3])
    assert torch.equal(OPS.embedding(ids, weight), torch.stack([weight[i] for i in ids.tolist()]))


def rotated64(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotation as a complex product: the pair (i, i + head_dim / 2) is one number."""
    first, second = x.double().chunk(2, dim=-1)
    turn = torch.polar(torch.ones((), dtype=torch.float64), positions[:, None].double() * inv_freq)
    z = torch.complex(first, second) * turn[:, None]
    return torch.cat([z.real, z.imag], dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "block_size"), [(7, 1, 80, 16), (4, 2, 64, 48)])
def test_qk_norm_rope_store(
    dtype: torch.dtype, qk_norm: bool, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int
) -> None:
    num_tokens, num_blocks = 2 * block_size + 1, 5
    qkv = random(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    positions = torch.arange(num_tokens) + 3
    inv_freq = 100.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = positions[:, None] * inv_freq
    slots = torch.randperm(num_blocks * block_size, generator=torch.Generator().manual_seed(0))[:num_tokens]
    k_cache = torch.full((num_blocks, num_kv_heads, block_size, head_dim), math.nan, dtype=dtype)
    v_cache = k_cache.clone()
    q_norm, k_norm = (random(head_dim, dtype=dtype, seed=s) if qk_norm else None for s in (3, 4))
    before = qkv.clone()
    kv = KVLayer(k_cache, v_cache)
    q = OPS.qk_norm_rope_store(qkv, angles.cos().float(), angles.sin().float(), slots, kv, q_norm, k_norm, EPS)
    assert torch.equal(qkv, before)
    heads = qkv.view(num_tokens, -1, head_dim)
    want_q, want_k, want_v = heads[:, :num_heads], heads[:, num_heads:-num_kv_heads], heads[:, -num_kv_heads:]
    if q_norm is not None and k_norm is not None:
        want_q, want_k = norm64(want_q, q_norm), norm64(want_k, k_norm)
    assert q.shape == (num_tokens, num_heads, head_dim)
    assert close(q, rotated64(want_q, positions, inv_freq))
    want_k = rotated64(want_k, positions, inv_freq)
    for token, slot in enumerate(slots.tolist()):
        block, offset = divmod(slot, block_size)
        assert close(k_cache[block, :, offset], want_k[token])
        assert torch.equal(v_cache[block, :, offset], want_v[token])
    written = torch.zeros(num_blocks * block_size, dtype=torch.bool)
    written[slots] = True
    untouched = k_cache.transpose(1, 2).flatten(0, 1)[~written]
    assert untouched.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_int8_cache_is_half_a_step_off(dtype: torch.dtype) -> None:
    """What is stored in int8 is what is stored in floats, to half of 1/127 of each head's largest element."""
    num_heads, num_kv_heads, head_dim, block_size, num_tokens = 4, 2, 64, 16, 20
    qkv = random(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    qkv[3] = 0
    angles = random(num_tokens, head_dim // 2, dtype=torch.float32)
    slots = torch.randperm(3 * block_size, generator=torch.Generator().manual_seed(0))[:num_tokens]
    shape = (3, num_kv_heads, block_size, head_dim)
    plain, narrow = (KVLayer.zeros(shape, kind, torch.device("cpu")) for kind in (dtype, torch.int8))
    results = [
        OPS.qk_norm_rope_store(qkv, angles.cos(), angles.sin(), slots, kv, None, None, EPS) for kv in (plain, narrow)
    ]
    assert torch.equal(*results)
    for want, values, scales in ((plain.k, narrow.k, narrow.k_scale), (plain.v, narrow.v, narrow.v_scale)):
        assert scales is not None
        torch.testing.assert_close(scales, want.float().abs().amax(-1) / 127, rtol=1e-6, atol=0)
        error = (dequantize_kv(values, scales, torch.float32) - want.float()).abs()
        assert (error <= 0.5001 * scales.unsqueeze(-1)).all()
        assert values.abs().amax(-1)[scales > 0].eq(127).all()
    block, offset = divmod(int(slots[3]), block_size)
    assert not narrow.k[block, :, offset].any()
    qkv[0, -1] = math.nan
    OPS.qk_norm_rope_store(qkv, angles.cos(), angles.sin(), slots, narrow, None, None, EPS)
    block, offset = divmod(int(slots[0]), block_size)
    assert narrow.v_scale is not None and narrow.v_scale[block, -1, offset].isnan(), "what is not a number stays so"
