"""Where an operator runs: one set of implementations for each device, made when it is first needed.

`CpuOperators` is here; that of GPUs is in `kvik.ops.gpu`, which imports triton.
"""

from __future__ import annotations

import threading
from ctypes import Array
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kvik.attention.base import AttentionBackend, ForwardBatch
from kvik.attention.cpu import CpuAttention
from kvik.core.plan import RowInit
from kvik.errors import ConfigError
from kvik.kernels.api import KVLayer, LinearWeight, Ops
from kvik.kernels.cpu.native import NativePool, OpStruct, StepStruct, available
from kvik.kernels.cpu.ops import MAX_HEAD_DIM, NativeOps
from kvik.kernels.cpu.packing import PackedLinear
from kvik.kernels.reference import ReferenceOps
from kvik.runtime.platform import CpuPlatform, select_platform
from kvik.sampling.row import RowSampling
from kvik.sampling.sampler import Sampler
from kvik.sampling_params import SamplingParams

__all__ = ["Batch", "CpuOperators", "Operators", "operators"]


class Batch(Protocol):
    """What implementations see of a `kvik.ops.PagedBatch`."""

    step: ForwardBatch
    backends: dict[tuple[int, int, int, torch.dtype], AttentionBackend]
    """What a device made for this batch, by (query heads, key/value heads, head size, type)."""


class Operators(Ops[Any], Protocol):
    """What a device implements. Arguments are checked, and contiguous."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual)"""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of [num_tokens, 2 * size] -> [num_tokens, size]."""

    def argmax(self, x: Tensor) -> Tensor:
        """[rows, features] -> [rows] int64, the first index of each maximum."""

    def attention(self, q: Tensor, kv: KVLayer, batch: Batch, scale: float, window: int | None) -> Tensor:
        """`AttentionBackend.forward`."""

    def sample(self, logits: Tensor, params: SamplingParams, seed: int, position: int) -> Tensor:
        """[rows, vocab] -> [rows] int64; row i draws with seed + i; -1 where nothing can be drawn."""


def operators(device: torch.device) -> Operators:
    """The implementations for `device`. Raises ConfigError for one that Kvik has no kernels for."""
    return _operators(device, torch.get_num_threads())


@lru_cache(maxsize=8)
def _operators(device: torch.device, threads: int) -> Operators:
    platform = select_platform(str(device))
    if platform.device != device:
        raise ConfigError(f"kvik.ops runs on the CPU and on NVIDIA GPUs, and got a tensor on {device}; move it first")
    if isinstance(platform, CpuPlatform):
        return CpuOperators(threads)
    from kvik.ops.gpu import GpuOperators

    return GpuOperators(platform.device)


class _SharedPool(NativePool):
    """A pool for all threads of the process: a pool runs one thing at a time."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._lock = threading.Lock()

    def run(self, ops: Array[OpStruct], num_ops: int, step: StepStruct) -> None:
        with self._lock:
            super().run(ops, num_ops, step)


class CpuOperators(ReferenceOps):
    """The compiled kernels where there are any and they take the types, else torch."""

    def __init__(self, threads: int) -> None:
        self.native = NativeOps(_SharedPool(threads)) if available() else None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return super().rms_norm(x, weight, eps) if self.native is None else self.native.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self.rms_norm(total, weight, eps), total

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def argmax(self, x: Tensor) -> Tensor:
        return x.float().argmax(-1) if self.native is None else self.native.argmax(x)

    def linear(self, x: Tensor, w: LinearWeight) -> Tensor:
        return self._projections(w).linear(x, w)

    def norm_linear(self, x: Tensor, norm_weight: Tensor, eps: float, w: LinearWeight) -> Tensor:
        return self._projections(w).norm_linear(x, norm_weight, eps, w)

    def linear_add(self, x: Tensor, w: LinearWeight, residual: Tensor) -> Tensor:
        return self._projections(w).linear_add(x, w, residual)

    def norm_linear_swiglu(self, x: Tensor, norm_weight: Tensor, eps: float, w: LinearWeight) -> Tensor:
        return self._projections(w).norm_linear_swiglu(x, norm_weight, eps, w)

    def qk_norm_rope_store(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        kv: KVLayer,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> Tensor:
        ops = self.native if self.native is not None and _is_native(kv, qkv.dtype) else _TORCH
        return ops.qk_norm_rope_store(qkv, cos, sin, slots, kv, q_norm, k_norm, eps)

    def attention(self, q: Tensor, kv: KVLayer, batch: Batch, scale: float, window: int | None) -> Tensor:
        step = batch.step
        if self.native is None or not _is_native(kv, q.dtype):
            return CpuAttention().forward(q, kv, step, scale=scale, window=window)
        return self.native.attention(
            q, kv, step.query_starts, step.seq_lens, step.block_tables, scale=scale, window=window
        )

    def sample(self, logits: Tensor, params: SamplingParams, seed: int, position: int) -> Tensor:
        vocab = logits.shape[1]
        rows = [RowSampling.from_init(RowInit(i, (), 0, params, seed + i, (), ()), vocab) for i in range(len(logits))]
        so_far = torch.zeros(1, dtype=torch.int64).expand(position)  # only its length is read
        samples = Sampler(vocab).sample(logits, rows, [so_far] * len(rows))
        return torch.tensor([sample.token_id for sample in samples], dtype=torch.int64)

    def _projections(self, w: LinearWeight) -> Ops[Any]:
        """A packed weight is in the layout of the kernels; to pack another one in each call would cost more."""
        if isinstance(w, PackedLinear):
            assert self.native is not None, "nothing else packs"
            return self.native
        return _TORCH


_TORCH = ReferenceOps()


def _is_native(kv: KVLayer, dtype: torch.dtype) -> bool:
    """Whether the compiled kernels take this cache, whose blocks are contiguous, beside queries of `dtype`."""
    block_size, head_dim = kv.k.shape[2:]
    narrow = kv.k.dtype is torch.int8 and dtype in (torch.float32, torch.bfloat16)
    fits = block_size % 16 == 0 and head_dim % 2 == 0 and head_dim <= MAX_HEAD_DIM and kv.k.stride(0) % head_dim == 0
    for scale in (kv.k_scale, kv.v_scale):
        fits &= scale is None or (scale.stride(0) * head_dim == kv.k.stride(0) and scale[0].is_contiguous())
    return fits and (narrow or kv.k.dtype in (torch.float32, torch.bfloat16))
