"""Every operation in plain torch: the fallback where no kernel exists and the oracle that kernels are tested against.

Rounding to the model's dtype happens where transformers' Llama family rounds: after the normalisation and before its
weight, after each product of the rotation, after a projection and before the residual is added.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvik.kernels.api import LinearWeight

__all__ = ["ReferenceOps"]


class ReferenceOps:
    """`kvik.kernels.api.Ops` in torch, for any device and any floating dtype."""

    def embedding(self, input_ids: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(input_ids, weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * normed.to(x.dtype)

    def linear(self, x: Tensor, w: LinearWeight) -> Tensor:
        return F.linear(x, w.weight, w.bias)

    def norm_linear(self, x: Tensor, norm_weight: Tensor, eps: float, w: LinearWeight) -> Tensor:
        return self.linear(self.rms_norm(x, norm_weight, eps), w)

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
        num_kv_heads, block_size, head_dim = k_cache.shape[1:]
        heads = qkv.view(qkv.shape[0], -1, head_dim)  # [num_tokens, num_heads + 2 * num_kv_heads, head_dim]
        num_heads = heads.shape[1] - 2 * num_kv_heads
        q, k, v = torch.split_with_sizes(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        if q_norm is not None:
            q = self.rms_norm(q, q_norm, eps)
        if k_norm is not None:
            k = self.rms_norm(k, k_norm, eps)
        block, offset = slots // block_size, slots % block_size
        k_cache[block, :, offset] = _rotate(k, cos, sin).to(k_cache.dtype)
        v_cache[block, :, offset] = v.to(v_cache.dtype)
        return _rotate(q, cos, sin)

    def linear_add(self, x: Tensor, w: LinearWeight, residual: Tensor) -> Tensor:
        return residual + self.linear(x, w)

    def norm_linear_swiglu(self, x: Tensor, norm_weight: Tensor, eps: float, w: LinearWeight) -> Tensor:
        gate, up = self.norm_linear(x, norm_weight, eps, w).chunk(2, dim=-1)
        return F.silu(gate) * up


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [num_tokens, heads, head_dim] in the half-split form (https://arxiv.org/abs/2104.09864)."""
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)  # [num_tokens, 1, head_dim / 2]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
