"""Attention written to be obviously right: the oracle of every other backend, and the fallback where there is none.

One sequence at a time, its blocks gathered into a contiguous context, one full fp32 score matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvik.attention.base import ForwardBatch
from kvik.kernels.api import KVLayer
from kvik.kernels.reference import dequantize_kv

__all__ = ["ReferenceAttention", "gather_context"]


class ReferenceAttention:
    """`AttentionBackend` in plain torch, for any device."""

    def forward(self, q: Tensor, kv: KVLayer, batch: ForwardBatch, *, scale: float, window: int | None) -> Tensor:
        out = torch.empty_like(q)
        for i, seq_len in enumerate(batch.seq_lens_host):
            start, end = batch.query_starts_host[i : i + 2]
            if start < end:
                k = gather_context(kv.k, kv.k_scale, batch.block_tables[i], seq_len)
                v = gather_context(kv.v, kv.v_scale, batch.block_tables[i], seq_len)
                out[start:end] = _attend(q[start:end], k, v, scale, window)
        return out


def gather_context(cache: Tensor, scales: Tensor | None, block_table: Tensor, seq_len: int) -> Tensor:
    """The first `seq_len` keys or values of a sequence: [seq_len, num_kv_heads, head_dim] fp32 from its blocks."""
    num_kv_heads, block_size, head_dim = cache.shape[1:]
    num_blocks = -(-seq_len // block_size)
    ids = block_table[:num_blocks].long()
    # [num_blocks, num_kv_heads, block_size, head_dim]
    blocks = dequantize_kv(cache[ids], None if scales is None else scales[ids], torch.float32)
    return blocks.transpose(1, 2).reshape(-1, num_kv_heads, head_dim)[:seq_len]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    num_queries, group = q.shape[0], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale  # [num_heads, num_queries, seq_len]
    keys = torch.arange(k.shape[0], device=q.device)
    queries = keys[-num_queries:, None]
    visible = keys <= queries
    if window is not None:
        visible &= keys > queries - window
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
