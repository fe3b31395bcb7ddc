"""The one decoder: every supported architecture is this block with other numbers in its spec.

The block is written once, in the fused operations of `kvik.kernels.api`. Weights are plain tensors in small dataclasses
(q, k and v stacked, gate and up stacked), so that whoever quantises, shards or prepacks them does it from outside.
The decoder owns its weights and RoPE table; the KV cache and the batch are arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvik.attention.base import AttentionBackend, ForwardBatch
from kvik.kernels.api import KVLayer, LinearWeight, Ops
from kvik.layers.rope import RopeTable
from kvik.models.spec import DecoderSpec

__all__ = ["Decoder", "DecoderWeights", "LayerWeights", "allocate_layer"]


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """The tensors of one block."""

    attention_norm: Tensor  # [hidden_size]
    qkv: LinearWeight  # [q_size + 2 * kv_size, hidden_size]: query, key, value rows
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    o: LinearWeight  # [hidden_size, q_size]
    mlp_norm: Tensor  # [hidden_size]
    gate_up: LinearWeight  # [2 * intermediate_size, hidden_size]: gate, up rows
    down: LinearWeight  # [hidden_size, intermediate_size]


@dataclass(frozen=True, slots=True, eq=False)
class DecoderWeights:
    """All tensors of a model. With tied embeddings `lm_head.weight` is `embedding` itself."""

    embedding: Tensor  # [vocab_size, hidden_size]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # [hidden_size]
    lm_head: LinearWeight  # [vocab_size, hidden_size]

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor once."""
        yield self.embedding
        for layer in self.layers:
            yield from (layer.attention_norm, layer.mlp_norm)
            yield from (norm for norm in (layer.q_norm, layer.k_norm) if norm is not None)
            for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
                yield linear.weight
                if linear.bias is not None:
                    yield linear.bias
        yield self.final_norm
        if self.lm_head.weight is not self.embedding:
            yield self.lm_head.weight


class Decoder:
    """A decoder-only language model over a paged KV cache."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: DecoderWeights,
        rope: RopeTable,
        ops: Ops[Any],
        attention: AttentionBackend,
    ) -> None:
        self.spec = spec
        self.weights = weights
        self.rope = rope
        self.ops = ops
        self.attention = attention
        self._scale = spec.head_dim**-0.5

    def forward(self, batch: ForwardBatch, kv: Sequence[KVLayer]) -> Tensor:
        """Compute the batch's tokens, write their keys and values to `kv` (one entry per layer).

        Returns the hidden states after the final norm of the tokens at `batch.logit_indices`: [num_rows, hidden_size].
        """
        cos, sin = self.rope.cos_sin(batch.positions, batch.rope_lens)  # [num_tokens, head_dim / 2]
        hidden: Any = self.ops.embedding(batch.input_ids, self.weights.embedding)  # [num_tokens, hidden_size]
        for layer, cache, window in zip(self.weights.layers, kv, self.spec.windows, strict=True):
            hidden = self._attention(layer, hidden, cos, sin, batch, cache, window)
            hidden = self._mlp(layer, hidden)
        normed = self.ops.rms_norm(hidden, self.weights.final_norm, self.spec.rms_norm_eps)
        return normed if batch.logit_indices is None else normed.index_select(0, batch.logit_indices)

    def shallow(self) -> Decoder:
        """This model cut to `DecoderSpec.shallow`, with the same tensors: what it gives means nothing."""
        layers = tuple(self.weights.layers[i] for i in self.spec.shallow_layers)
        weights = replace(self.weights, layers=layers)
        return Decoder(self.spec.shallow(), weights, self.rope, self.ops, self.attention)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token: [num_rows, hidden_size] from `forward` -> [num_rows, vocab_size] fp32."""
        return self.ops.linear(hidden, self.weights.lm_head).float()

    def _attention(
        self,
        w: LayerWeights,
        hidden: Any,  # the residual stream, as the operations hand it on
        cos: Tensor,
        sin: Tensor,
        batch: ForwardBatch,
        cache: KVLayer,
        window: int | None,
    ) -> Any:
        eps = self.spec.rms_norm_eps
        qkv = self.ops.norm_linear(hidden, w.attention_norm, eps, w.qkv)  # [num_tokens, q_size + 2 * kv_size]
        q = self.ops.qk_norm_rope_store(qkv, cos, sin, batch.slots, cache, w.q_norm, w.k_norm, eps)
        context = self.attention.forward(q, cache, batch, scale=self._scale, window=window)
        return self.ops.linear_add(context.flatten(1), w.o, hidden)

    def _mlp(self, w: LayerWeights, hidden: Any) -> Any:
        inner = self.ops.norm_linear_swiglu(hidden, w.mlp_norm, self.spec.rms_norm_eps, w.gate_up)
        return self.ops.linear_add(inner, w.down, hidden)  # [num_tokens, hidden_size]


def allocate_layer(spec: DecoderSpec, dtype: torch.dtype, device: torch.device) -> LayerWeights:
    """Uninitialised tensors of one block."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def linear(out_features: int, in_features: int, bias: bool) -> LinearWeight:
        return LinearWeight(empty(out_features, in_features), empty(out_features) if bias else None)

    hidden = spec.hidden_size
    return LayerWeights(
        attention_norm=empty(hidden),
        qkv=linear(spec.q_size + 2 * spec.kv_size, hidden, spec.qkv_bias),
        q_norm=empty(spec.head_dim) if spec.qk_norm else None,
        k_norm=empty(spec.head_dim) if spec.qk_norm else None,
        o=linear(hidden, spec.q_size, spec.o_bias),
        mlp_norm=empty(hidden),
        gate_up=linear(2 * spec.intermediate_size, hidden, spec.mlp_bias),
        down=linear(hidden, spec.intermediate_size, spec.mlp_bias),
    )
