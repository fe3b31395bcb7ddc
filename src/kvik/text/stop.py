"""Stop strings over text that arrives in pieces.

`StopStrings` is an Aho-Corasick automaton over the stop strings of a request, built once; a `StopMatcher` runs it over
the text of one completion. Time is linear in the text. Text is held back only while it could still become a stop
string, and the result does not depend on how the text is cut into pieces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

__all__ = ["StopMatcher", "StopStrings"]


class StopStrings:
    """The automaton (Aho and Corasick, 1975). State 0 is the root; a state stands for a prefix of some stop string.

    next      per state: character -> state, trie edges only
    fallback  per state: the state of the longest proper suffix that is also such a prefix
    depth     per state: length of its prefix, which is how much text it holds back
    match     per state: the longest stop string that ends here, or None
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.next: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.match: list[str | None] = [None]
        for stop in stops:
            assert stop, "an empty stop string would match everywhere"
            self._insert(stop)
        self.fallback = [0] * len(self.next)
        self._link()

    def _insert(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self.next[state]:
                self.next[state][char] = len(self.next)
                self.next.append({})
                self.depth.append(self.depth[state] + 1)
                self.match.append(None)
            state = self.next[state][char]
        self.match[state] = stop

    def _link(self) -> None:
        queue = deque(self.next[0].values())
        while queue:
            state = queue.popleft()
            # A stop string that ends in a suffix of this state ends here too; a longer one was stored already.
            self.match[state] = self.match[state] or self.match[self.fallback[state]]
            for char, child in self.next[state].items():
                self.fallback[child] = self.step(self.fallback[state], char)
                queue.append(child)

    def step(self, state: int, char: str) -> int:
        """The state after reading `char`: the longest suffix of the text that begins a stop string."""
        while char not in self.next[state]:
            if state == 0:
                return 0
            state = self.fallback[state]
        return self.next[state][char]


class StopMatcher:
    """Looks for stop strings in one text. The match that ends first wins, the longest of those that end together."""

    __slots__ = ("_held", "_include", "_state", "_stops", "matched")

    def __init__(self, stops: StopStrings, *, include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._state = 0
        self._held = ""
        self.matched: str | None = None

    def feed(self, piece: str, *, armed: bool = True) -> str:
        """The text that may be emitted now. After a match, kept in `matched`, nothing comes any more.

        What ends in a piece while not `armed` is no match.
        """
        if self.matched is not None or not piece:
            return ""
        state, stops = self._state, self._stops
        if state == 0 and stops.next[0].keys().isdisjoint(piece):
            return piece
        for at, char in enumerate(piece):
            state = stops.step(state, char)
            if armed and (stop := stops.match[state]) is not None:
                return self._match(self._held + piece[: at + 1], stop)
        text = self._held + piece
        self._state, split = state, len(text) - stops.depth[state]
        self._held = text[split:]
        return text[:split]

    def _match(self, text: str, stop: str) -> str:
        self.matched, self._held = stop, ""
        return text if self._include else text[: len(text) - len(stop)]

    def flush(self) -> str:
        """The text held back, once no more will come."""
        text, self._held = self._held, ""
        return text
