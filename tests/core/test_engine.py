"""Engine: the loop's contract, timings of requests, and what it counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from core_harness import FakeClock, GuardedExecutor, World, make_config, make_request

from kvik.core.engine import Engine
from kvik.core.scheduler import Scheduler
from kvik.metrics import EngineStats, StepStats
from kvik.outputs import FinishReason, RequestMetrics
from kvik.tracing import Tracer


def _step_stats(**changes: float) -> StepStats:
    options = {
        "step_id": 0,
        "num_prefill_tokens": 0,
        "num_decode_tokens": 0,
        "num_sequences": 0,
        "num_running": 0,
        "num_waiting": 0,
        "num_blocks_used": 0,
        "num_blocks": 8,
        "schedule_time": 1.0,
        "execute_time": 10.0,
        "update_time": 100.0,
    }
    return StepStats(**{**options, **changes})


def _metrics_at(start: float) -> RequestMetrics:
    """Arrives at `start`, waits 2 s behind another, first token after 5 s, then one every 0.5 s."""
    clock = FakeClock(start)
    world = World(make_config(max_num_seqs=1), clock=clock)
    world.add(make_request("before", [1], 1, arrival_time=start))
    world.add(make_request("a", [2], 4, arrival_time=start))
    world.step()
    clock.now = start + 2.0
    world.engine._submit()
    clock.now = start + 5.0
    world.step()
    for _ in range(3):
        clock.now += 0.5
        world.step()
    metrics = world.terminal("a").metrics
    assert metrics is not None
    return metrics


@pytest.mark.parametrize("start", [0.0, 1000.0])
def test_metrics_are_the_times_that_a_clock_shows(start: float) -> None:
    assert _metrics_at(start) == RequestMetrics(
        queue_time=2.0, time_to_first_token=5.0, time_per_output_token=0.5, total_time=6.5, num_preemptions=0
    )


def test_the_time_of_the_first_token_stands_even_when_the_clock_shows_zero_then() -> None:
    clock = FakeClock(-1.0)
    world = World(make_config(), clock=clock)
    world.add(make_request("a", [1], 2, arrival_time=-1.0))
    clock.now = 0.0
    world.step()
    clock.now = 3.0
    world.step()
    metrics = world.terminal("a").metrics
    assert metrics is not None and metrics.time_to_first_token == 1.0


def test_preemption_changes_neither_queue_time_nor_time_to_first_token_and_is_counted() -> None:
    clock = FakeClock(10.0)
    world = World(make_config(), clock=clock)
    world.add(make_request("a", [1], 3, arrival_time=9.0))
    clock.now = 12.0
    world.step()
    world.preempt(world.scheduler.running[0])
    clock.now = 20.0
    world.step()
    world.step()
    metrics = world.terminal("a").metrics
    assert metrics is not None
    assert (metrics.queue_time, metrics.time_to_first_token, metrics.num_preemptions) == (3.0, 3.0, 1)


def test_one_token_has_no_time_per_output_token() -> None:
    world = World(make_config())
    world.add(make_request("a", [1], 1))
    world.run()
    metrics = world.terminal("a").metrics
    assert metrics is not None and metrics.time_per_output_token is None


def test_step_stats_count_prompt_and_decode_tokens_sequences_and_blocks() -> None:
    world = World(make_config(max_num_batched_tokens=8, max_num_seqs=2, num_blocks=32))
    world.add(make_request("a", [1] * 5, 9))
    world.step()
    world.add(make_request("b", [2] * 9, 9))
    world.add(make_request("c", [3] * 9, 9))
    world.step()
    last = world.engine.stats.last
    assert last is not None
    assert (last.step_id, last.num_prefill_tokens, last.num_decode_tokens) == (1, 7, 1)
    assert (last.num_sequences, last.num_running, last.num_waiting) == (2, 2, 1)
    assert (last.num_blocks_used, last.num_blocks) == (2 + 3, 32)
    world.run()


def test_engine_stats_add_up_to_the_tokens_of_all_plans() -> None:
    world = World(make_config(max_num_batched_tokens=6, run_ahead=1), lag=True)
    for i in range(4):
        world.add(make_request(f"r{i}", [i] * (5 + i), 6))
    world.run()
    stats, plans = world.engine.stats, world.executor.plans
    decodes = sum(plan.num_decodes for plan in plans)
    assert stats.num_steps == len(plans)
    assert stats.num_decode_tokens == decodes
    assert stats.num_prefill_tokens + stats.num_decode_tokens == sum(plan.num_tokens for plan in plans)
    assert stats.last is not None and stats.last.num_blocks_used == 0


def test_time_of_a_step_with_any_prompt_tokens_is_prefill_time() -> None:
    stats = EngineStats()
    stats.add(_step_stats(num_prefill_tokens=1, num_decode_tokens=5))
    stats.add(_step_stats(num_decode_tokens=5, execute_time=20.0))
    assert (stats.prefill_time, stats.decode_time, stats.host_time) == (111.0, 121.0, 202.0)
    assert (stats.num_steps, stats.num_prefill_tokens, stats.num_decode_tokens) == (2, 1, 10)


def test_host_times_are_not_negative() -> None:
    world = World(make_config(run_ahead=2), lag=True)
    world.add(make_request("a", [1] * 5, 9))
    while world.engine.has_unfinished():
        world.step()
        last = world.engine.stats.last
        assert last is not None and min(last.schedule_time, last.execute_time, last.update_time) >= 0.0


def test_a_step_of_an_idle_engine_gives_nothing_and_counts_nothing() -> None:
    world = World(make_config())
    assert world.engine.step() == []
    assert world.engine.stats == EngineStats()
    assert not world.engine.has_unfinished()


def test_an_output_that_waits_for_delivery_counts_as_unfinished() -> None:
    world = World(make_config())
    world.add(make_request("a", [1], 9))
    world.finish("a", FinishReason.ABORT)
    assert world.engine.has_unfinished()
    world.step()
    assert not world.engine.has_unfinished()


def test_close_may_be_called_twice() -> None:
    world = World(make_config())
    world.engine.close()
    world.engine.close()


def test_a_traced_engine_writes_schedule_and_update_ranges_and_its_counters(tmp_path: Path) -> None:
    tracer, config = Tracer(), make_config()
    engine = Engine(Scheduler(config), GuardedExecutor(config.block_size), tracer)
    engine.add(make_request("a", [1] * 5, 3))
    while engine.has_unfinished():
        engine.step()
    tracer.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    ranges = [event["name"] for event in events if event["ph"] == "X"]
    assert ranges.count("update") == 3 and ranges.count("schedule") >= 3
    counters = [event for event in events if event["ph"] == "C"]
    assert {event["name"] for event in counters} == {"tokens", "kv blocks", "sequences"}
    tokens = [event["args"] for event in counters if event["name"] == "tokens"]
    assert tokens == [{"prefill": 5, "decode": 0}, {"prefill": 0, "decode": 1}, {"prefill": 0, "decode": 1}]
