"""Signatures and shapes of the operations that a decoder block is made of.

`Ops` is what the decoder calls; `reference.ReferenceOps` is the plain torch implementation, which is both what runs
where no kernel exists and what every kernel is tested against. The boundaries of the operations are chosen so that a
kernel can fuse what shares a pass over memory. Operations never keep state: everything they need is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

__all__ = ["LinearWeight", "Ops"]


@dataclass(frozen=True, slots=True, eq=False)
class LinearWeight:
    """A projection: `weight` [out_features, in_features] and, where the model has one, `bias` [out_features]."""

    weight: Tensor
    bias: Tensor | None = None


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
        k_cache: Tensor,
        v_cache: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> Tensor:
        """Rotate q and k, write k and v to the paged cache, return q.

        qkv       [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], query heads first, then key, then value heads
        cos, sin  [num_tokens, head_dim / 2] fp32; element i rotates the pair (i, i + head_dim / 2)
        slots     [num_tokens] int64, block_id * block_size + offset: where the token's key and value go
        k_cache   [num_blocks, num_kv_heads, block_size, head_dim], written in place; v_cache likewise
        q_norm    [head_dim] weight of a per-head RMSNorm before the rotation, or None; k_norm likewise

        Returns q [num_tokens, num_heads, head_dim].
        """

    def linear_add(self, x: Tensor, w: LinearWeight, residual: Tensor) -> Tensor:
        """residual + linear(x, w): [num_tokens, in_features] -> [num_tokens, hidden_size]."""

    def norm_linear_swiglu(self, x: Tensor, norm_weight: Tensor, eps: float, w: LinearWeight) -> Tensor:
        """silu(gate) * up, where [gate | up] = norm_linear(x, norm_weight, eps, w) -> [num_tokens, intermediate_size].

        `w.weight` [2 * intermediate_size, hidden_size]: the gate rows first, then the up rows.
        """
