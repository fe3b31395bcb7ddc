"""Reference-counted KV block ids with a free list in least-recently-used order.

Ids only: the memory behind them belongs to the runtime's KVPool. Owned by KVManager.
"""

from __future__ import annotations

from collections import OrderedDict

__all__ = ["BlockPool"]


class BlockPool:
    """Block ids 0 .. num_blocks - 1. A block is free when nobody holds a reference to it."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def ref_count(self, block_id: int) -> int:
        return self._refs[block_id]

    def take(self) -> int:
        """The least recently used free block, now held once. The caller checked `num_free`."""
        block_id, _ = self._free.popitem(last=False)
        self._refs[block_id] = 1
        return block_id

    def share(self, block_id: int) -> None:
        """One more holder of a block, which may be free (a cached block that is used again)."""
        if self._refs[block_id] == 0:
            del self._free[block_id]
        self._refs[block_id] += 1

    def release(self, block_id: int, *, reusable: bool) -> None:
        """One holder less. A block that becomes free is taken last if its content is `reusable`, first if not."""
        assert self._refs[block_id] > 0, f"block {block_id} released more often than taken"
        self._refs[block_id] -= 1
        if self._refs[block_id] == 0:
            self._free[block_id] = None
            if not reusable:
                self._free.move_to_end(block_id, last=False)

    def check_invariants(self) -> None:
        """A block is in the free list if and only if nobody holds it."""
        assert all(count >= 0 for count in self._refs)
        assert {i for i, count in enumerate(self._refs) if count == 0} == set(self._free)
