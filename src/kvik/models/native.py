"""The decoder on the native CPU kernels: `NativeDecoder` stands wherever `Decoder` stands, `pack_weights` makes its
weights. The block itself is `Decoder.forward`, recorded on a tape and replayed in one native call per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvik.attention.base import ForwardBatch, KVLayer
from kvik.kernels.api import LinearWeight
from kvik.kernels.cpu.native import NativePool, StepStruct
from kvik.kernels.cpu.ops import linear_entry
from kvik.kernels.cpu.packing import PackedLinear, pack_linear
from kvik.kernels.cpu.tape import Tape, TapeOps
from kvik.layers.rope import RopeTable
from kvik.models.decoder import Decoder, DecoderWeights, LayerWeights
from kvik.models.spec import DecoderSpec

__all__ = ["NativeDecoder", "pack_layer", "pack_weights"]

_FIRST_CAPACITY = 64  # tokens; grows with the steps that come, so that a decode-only engine stays small


class NativeDecoder:
    """A `Decoder` over packed weights. Not thread-safe; the pool may be shared by several that run in turn."""

    def __init__(
        self, spec: DecoderSpec, weights: DecoderWeights, rope: RopeTable, pool: NativePool, max_tokens: int
    ) -> None:
        self.spec = spec
        self.weights = weights
        self.rope = rope
        self.pool = pool
        self.max_tokens = max_tokens
        assert isinstance(weights.lm_head, PackedLinear), "the lm_head must be packed"
        self._lm_head = weights.lm_head
        self._tape: Tape | None = None
        self._kv: Sequence[KVLayer] | None = None
        self._logits = torch.empty(0)

    def forward(self, batch: ForwardBatch, kv: Sequence[KVLayer]) -> Tensor:
        """`Decoder.forward`: the hidden states at `batch.logit_indices`, [num_rows, hidden_size] fp32."""
        tape = self._tape_for(batch.input_ids.shape[0], kv)
        hidden = torch.empty((batch.logit_indices.shape[0], self.spec.hidden_size))
        cos, sin = self.rope.cos_sin(batch.positions, batch.rope_lens)
        tables = batch.block_tables if batch.block_tables.stride(-1) == 1 else batch.block_tables.contiguous()
        step = StepStruct(
            num_tokens=batch.input_ids.shape[0],
            num_seqs=batch.num_seqs,
            num_rows=hidden.shape[0],
            table_stride=tables.stride(0),
            input_ids=_address(batch.input_ids, torch.int64),
            cos=_address(cos, torch.float32),
            sin=_address(sin, torch.float32),
            slots=_address(batch.slots, torch.int64),
            query_starts=_address(batch.query_starts, torch.int32),
            seq_lens=_address(batch.seq_lens, torch.int32),
            block_tables=tables.data_ptr(),
            logit_indices=_address(batch.logit_indices, torch.int64),
        )
        assert tables.dtype == torch.int32
        tape.set_result(hidden.data_ptr())
        tape.run(self.pool, step)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """`Decoder.logits`: [num_rows, vocab_size] fp32, in memory that the next call writes again."""
        rows = hidden.float().contiguous()
        if len(self._logits) < len(rows):
            self._logits = torch.empty((len(rows), self.spec.vocab_size))
        out = self._logits[: len(rows)]
        if len(rows):
            self.pool.run_one(linear_entry(rows, out, self._lm_head, len(rows)))
        return out

    def _tape_for(self, num_tokens: int, kv: Sequence[KVLayer]) -> Tape:
        assert num_tokens <= self.max_tokens, f"{num_tokens} tokens in a step of at most {self.max_tokens}"
        if self._tape is None or num_tokens > self._tape.capacity or kv is not self._kv:
            capacity = _FIRST_CAPACITY
            while capacity < num_tokens:
                capacity *= 2
            self._tape, self._kv = None, kv
            self._tape = self._record(min(capacity, self.max_tokens), kv)
        return self._tape

    def _record(self, capacity: int, kv: Sequence[KVLayer]) -> Tape:
        tape = Tape(capacity)
        ops = TapeOps(tape, self._lm_head)
        Decoder(self.spec, self.weights, self.rope, ops, _TapeAttention(ops)).forward(_stand_in(), kv)
        tape.seal()
        return tape


class _TapeAttention:
    """`AttentionBackend` that records."""

    def __init__(self, ops: TapeOps) -> None:
        self._ops = ops

    def forward(self, q: Tensor, kv: KVLayer, batch: ForwardBatch, *, scale: float, window: int | None) -> Tensor:
        return self._ops.attention(q, kv.k, kv.v, scale=scale, window=window)


def _stand_in() -> ForwardBatch:
    """One token at position 0: recording looks at shapes and addresses only."""
    wide, narrow = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int32)
    starts = torch.tensor([0, 1], dtype=torch.int32)
    return ForwardBatch(wide, wide, wide, starts, narrow, narrow[None], wide, (0, 1), (1,), wide + 1)


def _address(tensor: Tensor, dtype: torch.dtype) -> int:
    assert tensor.dtype == dtype, f"{tensor.dtype} where {dtype} is expected"
    assert tensor.is_contiguous(), "the kernels take contiguous tensors"
    return tensor.data_ptr()


def pack_layer(layer: LayerWeights, fmt: str, pool: NativePool) -> LayerWeights:
    """The layer with packed projections and fp32 norms."""

    def pack(w: LinearWeight, swiglu: bool = False) -> PackedLinear:
        return pack_linear(w.weight, w.bias, fmt, pool=pool, swiglu=swiglu)

    return LayerWeights(
        attention_norm=layer.attention_norm.float(),
        qkv=pack(layer.qkv),
        q_norm=None if layer.q_norm is None else layer.q_norm.float(),
        k_norm=None if layer.k_norm is None else layer.k_norm.float(),
        o=pack(layer.o),
        mlp_norm=layer.mlp_norm.float(),
        gate_up=pack(layer.gate_up, swiglu=True),
        down=pack(layer.down),
    )


def pack_weights(
    weights: DecoderWeights, fmt: str, pool: NativePool, *, lm_head_fmt: str | None = None
) -> DecoderWeights:
    """All projections in the format `fmt`, the lm_head in its own if given. A tied embedding is the packed lm_head.

    The result shares nothing with `weights` but an embedding that is not tied.
    """
    tied = weights.lm_head.weight is weights.embedding
    lm_head = pack_linear(weights.lm_head.weight, weights.lm_head.bias, lm_head_fmt or fmt, pool=pool)
    layers = tuple(pack_layer(layer, fmt, pool) for layer in weights.layers)
    embedding = lm_head.weight if tied else weights.embedding
    return replace(weights, embedding=embedding, layers=layers, final_norm=weights.final_norm.float(), lm_head=lm_head)
