"""The seam between the scheduler's half of the engine and the device's half: one protocol, plans in, results out."""

from __future__ import annotations

from typing import Protocol

from kvik.core.plan import StepPlan, StepResult

__all__ = ["Executor"]


class Executor(Protocol):
    """Runs plans in the order in which they were submitted. `collect` returns results in the same order.

    Several plans may be submitted before the first `collect`. A failure of a single row is a `RowResult.error`;
    an exception from `submit` or `collect` is a failure of the whole step, after which only `reset` and `close` are
    meaningful.
    """

    def submit(self, plan: StepPlan) -> None:
        """Start a step. Returns without waiting where the device allows it."""

    def collect(self) -> StepResult:
        """Wait for the oldest submitted step."""

    def get_ready(self) -> bool:
        """While nothing is submitted: do a piece of what later steps would wait for; False if there is none."""

    def reset(self) -> None:
        """Wait for whatever still runs and forget it; rows start over from the next plan that joins them."""

    def close(self) -> None:
        """Free what the executor holds. May be called twice."""
