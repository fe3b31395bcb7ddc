"""Outputs of one request on their way to a reader. Bounded: what was not read yet is merged into one output."""

from __future__ import annotations

import dataclasses

from kvik.outputs import RequestOutput

__all__ = ["Mailbox"]


class Mailbox:
    """Holds at most one output: the newest state, with the text that is new since the last `take`."""

    def __init__(self) -> None:
        self._output: RequestOutput | None = None

    def put(self, output: RequestOutput) -> bool:
        """Add an output; whether it was empty. Outputs are cumulative: only the deltas of an unread one are kept."""
        was_empty = self._output is None
        if self._output is not None:
            deltas = tuple(old + new for old, new in zip(self._output.deltas, output.deltas, strict=True))
            output = dataclasses.replace(output, deltas=deltas)
        self._output = output
        return was_empty

    def take(self) -> RequestOutput | None:
        """What came since the last call, or None."""
        output, self._output = self._output, None
        return output
