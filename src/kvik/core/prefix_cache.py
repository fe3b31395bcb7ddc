"""Which KV block holds which tokens: content of full blocks, addressed by a chained hash. Owned by KVManager.

The key of a block hashes its tokens and the key of the block before it, so that equal keys mean equal prefixes. A hit
is confirmed by comparing tokens and parent key, so a hash collision can never return another prompt's KV.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b
from typing import NamedTuple

__all__ = ["PrefixCache", "block_key", "root_key"]


def root_key(salt: str) -> bytes:
    """Parent key of a first block. Sequences with different salts never share blocks."""
    return b"root:" + salt.encode()


def block_key(parent: bytes, tokens: tuple[int, ...]) -> bytes:
    """16-byte key of a full block: blake2b over the parent's key and the token ids."""
    return blake2b(array("q", tokens).tobytes(), digest_size=16, key=blake2b(parent, digest_size=16).digest()).digest()


class _Entry(NamedTuple):
    key: bytes
    parent: bytes
    tokens: tuple[int, ...]


class PrefixCache:
    """A two-way map between block keys and block ids, at most one block per key."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._entry_of: dict[int, _Entry] = {}

    def __len__(self) -> int:
        return len(self._block_of)

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._entry_of

    def find(self, key: bytes, parent: bytes, tokens: tuple[int, ...]) -> int | None:
        """The block that holds `tokens` after the prefix `parent`, or None."""
        block_id = self._block_of.get(key)
        if block_id is None or self._entry_of[block_id] != (key, parent, tokens):
            return None
        return block_id

    def insert(self, block_id: int, key: bytes, parent: bytes, tokens: tuple[int, ...]) -> None:
        """Make a block findable. A no-op when another block already has the key: the first one wins."""
        if key not in self._block_of and block_id not in self._entry_of:
            self._block_of[key] = block_id
            self._entry_of[block_id] = _Entry(key, parent, tokens)

    def evict(self, block_id: int) -> None:
        """Forget a block whose memory is about to be written. A no-op for a block that is not cached."""
        entry = self._entry_of.pop(block_id, None)
        if entry is not None:
            del self._block_of[entry.key]

    def check_invariants(self) -> None:
        """Both maps are inverses of each other."""
        assert {entry.key: block_id for block_id, entry in self._entry_of.items()} == self._block_of
