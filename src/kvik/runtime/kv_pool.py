"""Device memory of the paged KV cache, allocated once. Which block belongs to whom is the scheduler's business.

All layers of a block lie side by side, so that a short prompt touches little memory, wherever its blocks are:

    blocks    | block 0: layer 0 keys, layer 0 values, layer 1 keys, ... | block 1: layer 0 keys, ... | ...
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from kvik.kernels.api import KVLayer
from kvik.kernels.memory import zeros
from kvik.models.spec import DecoderSpec

__all__ = ["KVPool"]


class KVPool:
    """Keys and values of every layer, of `dtype`, for `num_blocks` blocks. Empty, it holds zeros.

    blocks  [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim], keys before values
    scales  [num_blocks, num_layers, 2, num_kv_heads, block_size] fp32 of an int8 cache, else None
    layers  views of them, one `KVLayer` each
    """

    def __init__(
        self, spec: DecoderSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (num_blocks, spec.num_layers, 2, spec.num_kv_heads, block_size, spec.head_dim)
        self.block_size = block_size
        self.blocks = zeros(shape, dtype, device)
        self.scales = zeros(shape[:-1], torch.float32, device) if dtype is torch.int8 else None
        self.layers = tuple(
            KVLayer(*_halves(self.blocks, i), *(_halves(self.scales, i) if self.scales is not None else ()))
            for i in range(spec.num_layers)
        )

    def shallow(self, num_layers: int) -> KVPool:
        """The same memory, of which a model of so few layers knows the first."""
        pool = copy.copy(self)
        pool.layers = self.layers[:num_layers]
        return pool


def _halves(tensor: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """What belongs to the keys of a layer, and what to its values."""
    return tensor[:, layer, 0], tensor[:, layer, 1]
