"""In which order sequences come: policies are static sort keys (smallest first), queues are lists kept in that order.

Ageing is built in: a key grows with the order of arrival, so a sequence is overtaken by a bounded number of later ones
and nothing starves.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator

from kvik.core.request import Sequence

__all__ = ["POLICIES", "PRIORITY_STEP", "SJF_TOKENS_PER_PLACE", "SequenceQueue"]

PRIORITY_STEP = 256
"""One step of priority is worth this many places in the queue."""

SJF_TOKENS_PER_PLACE = 16
"""Under sjf, a sequence may be overtaken by one later arrival for each of this many tokens that it is longer."""


def _fcfs(seq: Sequence) -> int:
    return seq.order


def _priority(seq: Sequence) -> int:
    return seq.order + seq.request.priority * PRIORITY_STEP


def _sjf(seq: Sequence) -> int:
    return seq.order + seq.max_total_tokens // SJF_TOKENS_PER_PLACE


POLICIES: dict[str, Callable[[Sequence], int]] = {"fcfs": _fcfs, "priority": _priority, "sjf": _sjf}


class SequenceQueue:
    """Sequences in the order of a policy, arrival order within equal keys."""

    def __init__(self, policy: str) -> None:
        self._key = POLICIES[policy]
        self._items: list[tuple[int, int, Sequence]] = []
        self._sequences: tuple[Sequence, ...] | None = ()

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self.sequences)

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """All of them: the same object for as long as nothing is added or removed."""
        if self._sequences is None:
            self._sequences = tuple([item[2] for item in self._items])
        return self._sequences

    @property
    def first(self) -> Sequence:
        return self._items[0][2]

    @property
    def last(self) -> Sequence:
        return self._items[-1][2]

    def begins_before(self, seq: Sequence) -> bool:
        """Whether there is one that comes before `seq`, which need not be in this queue."""
        return bool(self._items) and self._items[0][:2] < (self._key(seq), seq.order)

    def add(self, seq: Sequence) -> None:
        bisect.insort(self._items, (self._key(seq), seq.order, seq))
        self._sequences = None

    def remove(self, seq: Sequence) -> None:
        found = self.discard(seq)
        assert found, "the sequence is not in this queue"

    def discard(self, seq: Sequence) -> bool:
        """Remove a sequence if it is there; whether it was."""
        index = bisect.bisect_left(self._items, (self._key(seq), seq.order))
        found = index < len(self._items) and self._items[index][2] is seq
        if found:
            del self._items[index]
            self._sequences = None
        return found
