"""The engine's diary for whoever watches (`GET /debug/events`): one JSON record per step, nothing when nobody does.

    {"type": "snapshot", "at", "step", "block_size", "num_blocks", "max_num_seqs", "max_num_batched_tokens",
     "sequences": [[row, id, index, num_prompt_tokens, num_tokens, num_cached, [block, ...]], ...], "used", "waiting"}
    {"type": "step", "at", "step", "left": [[row, why], ...], "joined": [[row, id, index, num_prompt_tokens,
     num_cached], ...], "blocks": [[row, [new block, ...]], ...], "decode": [row, ...], "prefill": [[row, start,
     num_tokens], ...], "used", "num_waiting", "waiting": [[id, num_prompt_tokens, seconds], ...],
     "ms": [schedule, execute, update]}
    {"type": "left", "at", "left": [[row, why], ...], "used"}       sequences that ended with nothing after them

A snapshot comes first, and holds all steps up to its `step`: records that still come of those, which were in flight,
say nothing new. A row is a sequence's number while it runs. `why` is "finished" or "preempted", `at` is Unix time. A
watcher applies `left`, then `joined`, then `blocks`, ignoring rows that it does not know, and has every block list; a
block in two lists is a shared prefix.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from kvik.core.engine import Engine
from kvik.core.plan import StepPlan, StepResult
from kvik.core.request import Sequence, SequenceStatus
from kvik.distributed.executor import Executor

__all__ = ["MAX_WAITING_SHOWN", "EventFeed", "Waiting"]

MAX_WAITING_SHOWN = 64

Waiting = Iterable[tuple[str, int, float]]
"""Open requests in their order of arrival: id, prompt tokens, time of arrival."""


class _WatchedExecutor:
    """An executor whose plans somebody reads."""

    def __init__(self, inner: Executor, on_plan: Callable[[StepPlan], None]) -> None:
        self.inner = inner
        self._on_plan = on_plan

    def submit(self, plan: StepPlan) -> None:
        self._on_plan(plan)
        self.inner.submit(plan)

    def collect(self) -> StepResult:
        return self.inner.collect()

    def get_ready(self) -> bool:
        return self.inner.get_ready()

    def reset(self) -> None:
        self.inner.reset()

    def close(self) -> None:
        self.inner.close()


class EventFeed:
    """Makes the records. While it is on, it stands between the engine and its executor; while off, it is not there."""

    def __init__(self, engine: Engine, open_requests: Callable[[], Waiting]) -> None:
        self._engine = engine
        self._open_requests = open_requests
        self._watched: _WatchedExecutor | None = None
        self._rows: dict[int, Sequence] = {}
        self._pending: dict[int, dict[str, Any]] = {}
        self._done: list[str] = []

    @property
    def on(self) -> bool:
        return self._watched is not None

    def switch(self, on: bool) -> None:
        """Begin or stop to look."""
        if on and self._watched is None:
            self._rows = {seq.row: seq for seq in self._engine.scheduler.running}
            self._watched = _WatchedExecutor(self._engine.executor, self._record)
            self._engine.executor = self._watched
        elif not on and self._watched is not None:
            self._engine.executor = self._watched.inner
            self._watched = None
            self._pending.clear()
            self._done.clear()

    def complete(self) -> None:
        """Add to the record of the step that just ended how long it took. To be called after every step."""
        stats = self._engine.stats.last
        record = None if stats is None else self._pending.pop(stats.step_id, None)
        if stats is not None and record is not None:
            times = (stats.schedule_time, stats.execute_time, stats.update_time)
            record["ms"] = [round(seconds * 1e3, 3) for seconds in times]
            self._done.append(_json(record))

    def take(self) -> list[str]:
        """The records that are complete by now."""
        self.complete()
        if not self._pending and (left := self._left()):
            used = self._engine.scheduler.kv.num_used
            self._done.append(_json({"type": "left", "at": _now(), "left": left, "used": used}))
        done, self._done = self._done, []
        return done

    def snapshot(self) -> str:
        """The state that the next records change."""
        scheduler = self._engine.scheduler
        return _json(
            {
                "type": "snapshot",
                "at": _now(),
                "step": scheduler.last_step_id,
                "block_size": scheduler.config.block_size,
                "num_blocks": scheduler.config.num_blocks,
                "max_num_seqs": scheduler.config.max_num_seqs,
                "max_num_batched_tokens": scheduler.config.max_num_batched_tokens,
                "sequences": [
                    [*_introduce(seq), len(seq.token_ids), seq.num_cached, seq.block_ids] for seq in scheduler.running
                ],
                "used": scheduler.kv.num_used,
                "waiting": self._waiting(),
            }
        )

    def _record(self, plan: StepPlan) -> None:
        """Note a plan that is about to run. This runs once per step: a pass over the chunks is all that it may cost."""
        unchanged = not plan.joined and len(self._rows) == self._engine.scheduler.num_running
        left = [] if unchanged else self._left()
        joined = [init.row for init in plan.joined]
        if joined:
            running = {seq.row: seq for seq in self._engine.scheduler.running}
            self._rows.update((row, running[row]) for row in joined)
        scheduler = self._engine.scheduler
        decode, prefill = plan.decodes, list[tuple[int, int, int]]()
        for chunk in plan.chunks:
            if chunk.is_decode:
                decode += (chunk.row,)
            else:
                prefill.append((chunk.row, chunk.start, chunk.num_tokens))
        self._pending[plan.step_id] = {
            "type": "step",
            "at": _now(),
            "step": plan.step_id,
            "left": left,
            "joined": [[*_introduce(self._rows[row]), self._rows[row].num_cached] for row in joined],
            "blocks": plan.new_blocks,
            "decode": decode,
            "prefill": prefill,
            "used": scheduler.kv.num_used,
            "num_waiting": scheduler.num_waiting,
            "waiting": self._waiting() if scheduler.num_waiting else [],
        }

    def _left(self) -> list[list[object]]:
        """Rows whose sequences do not run any more, told once."""
        rows = [row for row, seq in self._rows.items() if seq.row != row]
        left = [(row, self._rows.pop(row).status) for row in rows]
        return [[row, "preempted" if status is SequenceStatus.WAITING else "finished"] for row, status in left]

    def _waiting(self) -> list[list[object]]:
        running = {seq.request.request_id for seq in self._engine.scheduler.running}
        now, shown = time.monotonic(), list[list[object]]()
        for request_id, num_tokens, arrival in self._open_requests():
            if request_id not in running:
                shown.append([request_id, num_tokens, round(now - arrival, 3)])
                if len(shown) == MAX_WAITING_SHOWN:
                    break
        return shown


def _introduce(seq: Sequence) -> tuple[int, str, int, int]:
    return seq.row, seq.request.request_id, seq.index, seq.num_prompt_tokens


def _now() -> float:
    return round(time.time(), 4)


def _json(record: dict[str, Any]) -> str:
    return msgspec.json.encode(record).decode()
