"""The engine's diary for whoever watches (`GET /debug/events`): one JSON record per step, nothing when nobody does.

    {"type": "snapshot", "at", "block_size", "num_blocks", "max_num_seqs", "max_num_batched_tokens",
     "sequences": [[id, index, num_prompt_tokens, num_tokens, num_cached, [block, ...]], ...], "waiting": [...]}
    {"type": "step", "at", "step", "chunks": [[id, index, start, num_tokens, kind], ...],
     "blocks": [[id, index, [new block, ...]], ...], "left": [[id, index, why], ...], "num_waiting", "used",
     "waiting": [[id, num_prompt_tokens, seconds waited], ...], "ms": [schedule, execute, update]}
    {"type": "left", "at", "left": [...], "used"}                  requests that ended without a step

`kind` is "decode" or "prefill"; `why` is "finished" or "preempted"; `at` is Unix time. A watcher keeps the block lists
of the snapshot up to date with `blocks` and `left`: a block in two lists is a shared prefix.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable

from kvik.core.engine import Engine
from kvik.core.plan import StepPlan, StepResult
from kvik.core.request import Sequence, SequenceStatus
from kvik.distributed.executor import Executor
from kvik.metrics import StepStats

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
        self._known: dict[tuple[str, int], Sequence] = {}
        self._pending: dict[int, dict[str, object]] = {}
        self._done: list[str] = []

    @property
    def on(self) -> bool:
        return self._watched is not None

    def switch(self, on: bool) -> None:
        """Begin or stop to look."""
        if on and self._watched is None:
            self._known = {_key(seq): seq for seq in self._engine.scheduler.running}
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
        if stats is not None and stats.step_id in self._pending:
            self._complete(self._pending.pop(stats.step_id), stats)

    def take(self) -> list[str]:
        """The records that are complete by now; what left without a step has a record of its own."""
        self.complete()
        if not self._pending and (left := self._left()):
            used = self._engine.scheduler.kv.num_used
            self._done.append(_json({"type": "left", "at": _now(), "left": left, "used": used}))
        done, self._done = self._done, []
        return done

    def snapshot(self) -> str:
        """The state that the next step changes."""
        config = self._engine.scheduler.config
        running = self._engine.scheduler.running
        return _json(
            {
                "type": "snapshot",
                "at": _now(),
                "block_size": config.block_size,
                "num_blocks": config.num_blocks,
                "max_num_seqs": config.max_num_seqs,
                "max_num_batched_tokens": config.max_num_batched_tokens,
                "sequences": [
                    [*_key(seq), seq.num_prompt_tokens, len(seq.token_ids), seq.num_cached, seq.block_ids]
                    for seq in running
                ],
                "waiting": self._waiting(),
            }
        )

    def _record(self, plan: StepPlan) -> None:
        """Note a plan that is about to run: rows still have the sequences that it was made for."""
        running = {seq.row: seq for seq in self._engine.scheduler.running}
        rows = [(running[chunk.row], chunk) for chunk in plan.chunks]
        self._known.update((_key(seq), seq) for seq, _ in rows)
        self._pending[plan.step_id] = {
            "type": "step",
            "at": _now(),
            "step": plan.step_id,
            "chunks": [
                [*_key(seq), chunk.start, chunk.num_tokens, "decode" if chunk.is_decode else "prefill"]
                for seq, chunk in rows
            ],
            "blocks": [[*_key(seq), chunk.new_block_ids] for seq, chunk in rows if chunk.new_block_ids],
            "waiting": self._waiting(),
            "num_waiting": self._engine.scheduler.num_waiting,
        }

    def _complete(self, record: dict[str, object], stats: StepStats) -> None:
        record["left"] = self._left()
        times = (stats.schedule_time, stats.execute_time, stats.update_time)
        record.update(used=stats.num_blocks_used, ms=[round(seconds * 1e3, 3) for seconds in times])
        self._done.append(_json(record))

    def _left(self) -> list[list[object]]:
        """Sequences that do not run any more, told once."""
        running = {_key(seq) for seq in self._engine.scheduler.running}
        left = [(key, seq) for key, seq in self._known.items() if key not in running]
        for key, _ in left:
            del self._known[key]
        return [[*key, "preempted" if seq.status is SequenceStatus.WAITING else "finished"] for key, seq in left]

    def _waiting(self) -> list[list[object]]:
        running = {seq.request.request_id for seq in self._engine.scheduler.running}
        now, shown = time.monotonic(), list[list[object]]()
        for request_id, num_tokens, arrival in self._open_requests():
            if request_id not in running:
                shown.append([request_id, num_tokens, round(now - arrival, 3)])
                if len(shown) == MAX_WAITING_SHOWN:
                    break
        return shown


def _key(seq: Sequence) -> tuple[str, int]:
    return seq.request.request_id, seq.index


def _now() -> float:
    return round(time.time(), 4)


def _json(record: dict[str, object]) -> str:
    return json.dumps(record, separators=(",", ":"))
