"""Which KV block holds which tokens: content of full blocks, found by the prefix they end. Owned by KVManager.

    salt "" --[5 9 2 2]--> prefix 0 --[7 1 1 3]--> prefix 1 --[4 4 8 0]--> prefix 3
                                    --[6 6 2 9]--> prefix 2

Each cached block ends one prefix, which has an id of its own that is never used again. The key of a block is the id of
the prefix before it (for a first block, the salt) and its tokens. The hash table compares keys, so a hit is always the
same tokens after the same prefix: there is no hash whose collision could return another prompt's KV.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

__all__ = ["CachedBlock", "PrefixCache"]

_Key = tuple[int | str, tuple[int, ...]]


class CachedBlock(NamedTuple):
    """A block and the id of the prefix that ends with it."""

    block_id: int
    prefix_id: int


class PrefixCache:
    """A two-way map between (previous prefix, tokens) and block ids, at most one block per key."""

    def __init__(self) -> None:
        self._blocks: dict[_Key, CachedBlock] = {}
        self._keys: dict[int, _Key] = {}
        self._prefix_ids = itertools.count()

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._keys

    def find(self, parent: int | str, tokens: tuple[int, ...]) -> CachedBlock | None:
        """The block that holds `tokens` after the prefix `parent`, or None."""
        return self._blocks.get((parent, tokens))

    def insert(self, block_id: int, parent: int | str, tokens: tuple[int, ...]) -> int:
        """Make a block findable and return the id of its prefix. If another block has the key already, it stays."""
        key = (parent, tokens)
        found = self._blocks.get(key)
        if found is None:
            found = self._blocks[key] = CachedBlock(block_id, next(self._prefix_ids))
            self._keys[block_id] = key
        return found.prefix_id

    def evict(self, block_id: int) -> None:
        """Forget a block whose memory is about to be written. A no-op for a block that is not cached."""
        key = self._keys.pop(block_id, None)
        if key is not None:
            del self._blocks[key]

    def check_invariants(self) -> None:
        """Both maps are inverses of each other."""
        assert {block.block_id: key for key, block in self._blocks.items()} == self._keys
