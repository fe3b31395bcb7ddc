"""The loop: schedule -> execute -> update -> emit. Joins a Scheduler and an Executor, in token ids only."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from kvik.core.pace import Pace
from kvik.core.plan import StepPlan
from kvik.core.request import Request
from kvik.core.scheduler import Scheduler
from kvik.distributed.executor import Executor
from kvik.metrics import EngineStats, StepStats
from kvik.outputs import FinishReason, SequenceOutput
from kvik.tracing import NO_TRACE, NoTrace

__all__ = ["Engine"]


@dataclass(slots=True)
class _Submitted:
    """A step on the device: when it was handed over, and what planning it and handing it over took, in seconds."""

    plan: StepPlan
    at: float
    schedule_time: float
    submit_time: float


class Engine:
    """Runs requests to their ends. Not thread-safe: one thread calls it."""

    def __init__(self, scheduler: Scheduler, executor: Executor, tracer: NoTrace = NO_TRACE) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.stats = EngineStats()
        self._tracer = tracer
        self._submitted: deque[_Submitted] = deque()
        self._pace = Pace()
        self._begun = 0.0  # when the device began with the oldest of them
        self._held_from = 0.0  # when the next step could have been planned, if it was not; else 0

    def step(self) -> list[SequenceOutput]:
        """Advance every running sequence by one step and return what is new, terminal outputs included."""
        held = time.perf_counter() - self._held_from if self._held_from else 0.0
        self._held_from = 0.0
        while len(self._submitted) <= self.scheduler.config.run_ahead and self._submit():
            pass
        if self._submitted:
            self._collect(held)
        while self._submitted and not (self.scheduler.num_running or self.scheduler.num_waiting):
            self._collect()  # a step for sequences that have ended meanwhile; it still holds their blocks
        return self.drain()

    def slack(self) -> float:
        """Seconds that `step` may wait for more requests: until then the device has work. 0 without running ahead."""
        if not self._submitted or len(self._submitted) > self.scheduler.config.run_ahead:
            return 0.0
        now = time.perf_counter()
        slack = self._pace.slack(self._submitted[0].plan, now - self._begun)
        if slack > 0 and not self._held_from:
            self._held_from = now
        return slack

    def drain(self) -> list[SequenceOutput]:
        """Outputs that came without a step, such as the ends of requests that were finished from outside."""
        return self.scheduler.drain()

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError for one that could never run."""
        self.scheduler.add(request)

    def finish(self, request_id: str, reason: FinishReason, index: int | None = None) -> None:
        """End a request or one completion of it; its terminal output comes with the next step."""
        self.scheduler.finish(request_id, reason, index)

    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished()

    def get_ready(self) -> bool:
        """Do a piece of what later steps would wait for, if nothing else is to be done; whether there was any."""
        return not self.has_unfinished() and not self._submitted and self.executor.get_ready()

    def reset(self) -> None:
        """Abort everything, also after an exception (Ctrl-C, say) left a step unfinished."""
        self.executor.reset()
        self._submitted.clear()
        self._held_from = 0.0
        self.scheduler.abandon()

    def close(self) -> None:
        self.executor.close()

    def _submit(self) -> bool:
        """Plan and start one step; False when there is nothing to compute now."""
        begin = time.perf_counter()
        with self._tracer.span("schedule"):
            plan = self.scheduler.schedule()
        if plan is None:
            return False
        planned = time.perf_counter()
        self.executor.submit(plan)
        now = time.perf_counter()
        if not self._submitted:
            self._begun = now
        self._submitted.append(_Submitted(plan, now, planned - begin, now - planned))
        return True

    def _collect(self, held: float = 0.0) -> None:
        """Wait for the oldest step and take in its result. `held`: seconds that the caller has waited for it before."""
        begin = time.perf_counter()
        result = self.executor.collect()
        step, collected = self._submitted.popleft(), time.perf_counter()
        if step.at < self._begun:  # before the device was done with the step before
            self._pace.add(step.plan, collected - self._begun, collected - begin)
        self._begun = collected
        with self._tracer.span("update"):
            self.scheduler.update(result)
        execute_time = step.submit_time + held + collected - begin
        self._record(step.plan, step.schedule_time, execute_time, time.perf_counter() - collected)

    def _record(self, plan: StepPlan, schedule_time: float, execute_time: float, update_time: float) -> None:
        num_decode = plan.num_decodes
        kv = self.scheduler.kv
        step = StepStats(
            step_id=plan.step_id,
            num_prefill_tokens=plan.num_tokens - num_decode,
            num_decode_tokens=num_decode,
            num_sequences=len(plan.decodes) + len(plan.chunks),
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_blocks_used=kv.num_used,
            num_blocks=kv.num_blocks,
            schedule_time=schedule_time,
            execute_time=execute_time,
            update_time=update_time,
        )
        self.stats.add(step)
        self._tracer.counter("tokens", prefill=step.num_prefill_tokens, decode=step.num_decode_tokens)
        self._tracer.counter("kv blocks", used=step.num_blocks_used)
        self._tracer.counter("sequences", running=step.num_running, waiting=step.num_waiting)
