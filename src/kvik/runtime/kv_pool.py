"""Device memory of the paged KV cache, allocated once. Which block belongs to whom is the scheduler's business."""

from __future__ import annotations

import torch

from kvik.kernels.api import KVLayer
from kvik.models.spec import DecoderSpec

__all__ = ["KVPool"]


class KVPool:
    """Keys and values of every layer, of `dtype`, for `num_blocks` blocks. Empty, it holds zeros."""

    def __init__(
        self, spec: DecoderSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (num_blocks, spec.num_kv_heads, block_size, spec.head_dim)
        self.block_size = block_size
        self.layers = tuple(KVLayer.zeros(shape, dtype, device) for _ in range(spec.num_layers))
