"""Which sequence holds which KV blocks. The one owner of block ids, reference counts and the prefix cache.

    tokens      0 ........ b ........ 2b ........ 3b .. n
    blocks      [ full, cached ][ full, cached ][ full  ][ partial ]
                 shared with others, read only     private, written

A block becomes findable by others only through `commit`, once its tokens are confirmed and the step that computed them
has completed; a partial block is never shared, so no block that others can see is ever written.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvik.core.block_pool import BlockPool
from kvik.core.prefix_cache import CachedBlock, PrefixCache
from kvik.core.request import Sequence

__all__ = ["KVManager"]


class KVManager:
    """Grants, shares, commits and frees the KV blocks of sequences."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.pool = BlockPool(num_blocks)
        self.cache = PrefixCache()
        self._matching: Sequence | None = None  # the sequence of the last match, which is what waits for room
        self._matched: list[CachedBlock] = []
        self._places: dict[int, int] = {}  # of the matched blocks, by their ids

    @property
    def num_blocks(self) -> int:
        return self.pool.num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that can be granted now, cached ones that nobody uses included."""
        return self.pool.num_free

    @property
    def num_used(self) -> int:
        return self.pool.num_blocks - self.pool.num_free

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, seq: Sequence) -> list[CachedBlock]:
        """Cached blocks of the longest known prefix; always leaves at least the last token to compute.

        The next call for the same sequence goes on where this one ended: a step in which it still waits looks up one
        block, not its whole prompt.
        """
        if self._matching is not seq:
            self.unmatch()
            self._matching = seq
        found = self._matched
        last = (len(seq.token_ids) - 1) // self.block_size if self.enable_prefix_caching else 0
        while len(found) < last:
            parent = found[-1].prefix_id if found else seq.request.cache_salt
            block = self.cache.find(parent, self._tokens(seq, len(found)))
            if block is None:
                break
            self._places[block.block_id] = len(found)
            found.append(block)
        return list(found)

    def unmatch(self, place: int = 0) -> None:
        """Forget what the last `match` found, from `place` on."""
        for block in self._matched[place:]:
            del self._places[block.block_id]
        del self._matched[place:]
        if not place:
            self._matching = None

    def admit(self, seq: Sequence, cached: list[CachedBlock], headroom: int) -> bool:
        """Give a sequence without blocks its `cached` blocks and new ones for all its tokens.

        False, and nothing changes, unless `headroom` blocks stay free.
        """
        assert not seq.block_ids
        num_new = self.blocks_for(len(seq.token_ids)) - len(cached)
        room = self.pool.num_free - headroom - num_new
        if room < 0 or room < sum(1 for block in cached if self.pool.ref_count(block.block_id) == 0):
            return False
        for block in cached:
            self.pool.share(block.block_id)
        seq.block_ids = [block.block_id for block in cached] + [self._take() for _ in range(num_new)]
        seq.prefix_ids = [block.prefix_id for block in cached]
        self.unmatch()
        return True

    def grow(self, seq: Sequence, num_tokens: int) -> tuple[int, ...] | None:
        """Extend a sequence's blocks to hold `num_tokens`: the new ids, or None (nothing changed) if too few."""
        num_new = self.blocks_for(num_tokens) - len(seq.block_ids)
        if num_new <= 0:
            return ()
        if num_new > self.pool.num_free:
            return None
        new = tuple(self._take() for _ in range(num_new))
        seq.block_ids.extend(new)
        return new

    def commit(self, seq: Sequence, num_tokens: int) -> None:
        """Make the sequence's blocks that are full within its first `num_tokens` findable by other sequences."""
        if not self.enable_prefix_caching:
            return
        for index in range(len(seq.prefix_ids), num_tokens // self.block_size):
            parent = seq.prefix_ids[-1] if seq.prefix_ids else seq.request.cache_salt
            seq.prefix_ids.append(self.cache.insert(seq.block_ids[index], parent, self._tokens(seq, index)))

    def free(self, block_ids: Iterable[int]) -> None:
        """Let go of a sequence's blocks, its last one first, so that long prefixes are evicted from their end."""
        for block_id in reversed(tuple(block_ids)):
            self.pool.release(block_id, reusable=block_id in self.cache)

    def check_invariants(self, sequences: Iterable[Sequence], unreturned: Iterable[int] = ()) -> None:
        """References are exactly those of `sequences` and of `unreturned` blocks that await the end of a step."""
        self.pool.check_invariants()
        self.cache.check_invariants()
        for index, block in enumerate(self._matched):
            assert self._matching is not None and self._places[block.block_id] == index
            parent = self._matched[index - 1].prefix_id if index else self._matching.request.cache_salt
            assert self.cache.find(parent, self._tokens(self._matching, index)) == block, "a matched block is gone"
        counts = [0] * self.num_blocks
        for block_id in unreturned:
            counts[block_id] += 1
        for seq in sequences:
            assert len(set(seq.block_ids)) == len(seq.block_ids), "a sequence holds a block twice"
            for block_id in seq.block_ids:
                counts[block_id] += 1
        assert counts == [self.pool.ref_count(i) for i in range(self.num_blocks)], "reference counts are wrong"
        assert all(count <= 1 or i in self.cache for i, count in enumerate(counts)), "a private block has two holders"

    def _take(self) -> int:
        block_id = self.pool.take()
        self.cache.evict(block_id)
        if block_id in self._places:
            self.unmatch(self._places[block_id])
        return block_id

    def _tokens(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])
