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
def _copy(addresses: tl.tensor, pairs: tl.tensor, words: tl.tensor, stride: tl.tensor, BLOCK: tl.constexpr) -> None:
    base = tl.load(addresses + tl.program_id(0)).to(tl.pointer_type(tl.int32))
    source = tl.load(pairs + 2 * tl.program_id(1)).to(tl.int64)
    target = tl.load(pairs + 2 * tl.program_id(1) + 1).to(tl.int64)
    word = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    held = (word < words) & (source >= 0)
    tl.store(base + target * stride + word, tl.load(base + source * stride + word, mask=held), mask=held)


class BlockCopier:
    """Holds the addresses of the caches, which must outlive it unmoved."""

    def __init__(self, caches: Sequence[Tensor]) -> None:
        """caches: [num_blocks, ...] each, of one shape, with contiguous blocks that may lie apart."""
        first = caches[0]
        assert all(cache[0].is_contiguous() and cache.stride() == first.stride() for cache in caches)
        self._words, self._stride = (n * first.element_size() // 4 for n in (first[0].numel(), first.stride(0)))
        assert first[0].numel() * first.element_size() % 4 == first.stride(0) * first.element_size() % 4 == 0
        self._addresses = torch.tensor([cache.data_ptr() for cache in caches], device=caches[0].device)

    def copy(self, pairs: Tensor) -> None:
        """pairs: [num_pairs, 2] int32 of (source, target); a negative source is padding. No target may be a source."""
        grid = (self._addresses.shape[0], pairs.shape[0], triton.cdiv(self._words, WORDS))
        _copy[grid](self._addresses, pairs, self._words, self._stride, BLOCK=WORDS, num_warps=4)
