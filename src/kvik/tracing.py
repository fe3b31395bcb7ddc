"""Named time ranges for `--profile FILE`: a trace in the Chrome JSON format, which Perfetto (ui.perfetto.dev) opens.

A `Tracer` is handed to whoever has something to time. `NO_TRACE` costs one method call per range and keeps nothing.
Where there is an NVIDIA GPU, ranges are NVTX ranges as well, so that Nsight Systems shows them above the kernels.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

__all__ = ["NO_TRACE", "NoTrace", "TracedCalls", "Tracer"]

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
    """Collects events in memory; `write` saves them. `mark` makes a context that shows a range to another profiler."""

    def __init__(self, mark: Callable[[str], AbstractContextManager[object]] | None = None) -> None:
        self._mark = mark or (lambda name: _NOTHING)
        self._events: list[dict[str, object]] = []
        self._start = time.perf_counter()

    def _event(self, kind: str, name: str, at: float, **more: object) -> None:
        thread = threading.get_native_id()
        self._events.append({"ph": kind, "name": name, "ts": at * 1e6, "pid": os.getpid(), "tid": thread, **more})

    @contextmanager
    def _timed(self, name: str, args: dict[str, int | float | str]) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            with self._mark(name):
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


class TracedCalls:
    """`inner`, with every call of a method as a range of `tracer`; `names` has ranges that are not named as methods."""

    def __init__(self, inner: object, tracer: NoTrace, names: Mapping[str, str] | None = None) -> None:
        self._inner, self._tracer, self._names = inner, tracer, names or {}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def call(*args: Any, **options: Any) -> Any:
            with self._tracer.span(self._names.get(name, name)):
                return found(*args, **options)

        return call
