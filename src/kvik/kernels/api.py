"""Signatures and shapes of the operations that a decoder block is made of.

`Ops` is what the decoder calls; `reference.ReferenceOps` is the plain torch implementation, which is both what runs
where no kernel exists and what every kernel is tested against. The boundaries of the operations are chosen so that a
kernel can fuse what shares a pass over memory. Operations never keep state: everything they need is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvik.kernels.memory import zeros

__all__ = ["KVLayer", "LinearWeight", "Ops"]


@dataclass(frozen=True, slots=True, eq=False)
class LinearWeight:
    """A projection: `weight` [out_features, in_features] and, where the model has one, `bias` [out_features]."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class KVLayer:
    """The cache of one layer: `k` and `v`, each [num_blocks, num_kv_heads, block_size, head_dim].

    An int8 cache holds round(x / scale) with scale = max |x| / 127 of each token and head: `k_scale` and `v_scale`
    [num_blocks, num_kv_heads, block_size] fp32. A float cache has none.

    A block is contiguous. From one block to the next there may be more, such as other layers: `stride(0)` is the same
    for k and v, and as many tokens and heads for the scales.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @classmethod
    def zeros(cls, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> KVLayer:
        """An empty cache. A position that was never written is masked out of attention, and must not hold a NaN."""
        k, v = (zeros(shape, dtype, device) for _ in "kv")
        if dtype is not torch.int8:
            return cls(k, v)
        return cls(k, v, *(zeros(shape[:3], torch.float32, device) for _ in "kv"))


class Ops(Protocol):
    """One implementation of every operation of the decoder.

    Activations are [num_tokens, features] in the model's dtype. Norms and accumulations are fp32 inside; results
    are rounded to the model's dtype at the same places as in transformers, so that outputs agree.
    """

    def embedding(self, input_ids: Tensor, weight: Tensor) -> Tensor:
        """Rows of `weight` [vocab_size, hidden_size] at `input_ids` [num_tokens] -> [num_tokens, hidden_size]."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension -> the shape of `x`. `weight` [x.shape[-1]]."""

    def linear(self, x: Tensor, w: LinearWeight) -> Tensor:
        """x @ weight.T + bias: [num_tokens, in_features] -> [num_tokens, out_features]."""

    def norm_linear(self, x: Tensor, norm_weight: Tensor, eps: float, w: LinearWeight) -> Tensor:
        """linear(rms_norm(x, norm_weight, eps), w): [num_tokens, hidden_size] -> [num_tokens, out_features]."""

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
        """Rotate q and k, write k and v to the paged cache, return q.

        qkv       [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], query heads first, then key, then value heads
        cos, sin  [num_tokens, head_dim / 2] fp32; element i rotates the pair (i, i + head_dim / 2)
        slots     [num_tokens] int64, block_id * block_size + offset: where the token's key and value go
        kv        the layer's cache, written in place
        q_norm    [head_dim] weight of a per-head RMSNorm before the rotation, or None; k_norm likewise

        Returns q [num_tokens, num_heads, head_dim].
        """

    def linear_add(self, x: Tensor, w: LinearWeight, residual: Tensor) -> Tensor:
        """residual + linear(x, w): [num_tokens, in_features] -> [num_tokens, hidden_size].

        `residual` [num_tokens, hidden_size] may be overwritten, with the result or with anything.
        """

    def norm_linear_swiglu(self, x: Tensor, norm_weight: Tensor, eps: float, w: LinearWeight) -> Tensor:
        """silu(gate) * up, where [gate | up] = norm_linear(x, norm_weight, eps, w) -> [num_tokens, intermediate_size].

        `w.weight` [2 * intermediate_size, hidden_size]: the gate rows first, then the up rows.
        """
