"""Device memory of the paged KV cache, allocated once. Which block belongs to whom is the scheduler's business."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

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
            KVLayer(_zeros(shape, dtype, device), _zeros(shape, dtype, device)) for _ in range(spec.num_layers)
        )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On the CPU they cost memory only once they are written: numpy takes zeroed pages from the system."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
