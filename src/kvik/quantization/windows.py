"""Running text through a model in windows: all of it at once, or one layer at a time so that one layer is in memory.

A window is a sequence of its own that begins at position 0. `LayerStream` keeps the hidden states of all windows
between two layers; the block itself is `Decoder.forward` with one layer, whose embedding hands over those states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from kvik.attention.base import ForwardBatch
from kvik.attention.registry import select_backend
from kvik.kernels.api import KVLayer, LinearWeight
from kvik.kernels.reference import ReferenceOps
from kvik.layers.rope import RopeTable
from kvik.models.decoder import Decoder, DecoderWeights, LayerWeights
from kvik.models.spec import DecoderSpec

__all__ = ["LayerStream", "Scorer", "cut_windows", "hidden_states", "kv_layers"]

_BLOCK = 16
_TOKENS_AT_ONCE = 2048
_CPU = torch.device("cpu")


class Scorer(Protocol):
    """A model as the runner uses it: `kvik.models.decoder.Decoder` or the native one."""

    spec: DecoderSpec

    def forward(self, batch: ForwardBatch, kv: Sequence[KVLayer]) -> Tensor:
        """Hidden states [num_rows, hidden_size] of the wanted tokens."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[num_rows, hidden_size] -> [num_rows, vocab_size] fp32."""


def cut_windows(ids: Sequence[int], length: int, limit: int) -> Tensor:
    """The first `limit` of `ids` as whole windows [num_windows, length]; one shorter window if there are too few."""
    length = min(length, len(ids), limit)
    count = min(len(ids), limit) // length if length else 0
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


def kv_layers(spec: DecoderSpec, length: int, dtype: torch.dtype, max_tokens: int = _TOKENS_AT_ONCE) -> list[KVLayer]:
    """Cache for the windows of `length` tokens that are computed together."""
    num_blocks = max(1, max_tokens // length) * -(-length // _BLOCK)
    shape = (num_blocks, spec.num_kv_heads, _BLOCK, spec.head_dim)
    return [KVLayer.zeros(shape, dtype, _CPU) for _ in spec.windows]


def hidden_states(
    model: Scorer, windows: Tensor, kv: Sequence[KVLayer], max_tokens: int = _TOKENS_AT_ONCE
) -> Iterator[Tensor]:
    """Hidden states [num_tokens, hidden_size] of every token, some windows at a time."""
    for part in _parts(windows, max_tokens):
        yield model.forward(_batch(part), kv)


class LayerStream:
    """Text on its way through a model's layers, in fp32."""

    def __init__(self, spec: DecoderSpec, windows: Tensor, embedding: Tensor) -> None:
        self._spec = spec
        self._shape = windows.shape
        self._rope = RopeTable(spec.rope, windows.shape[1], _CPU)
        self.hidden = embedding[windows].float()  # [num_windows, length, hidden_size]

    def block(self, index: int, layer: LayerWeights, hidden: Tensor) -> Tensor:
        """What `layer`, an fp32 one, makes of `hidden` [num_windows, length, hidden_size]; differentiable in both."""
        num_windows, length, _ = hidden.shape
        spec = replace(self._spec, num_layers=1, windows=(self._spec.windows[index],))
        ops = _LayerOps(hidden.flatten(0, 1))
        weights = DecoderWeights(ops.nothing, (layer,), ops.nothing, LinearWeight(ops.nothing))
        decoder = Decoder(spec, weights, self._rope, ops, select_backend("auto", _CPU))
        kv = kv_layers(spec, length, torch.float32, hidden.shape[:2].numel())
        out = decoder.forward(_batch(torch.empty(num_windows, length, dtype=torch.int64)), kv)
        return out.view_as(hidden)

    @torch.no_grad()
    def advance(self, index: int, layer: LayerWeights) -> None:
        """Move the hidden states through `layer`, an fp32 one."""
        count = max(1, _TOKENS_AT_ONCE // self._shape[1])
        self.hidden = torch.cat([self.block(index, layer, part) for part in torch.split(self.hidden, count)])


class _LayerOps(ReferenceOps):
    """Operations of a decoder that begins and ends with hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        self.nothing = torch.empty(0)
        self._hidden = hidden

    def embedding(self, input_ids: Tensor, weight: Tensor) -> Tensor:
        return self._hidden

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x if weight is self.nothing else super().rms_norm(x, weight, eps)


def _parts(windows: Tensor, max_tokens: int) -> list[Tensor]:
    count = max(1, max_tokens // windows.shape[1])
    return [windows[begin : begin + count] for begin in range(0, len(windows), count)]


def _batch(windows: Tensor) -> ForwardBatch:
    """All tokens of `windows` [num_seqs, length] from position 0 on, every row wanted."""
    num_seqs, length = windows.shape
    num_blocks = -(-length // _BLOCK)
    positions = torch.arange(length).repeat(num_seqs)
    starts = torch.arange(num_seqs + 1, dtype=torch.int32) * length
    return ForwardBatch(
        input_ids=windows.reshape(-1),
        positions=positions,
        slots=(torch.arange(num_seqs)[:, None] * num_blocks * _BLOCK + torch.arange(length)).view(-1),
        query_starts=starts,
        seq_lens=torch.full((num_seqs,), length, dtype=torch.int32),
        block_tables=torch.arange(num_seqs * num_blocks, dtype=torch.int32).view(num_seqs, num_blocks),
        logit_indices=torch.arange(num_seqs * length),
        query_starts_host=tuple(starts.tolist()),
        seq_lens_host=(length,) * num_seqs,
        rope_lens=torch.full((num_seqs * length,), length),
    )
