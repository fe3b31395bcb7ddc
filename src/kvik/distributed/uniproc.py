"""The executor for one device: the worker lives in this process, plans cost no copy and no message."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from kvik.core.plan import StepPlan, StepResult
from kvik.errors import WorkerError
from kvik.tracing import NO_TRACE, NoTrace

__all__ = ["Runner", "UniprocExecutor"]


class Runner(Protocol):
    """Executes plans in order on one device."""

    def start(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Start a step, or compute it where the device is this processor; what is returned waits for its result."""

    def get_ready(self) -> bool:
        """See `Executor`."""

    def reset(self) -> None:
        """Wait for whatever still runs."""


class UniprocExecutor:
    """Starts each plan in `submit`; `collect` hands out the results in order."""

    def __init__(
        self, runner: Runner, tracer: NoTrace = NO_TRACE, release: Callable[[], object] = lambda: None
    ) -> None:
        """`release` is called at the end, when the runner is gone."""
        self._runner: Runner | None = runner
        self._release = release
        self._tracer = tracer
        self._results: deque[Callable[[], StepResult]] = deque()

    def submit(self, plan: StepPlan) -> None:
        if self._runner is None:
            raise WorkerError("the engine is closed; make a new one")
        self._results.append(self._runner.start(plan))

    def collect(self) -> StepResult:
        with self._tracer.span("collect"):
            return self._results.popleft()()

    def get_ready(self) -> bool:
        return self._runner is not None and self._runner.get_ready()

    def reset(self) -> None:
        self._results.clear()
        if self._runner is not None:
            self._runner.reset()

    def close(self) -> None:
        self._results.clear()
        self._runner = None
        self._release()
