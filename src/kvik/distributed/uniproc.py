"""The executor for one device: the worker lives in this process, plans cost no copy and no message."""

from __future__ import annotations

from collections import deque

from kvik.core.plan import StepPlan, StepResult
from kvik.errors import WorkerError
from kvik.runtime.model_runner import ModelRunner

__all__ = ["UniprocExecutor"]


class UniprocExecutor:
    """Runs each plan in `submit`; `collect` hands out the results in order."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner: ModelRunner | None = runner
        self._results: deque[StepResult] = deque()

    def submit(self, plan: StepPlan) -> None:
        if self._runner is None:
            raise WorkerError("the engine is closed; make a new one")
        self._results.append(self._runner.execute(plan))

    def collect(self) -> StepResult:
        return self._results.popleft()

    def reset(self) -> None:
        self._results.clear()

    def close(self) -> None:
        self._results.clear()
        self._runner = None
