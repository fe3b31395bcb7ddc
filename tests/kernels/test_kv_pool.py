"""The layout of the KV pool: every layer's view is what a cache of its own would be, and no layer touches another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvik.kernels.api import KVLayer, Ops
from kvik.kernels.cpu.native import NativePool, available
from kvik.kernels.cpu.ops import NativeOps
from kvik.kernels.reference import ReferenceOps
from kvik.models.registry import build_spec
from kvik.runtime.kv_pool import KVPool

CPU = torch.device("cpu")
BLOCKS, LAYERS, HEADS, BLOCK, DIM = 5, 3, 2, 16, 8
KINDS = [torch.float32, torch.bfloat16, torch.int8]


def kv_pool(dtype: torch.dtype) -> KVPool:
    config = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": HEADS, "head_dim": DIM,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 128,
    }  # fmt: skip
    spec = build_spec(config)
    assert (spec.num_layers, spec.num_kv_heads, spec.head_dim) == (LAYERS, HEADS, DIM)
    return KVPool(spec, BLOCKS, BLOCK, dtype, CPU)


def implementations() -> list[Ops]:
    return [ReferenceOps(), *([NativeOps(NativePool(1))] if available() else [])]


def store(ops: Ops, kv: KVLayer, seed: int) -> None:
    """Random keys and values into slots of three blocks."""
    qkv = torch.randn(6, (4 + 2 * HEADS) * DIM, generator=torch.Generator().manual_seed(seed)).to(
        torch.float32 if kv.k.dtype is torch.int8 else kv.k.dtype
    )
    angles = torch.arange(6.0)[:, None].expand(6, DIM // 2).contiguous()
    slots = torch.tensor([3, 15, 32, 33, 64, 79])
    ops.qk_norm_rope_store(qkv, angles.cos(), angles.sin(), slots, kv, None, None, 1e-6)


def tensors(kv: KVLayer) -> list[Tensor]:
    return [t for t in (kv.k, kv.v, kv.k_scale, kv.v_scale) if t is not None]


@pytest.mark.parametrize("dtype", KINDS)
def test_all_layers_of_a_block_lie_side_by_side(dtype: torch.dtype) -> None:
    pool = kv_pool(dtype)
    assert pool.blocks.shape == (BLOCKS, LAYERS, 2, HEADS, BLOCK, DIM)
    assert pool.blocks.is_contiguous()
    for i, layer in enumerate(pool.layers):
        layer.k[4, 1, 15, 7], layer.v[0, 0, 0, 0] = i + 1, -i - 1
        assert pool.blocks[4, i, 0, 1, 15, 7] == i + 1
        assert pool.blocks[0, i, 1, 0, 0, 0] == -i - 1
        assert len(tensors(layer)) == (4 if dtype is torch.int8 else 2)


@pytest.mark.parametrize("dtype", KINDS)
def test_a_layer_of_the_pool_is_written_as_a_cache_of_its_own(dtype: torch.dtype) -> None:
    for ops in implementations():
        pool = kv_pool(dtype)
        alone = [KVLayer.zeros((BLOCKS, HEADS, BLOCK, DIM), dtype, CPU) for _ in pool.layers]
        for i, (layer, single) in enumerate(zip(pool.layers, alone, strict=True)):
            store(ops, layer, i), store(ops, single, i)
        for layer, single in zip(pool.layers, alone, strict=True):
            assert tensors(single)[0].count_nonzero() > 0
            for got, want in zip(tensors(layer), tensors(single), strict=True):
                assert torch.equal(got, want)
