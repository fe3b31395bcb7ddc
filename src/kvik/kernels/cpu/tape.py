"""Recorded forward passes: the decoder runs once over `TapeOps`, which computes nothing and notes every operation with
the address of its buffers; `Tape.run` then executes the list in one native call, as often as steps come.

    record    decoder.forward(TapeOps) -> | embed | norm_linear | rope | attention | linear_add | ...    once
    run       step: number of tokens, ids, slots, block tables, ...                                      every step

A tape has room for a number of tokens; its buffers are shared by all layers. It holds whatever its entries point to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvik.kernels.api import KVLayer, LinearWeight
from kvik.kernels.cpu.native import NativePool, OpStruct, StepStruct
from kvik.kernels.cpu.ops import (
    ALL_TOKENS,
    LOGIT_ROWS,
    attention_entry,
    embed_entry,
    linear_entry,
    norm_entry,
    query_dtype,
    rope_entry,
)
from kvik.kernels.cpu.packing import PackedLinear

__all__ = ["Tape", "TapeOps"]


class Tape:
    """A list of operations. `capacity` is the number of tokens that its buffers hold."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held: list[object] = []
        self._entries: list[OpStruct] = []
        self._array = (OpStruct * 0)()

    def __len__(self) -> int:
        return len(self._entries)

    def append(self, op: OpStruct, *held: object) -> None:
        """Note `op`, and keep `held` alive as long as the tape."""
        self._entries.append(op)
        self.held.extend(held)

    def seal(self) -> None:
        """End the recording."""
        self._array = (OpStruct * len(self._entries))(*self._entries)

    def set_result(self, address: int) -> None:
        """Where the last operation writes."""
        self._array[len(self._array) - 1].y = address

    def run(self, pool: NativePool, step: StepStruct) -> None:
        """Execute the tape for one step. Everything that `step` points to must be alive."""
        pool.run(self._array, len(self._array), step)


class TapeOps:
    """`kvik.kernels.api.Ops` that records. Weights must be packed; `tied` is an lm_head that is the embedding too;
    `dtype` is the model's, in which queries are kept beside an int8 cache.

    What it returns are the buffers that the operation will write, [capacity, features] fp32, so that the next
    operation finds its input. The residual stream is updated in place. The last operation of the decoder, the norm
    of the rows that torch picked out of the stream, is recorded as a gather of the step's logit rows.
    """

    def __init__(self, tape: Tape, tied: PackedLinear | None, dtype: torch.dtype) -> None:
        self._tape = tape
        self._dtype = dtype
        self._tied = tied
        self._buffers: dict[str, Tensor] = {}
        self._stream: Tensor | None = None

    def embedding(self, input_ids: Tensor, weight: Tensor) -> Tensor:
        source = self._tied if self._tied is not None and weight is self._tied.weight else weight
        features = source.in_features if isinstance(source, PackedLinear) else source.shape[1]
        self._stream = self._buffer("stream", features)
        self._tape.append(embed_entry(self._stream, source, ALL_TOKENS), self._stream, source)
        return self._stream

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        assert self._stream is not None, "a tape begins with the embedding"
        norm = weight.float()
        self._tape.append(norm_entry(self._stream, norm, eps, None, LOGIT_ROWS, gather=True), norm)
        return x

    def linear(self, x: Tensor, w: LinearWeight) -> Tensor:
        raise AssertionError("the decoder's forward pass has no plain projection")

    def norm_linear(self, x: Tensor, norm_weight: Tensor, eps: float, w: LinearWeight) -> Tensor:
        packed, norm = _packed(w), norm_weight.float()
        y = self._buffer("wide", packed.out_features)
        self._tape.append(linear_entry(x, y, packed, ALL_TOKENS, norm=norm, eps=eps), x, y, packed, norm)
        return y

    def norm_linear_swiglu(self, x: Tensor, norm_weight: Tensor, eps: float, w: LinearWeight) -> Tensor:
        packed, norm = _packed(w), norm_weight.float()
        assert packed.swiglu, "gate and up must be packed with swiglu=True"
        y = self._buffer("wide", packed.out_features // 2)
        self._tape.append(linear_entry(x, y, packed, ALL_TOKENS, norm=norm, eps=eps), x, y, packed, norm)
        return y

    def linear_add(self, x: Tensor, w: LinearWeight, residual: Tensor) -> Tensor:
        packed = _packed(w)
        self._tape.append(linear_entry(x, residual, packed, ALL_TOKENS, residual=residual), x, residual, packed)
        return residual

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
        num_kv_heads, _, head_dim = kv.k.shape[1:]
        q = self._buffer("query", qkv.shape[1] - 2 * num_kv_heads * head_dim, query_dtype(kv, self._dtype))
        norms = tuple(None if norm is None else norm.float() for norm in (q_norm, k_norm))
        op = rope_entry(qkv, q, kv, norms[0], norms[1], eps, ALL_TOKENS)
        self._tape.append(op, qkv, q, kv, *norms)
        return q.view(self._tape.capacity, -1, head_dim)

    def attention(self, q: Tensor, kv: KVLayer, *, scale: float, window: int | None) -> Tensor:
        """Record `AttentionBackend.forward`: q [capacity, num_heads, head_dim] -> a buffer of that shape, fp32."""
        y = self._buffer("context", q.shape[1] * q.shape[2])
        op = attention_entry(q.flatten(1), y, kv, scale, window, q.shape[1])
        self._tape.append(op, q, y, kv)
        return y.view(q.shape)

    def _buffer(self, role: str, features: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[capacity, features]; users of one role take turns, so its memory is shared and as large as the widest."""
        size = self._tape.capacity * features
        memory = self._buffers.get(role)
        if memory is None or memory.numel() < size:
            memory = self._buffers[role] = torch.empty(size, dtype=dtype)
        return memory[:size].view(self._tape.capacity, features)


def _packed(w: LinearWeight) -> PackedLinear:
    assert isinstance(w, PackedLinear), "a tape takes packed projections only"
    return w
