"""What the engine measures of itself: one record per step and the totals since start. Plain numbers, no I/O."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EngineStats", "StepStats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """One step: tokens computed, sequences, KV blocks in use after it, and seconds of host time by phase."""

    step_id: int
    num_prefill_tokens: int
    num_decode_tokens: int
    num_sequences: int
    num_running: int
    num_waiting: int
    num_blocks_used: int
    num_blocks: int
    schedule_time: float
    execute_time: float
    update_time: float

    @property
    def total_time(self) -> float:
        return self.schedule_time + self.execute_time + self.update_time


@dataclass(slots=True)
class EngineStats:
    """Totals since start. A step counts as prefill time when it computed any prompt tokens."""

    num_steps: int = 0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    prefill_time: float = 0.0
    decode_time: float = 0.0
    host_time: float = 0.0
    last: StepStats | None = None

    def add(self, step: StepStats) -> None:
        self.num_steps += 1
        self.num_prefill_tokens += step.num_prefill_tokens
        self.num_decode_tokens += step.num_decode_tokens
        self.host_time += step.schedule_time + step.update_time
        if step.num_prefill_tokens:
            self.prefill_time += step.total_time
        else:
            self.decode_time += step.total_time
        self.last = step
