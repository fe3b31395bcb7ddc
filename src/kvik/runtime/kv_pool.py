"""Device memory of the paged KV cache, allocated once. Which block belongs to whom is the scheduler's business."""

from __future__ import annotations

import torch

from kvik.attention.base import KVLayer
from kvik.models.spec import DecoderSpec

__all__ = ["KVPool"]


class KVPool:
    """Keys and values of every layer: per layer two tensors [num_blocks, num_kv_heads, block_size, head_dim].

    Starts as zeros: a position that was never written is masked out of attention, and must not hold a NaN there.
    """

    def __init__(
        self, spec: DecoderSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (num_blocks, spec.num_kv_heads, block_size, spec.head_dim)
        self.block_size = block_size
        self.layers = tuple(
            KVLayer(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in range(spec.num_layers)
        )
