"""Every operation in plain torch: the fallback where no kernel exists and the oracle that kernels are tested against.

Rounding to the model's dtype happens where transformers' Llama family rounds: after the normalisation and before its
weight, after each product of the rotation, after a projection and before the residual is added.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvik.kernels.api import KVLayer, LinearWeight

__all__ = ["ReferenceOps", "dequantize_kv", "quantize_kv"]


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
        kv: KVLayer,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> Tensor:
        num_kv_heads, block_size, head_dim = kv.k.shape[1:]
        heads = qkv.view(qkv.shape[0], -1, head_dim)  # [num_tokens, num_heads + 2 * num_kv_heads, head_dim]
        num_heads = heads.shape[1] - 2 * num_kv_heads
        q, k, v = torch.split_with_sizes(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        if q_norm is not None:
            q = self.rms_norm(q, q_norm, eps)
        if k_norm is not None:
            k = self.rms_norm(k, k_norm, eps)
        block, offset = slots // block_size, slots % block_size
        for new, cache, scales in ((_rotate(k, cos, sin), kv.k, kv.k_scale), (v, kv.v, kv.v_scale)):
            if scales is None:
                cache[block, :, offset] = new.to(cache.dtype)
            else:
                cache[block, :, offset], scales[block, :, offset] = quantize_kv(new)
        return _rotate(q, cos, sin)

    def linear_add(self, x: Tensor, w: LinearWeight, residual: Tensor) -> Tensor:
        return residual + self.linear(x, w)

    def norm_linear_swiglu(self, x: Tensor, norm_weight: Tensor, eps: float, w: LinearWeight) -> Tensor:
        gate, up = self.norm_linear(x, norm_weight, eps, w).chunk(2, dim=-1)
        return F.silu(gate) * up


def quantize_kv(x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys or values [..., head_dim] -> (int8 [..., head_dim], scales fp32 [...]), as `KVLayer` has them."""
    wide = x.float()
    most = wide.abs().amax(-1)
    inverse = torch.where(most > 1e-30, torch.full_like(most, 127.0) / most, 0.0)  # 127.0 / most rounds twice
    return torch.round(wide * inverse.unsqueeze(-1)).to(torch.int8), most / 127


def dequantize_kv(cached: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Keys or values out of a cache, [..., head_dim], with `scales` [...] if they are int8: in `dtype`."""
    return (cached if scales is None else cached.float() * scales.unsqueeze(-1)).to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [num_tokens, heads, head_dim] in the half-split form (https://arxiv.org/abs/2104.09864)."""
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)  # [num_tokens, 1, head_dim / 2]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
