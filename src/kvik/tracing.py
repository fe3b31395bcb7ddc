"""Named time ranges for `--profile FILE`: a trace in the Chrome JSON format, which Perfetto (ui.perfetto.dev) opens.

A `Tracer` is handed to whoever has something to time. `NO_TRACE` costs one method call per range and keeps nothing.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

__all__ = ["NO_TRACE", "NoTrace", "Tracer"]

_NOTHING: AbstractContextManager[None] = nullcontext()


class NoTrace:
    """A tracer that is switched off."""

    def span(self, name: str, **args: int | float | str) -> AbstractContextManager[None]:
        """A context that times its body under `name`, with `args` shown beside it."""
        return _NOTHING

    def counter(self, name: str, **values: int | float) -> None:
        """Values of a counter track at this moment."""


NO_TRACE = NoTrace()


class Tracer(NoTrace):
    """Collects events in memory; `write` saves them."""

    def __init__(self) -> None:
        self._events: list[dict[str, object]] = []
        self._start = time.perf_counter()

    def _event(self, kind: str, name: str, at: float, **more: object) -> None:
        thread = threading.get_native_id()
        self._events.append({"ph": kind, "name": name, "ts": at * 1e6, "pid": os.getpid(), "tid": thread, **more})

    @contextmanager
    def _timed(self, name: str, args: dict[str, int | float | str]) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            self._event("X", name, begin - self._start, dur=(end - begin) * 1e6, args=args)

    def span(self, name: str, **args: int | float | str) -> AbstractContextManager[None]:
        return self._timed(name, args)

    def counter(self, name: str, **values: int | float) -> None:
        self._event("C", name, time.perf_counter() - self._start, args=values)

    def write(self, path: Path) -> None:
        """Save the trace. Raises OSError where the file cannot be written."""
        path.write_text(json.dumps({"traceEvents": self._events, "displayTimeUnit": "ms"}))
