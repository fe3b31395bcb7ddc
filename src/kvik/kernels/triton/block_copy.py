"""Copies KV blocks within the cache, in all layers by one launch: cache[dst] = cache[src] for each pair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["BlockCopier"]

WORDS = 2048  # int32 words copied per program


@triton.jit
def _copy(addresses: tl.tensor, pairs: tl.tensor, words: tl.tensor, BLOCK: tl.constexpr) -> None:
    base = tl.load(addresses + tl.program_id(0)).to(tl.pointer_type(tl.int32))
    source = tl.load(pairs + 2 * tl.program_id(1)).to(tl.int64)
    target = tl.load(pairs + 2 * tl.program_id(1) + 1).to(tl.int64)
    word = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    held = (word < words) & (source >= 0)
    tl.store(base + target * words + word, tl.load(base + source * words + word, mask=held), mask=held)


class BlockCopier:
    """Holds the addresses of the caches, which must outlive it unmoved."""

    def __init__(self, caches: Sequence[Tensor]) -> None:
        """caches: the keys and the values of every layer, each [num_blocks, num_kv_heads, block_size, head_dim]."""
        shape = caches[0].shape
        assert all(cache.is_contiguous() and cache.shape == shape for cache in caches)
        block_bytes = caches[0][0].numel() * caches[0].element_size()
        assert block_bytes % 4 == 0
        self._words = block_bytes // 4
        self._addresses = torch.tensor([cache.data_ptr() for cache in caches], device=caches[0].device)

    def copy(self, pairs: Tensor) -> None:
        """pairs: [num_pairs, 2] int32 of (source, target); a negative source is padding. No target may be a source."""
        grid = (self._addresses.shape[0], pairs.shape[0], triton.cdiv(self._words, WORDS))
        _copy[grid](self._addresses, pairs, self._words, BLOCK=WORDS, num_warps=4)
