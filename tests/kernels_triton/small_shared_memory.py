"""Compiles what GPUs with less shared memory than an H200 launch whose plans ask for most of it. Needs no GPU.

Triton's OutOfResources ends the process, as it would end an engine.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from kvik.attention.base import ForwardBatch
from kvik.attention.triton import AttentionLimits, TritonAttention
from kvik.kernels.api import KVLayer, LinearWeight
from kvik.kernels.triton.compile_only import StandInDriver, compile_only, keep_out_dynamo
from kvik.kernels.triton.dispatch import load_table
from kvik.kernels.triton.features import Features
from kvik.kernels.triton.ops import TritonOps

SHARED_BYTES = {(8, 0): 163 << 10, (8, 9): 99 << 10}  # an A100; an L4, and GeForce
HIDDEN, QKV, INNER, VOCAB = 4096, 6144, 14_336, 128_256


class _SmallDriver(StandInDriver):
    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__(capability)
        self._shared_bytes = SHARED_BYTES[capability]

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self._shared_bytes}


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def projections(features: Features, deterministic: bool) -> None:
    ops = TritonOps(
        torch.device("meta"), table=load_table("another GPU"), deterministic=deterministic, features=features
    )
    for m in (8, 64, 128):
        x = _empty(m, HIDDEN)
        ops.norm_linear(x, _empty(HIDDEN), 1e-6, LinearWeight(_empty(QKV, HIDDEN)))
        ops.linear_add(_empty(m, 2048), LinearWeight(_empty(1024, 2048)), _empty(m, 1024))
        ops.norm_linear_swiglu(x, _empty(HIDDEN), 1e-6, LinearWeight(_empty(2 * INNER, HIDDEN)))
        ops.linear(x, LinearWeight(_empty(VOCAB, HIDDEN)))


def attention(features: Features, deterministic: bool, head_dim: int, dtype: torch.dtype) -> None:
    limits = AttentionLimits(16, 8, head_dim, 8, 256, 8 * 256, itemsize=dtype.itemsize, block_size=64)
    backend = TritonAttention(
        limits, torch.device("meta"), deterministic=deterministic, shared_bytes=features.shared_bytes
    )
    ints = [_empty(n, dtype=torch.int32) for n in (3, 2)]
    none, tables = _empty(0, dtype=torch.int64), _empty(2, 4, dtype=torch.int32)
    batch = ForwardBatch(none, none, none, *ints, tables, None, (0, 1, 100), (200, 200))
    kv = KVLayer(*(_empty(8, 8, 64, head_dim, dtype=dtype) for _ in "kv"))
    backend.forward(_empty(100, 16, head_dim, dtype=dtype), kv, batch, scale=0.1, window=None)


if __name__ == "__main__":
    capability = (int(sys.argv[1]), int(sys.argv[2]))
    keep_out_dynamo()
    compile_only(_SmallDriver(capability))
    features = Features.of_capability(capability)
    assert features.shared_bytes == SHARED_BYTES[capability]
    for deterministic in (False, True):
        projections(features, deterministic)
        for head_dim, dtype in ((128, torch.bfloat16), (256, torch.bfloat16), (128, torch.float32)):
            attention(features, deterministic, head_dim, dtype)
