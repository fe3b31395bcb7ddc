"""The sequences that decode: a token each in every step. Owned by the scheduler.

While the batch stays the same, a step costs a few additions per sequence: `next_check` says at which length there is
more to do, and the tuples of sequences and rows are made once and shared by all plans.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from kvik.core.policy import SequenceQueue
from kvik.core.request import Sequence

__all__ = ["DecodeBatch"]


class DecodeBatch(SequenceQueue):
    """Running sequences with exactly one token to compute, in queue order."""

    def __init__(self, policy: str, block_size: int) -> None:
        super().__init__(policy)
        self._block_size = block_size
        self._advanced: tuple[Sequence, ...] = ()
        self._rows: tuple[int, ...] = ()

    def add(self, seq: Sequence) -> None:
        super().add(seq)
        self.set_check(seq)

    def set_check(self, seq: Sequence) -> None:
        """Note how far a sequence's blocks and its limit let it decode. To be called when it has got blocks."""
        seq.next_check = min(len(seq.block_ids) * self._block_size + 1, seq.max_total_tokens)

    def due(self) -> list[Sequence]:
        """Those that need a block for their next token, or have reached their limit."""
        return [seq for seq in self.sequences if seq.num_tokens >= seq.next_check]

    def advance(self, step_id: int, waiting: Seq[Sequence]) -> tuple[tuple[Sequence, ...], tuple[int, ...]]:
        """Account for a step of all but those `waiting`: who is in it, and their rows."""
        sequences = self.sequences
        if waiting:
            sequences = tuple([seq for seq in sequences if seq not in waiting])
        if sequences is not self._advanced:
            self._advanced, self._rows = sequences, tuple([seq.row for seq in sequences])
        for seq in sequences:
            seq.num_computed = num_tokens = seq.num_tokens
            seq.num_tokens = num_tokens + 1
            seq.last_step_id = step_id
        return sequences, self._rows
