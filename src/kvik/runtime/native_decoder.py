"""The decoder on the native CPU kernels: the block as `Decoder.forward` writes it, recorded once and run in one call.

Takes the place of `kvik.models.decoder.Decoder` in the model runner: the same `spec`, `forward` and `logits`. Owns the
thread pool, the packed weights and the tape; the KV cache and the batch are arguments, as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvik.attention.base import ForwardBatch
from kvik.kernels.api import KVLayer, LinearWeight
from kvik.kernels.cpu.native import NativePool, StepStruct, data_pointer
from kvik.kernels.cpu.ops import linear_entry
from kvik.kernels.cpu.packing import PackedLinear, pack_linear, pack_quantized
from kvik.kernels.cpu.tape import Tape, TapeOps
from kvik.layers.rope import RopeTable
from kvik.models.decoder import Decoder, DecoderWeights
from kvik.models.loader import Pack
from kvik.models.spec import DecoderSpec
from kvik.quantization.loading import PackQuantized, QuantizedWeight

__all__ = ["NativeDecoder", "attention_parts_bytes", "native_pack", "native_pack_quantized"]

_FINE_ROLES = ("down", "lm_head")
"""Projections that lose most by int8 activations: down has outliers in its inputs, the head decides every token."""


def native_pack(fmt: str, head_fmt: str, pool: NativePool) -> Pack:
    """Packs projections as they are loaded: `fmt` for those of the blocks, `head_fmt` for the output head."""

    def pack(role: str, weight: LinearWeight) -> LinearWeight:
        chosen = head_fmt if role == "lm_head" else fmt
        return pack_linear(weight.weight, weight.bias, chosen, pool=pool, **_options(role, chosen))

    return pack


def native_pack_quantized(pool: NativePool) -> PackQuantized:
    """Packs projections that are quantised already, as they are loaded."""

    def pack(role: str, weight: QuantizedWeight) -> LinearWeight:
        options = _options(role, weight.fmt)
        return pack_quantized(weight.q, weight.scales, weight.bias, weight.fmt, pool=pool, **options)

    return pack


def _options(role: str, fmt: str) -> dict[str, bool]:
    """How the packing of a projection depends on which one it is."""
    return {"swiglu": role == "gate_up", "fine": fmt == "int8" and role in _FINE_ROLES}


class _TapeAttention:
    """`AttentionBackend` that records."""

    def __init__(self, ops: TapeOps) -> None:
        self._ops = ops

    def forward(self, q: Tensor, kv: KVLayer, batch: ForwardBatch, *, scale: float, window: int | None) -> Tensor:
        return self._ops.attention(q, kv, scale=scale, window=window)


class NativeDecoder:
    """A decoder whose steps of up to `max_tokens` tokens run natively. `weights` were packed with `native_pack`.

    A row's result does not depend on the rows beside it. `deterministic`: nor on how its prompt was cut into steps,
    because every token attends by the decode kernel, as a sequence of its own.
    """

    def __init__(
        self, spec: DecoderSpec, weights: DecoderWeights, rope: RopeTable, pool: NativePool, max_tokens: int,
        *, deterministic: bool = False,
    ) -> None:  # fmt: skip
        head = weights.lm_head
        assert isinstance(head, PackedLinear)
        if spec.tie_word_embeddings:
            weights = replace(weights, embedding=head.weight)  # the embedding is read from the packed head
        self.spec = spec
        self._weights = weights
        self._head = head
        self._rope = rope
        self._pool = pool
        self._max_tokens = max_tokens
        self._deterministic = deterministic
        self._tape: Tape | None = None
        self._kv: Sequence[KVLayer] = ()
        self._scores = torch.empty((0, spec.vocab_size))

    def forward(self, batch: ForwardBatch, kv: Sequence[KVLayer]) -> Tensor:
        """As `Decoder.forward`: hidden states [num_rows, hidden_size] fp32 of the tokens at `batch.logit_indices`."""
        if self._tape is None or self._kv is not kv:
            self._tape, self._kv = self._record(kv), kv
        if self._deterministic:
            batch = _single_queries(batch)
        wanted = torch.arange(len(batch.input_ids)) if batch.logit_indices is None else batch.logit_indices
        num_rows = len(wanted)
        hidden = torch.empty((max(num_rows, 1), self.spec.hidden_size))
        cos, sin = self._rope.cos_sin(batch.positions, batch.rope_lens)
        held = (batch.input_ids, cos, sin, batch.slots, batch.query_starts, batch.seq_lens, batch.block_tables)
        inputs = [tensor.contiguous() for tensor in (*held, wanted)]
        step = StepStruct(
            len(batch.input_ids), batch.num_seqs, num_rows, batch.block_tables.shape[1], *map(data_pointer, inputs)
        )
        self._tape.set_result(hidden.data_ptr())
        self._tape.run(self._pool, step)
        return hidden[:num_rows]

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token: [num_rows, hidden_size] from `forward` -> [num_rows, vocab_size] fp32.

        They are valid until the next call, which uses their memory again: fresh memory is slow to write to first.
        """
        if len(hidden) > len(self._scores):
            self._scores = torch.empty((len(hidden), self.spec.vocab_size))
        scores = self._scores[: len(hidden)]
        if len(hidden):
            self._pool.run_one(linear_entry(hidden, scores, self._head, len(hidden)))
        return scores

    def _record(self, kv: Sequence[KVLayer]) -> Tape:
        """Run the decoder once over operations that note what they are asked."""
        tape = Tape(self._max_tokens)
        tied = self._head if self.spec.tie_word_embeddings else None
        ops = TapeOps(tape, tied, self._weights.final_norm.dtype)
        Decoder(self.spec, self._weights, self._rope, ops, _TapeAttention(ops)).forward(_one_token(), kv)
        tape.seal()
        return tape


def attention_parts_bytes(spec: DecoderSpec, num_tokens: int, max_model_len: int) -> int:
    """Bytes of the partial results of a step in which `num_tokens` queries are decoded, at most.

    The decode kernel cuts a context into chunks as `Pool::plan_attention` does: of 256 tokens, of four times that past
    16384, and merges several.
    """
    short, long = -(-min(max_model_len, 16384) // 256), -(-max_model_len // 1024)
    parts = max(short, long)
    return num_tokens * parts * spec.num_heads * (spec.head_dim + 2) * 4 if parts > 1 else 0


def _single_queries(batch: ForwardBatch) -> ForwardBatch:
    """The batch with every token as a sequence of its own, whose context ends with the token."""
    seq_lens = (batch.positions + 1).int()
    return replace(
        batch,
        query_starts=torch.arange(len(seq_lens) + 1, dtype=torch.int32),
        seq_lens=seq_lens,
        block_tables=batch.block_tables.repeat_interleave(batch.query_starts.diff(), dim=0),
        query_starts_host=tuple(range(len(seq_lens) + 1)),
        seq_lens_host=tuple(seq_lens.tolist()),
    )


def _one_token() -> ForwardBatch:
    """A batch of the right types; recording reads nothing of it."""
    zero, wide = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    ends = torch.tensor([0, 1], dtype=torch.int32)
    return ForwardBatch(wide, wide, wide, ends, zero + 1, zero.view(1, 1), wide, (0, 1), (1,), wide + 1)
