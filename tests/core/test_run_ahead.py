"""Run-ahead: steps planned before results are known change when things are computed, never what comes out."""

from __future__ import annotations

from collections import Counter

import pytest
from core_harness import World, make_config, make_request

from kvik.core.request import Request
from kvik.distributed.mock import mock_token
from kvik.outputs import FinishReason

PROMPT = (1, 2, 3)


def _tokens(count: int) -> list[int]:
    """What follows PROMPT."""
    tokens = list(PROMPT)
    for _ in range(count):
        tokens.append(mock_token(tokens, 0, 50))
    return tokens[len(PROMPT) :]


def _stopping_after(count: int, max_tokens: int = 20) -> Request:
    """A request that stops with its `count`th token."""
    tokens = _tokens(count)
    assert tokens[-1] not in tokens[:-1]
    return make_request("a", PROMPT, max_tokens, stop_token_ids=(tokens[-1],))


def _num_sampled(world: World) -> int:
    plans = world.executor.plans
    return sum(len(plan.decodes) + sum(chunk.sample for chunk in plan.chunks) for plan in plans)


@pytest.mark.parametrize("run_ahead", [0, 1, 2, 3])
def test_run_ahead_many_plans_are_submitted_before_the_first_result_is_taken(run_ahead: int) -> None:
    world = World(make_config(run_ahead=run_ahead), lag=True)
    world.add(make_request("a", PROMPT, 20))
    world.step()
    assert len(world.executor.plans) == run_ahead + 1
    assert len(world.scheduler._in_flight) == run_ahead
    world.step()
    assert len(world.executor.plans) == run_ahead + 2
    world.run()


@pytest.mark.parametrize("run_ahead", [0, 1, 2])
@pytest.mark.parametrize("max_tokens", [1, 2, 5])
def test_a_length_stop_computes_no_surplus_step(run_ahead: int, max_tokens: int) -> None:
    world = World(make_config(run_ahead=run_ahead), lag=True)
    world.add(make_request("a", PROMPT, max_tokens))
    world.run()
    assert _num_sampled(world) == max_tokens == len(world.executor.plans)


@pytest.mark.parametrize("run_ahead", [0, 1, 2])
@pytest.mark.parametrize("lag", [False, True])
def test_a_stop_token_is_found_run_ahead_steps_late_and_the_surplus_is_dropped(run_ahead: int, lag: bool) -> None:
    world = World(make_config(run_ahead=run_ahead), lag=lag)
    world.add(_stopping_after(4))
    world.run()
    assert world.tokens("a") == tuple(_tokens(4))
    assert world.terminal("a").finish_reason is FinishReason.STOP
    assert world.terminal("a").stop_token_id == _tokens(4)[-1]
    assert _num_sampled(world) == 4 + run_ahead


def test_no_surplus_is_planned_beyond_the_length_limit_even_when_a_stop_token_comes_near_it() -> None:
    world = World(make_config(run_ahead=2), lag=True)
    world.add(_stopping_after(4, max_tokens=5))
    world.run()
    assert _num_sampled(world) == 5


def test_a_stop_token_as_the_last_allowed_token_is_a_stop() -> None:
    world = World(make_config(run_ahead=1), lag=True)
    world.add(_stopping_after(4, max_tokens=4))
    world.run()
    assert world.terminal("a").finish_reason is FinishReason.STOP


def test_row_and_blocks_of_an_ended_sequence_are_reused_only_after_the_last_step_that_uses_them() -> None:
    world = World(make_config(run_ahead=1, max_num_seqs=1), lag=True)
    world.add(make_request("a", range(6), 20, seed=1))
    world.add(make_request("b", range(50, 56), 2, seed=2))
    world.step()
    assert len(world.scheduler._in_flight) == 1
    world.finish("a", FinishReason.ABORT)
    assert world.scheduler.num_running == 0
    assert world.scheduler.kv.num_used == 2, "a step in flight may still write these"
    assert world.scheduler.schedule() is None, "the only row is still in use"
    world.step()
    assert world.scheduler.kv.num_used == 0
    world.step()
    assert world.executor.plans[-2].joined[0].seed == 2
    world.run()


def test_without_a_step_in_flight_row_and_blocks_are_free_at_once() -> None:
    world = World(make_config(run_ahead=0, max_num_seqs=1))
    world.add(make_request("a", range(6), 20))
    world.step()
    world.finish("a", FinishReason.ABORT)
    assert world.scheduler.kv.num_used == 0
    assert world.scheduler._free_rows == [0]
    world.run()


def test_a_sequence_waits_for_blocks_in_flight_rather_than_preempting_everybody() -> None:
    """Needing one block, it preempts one; that one's blocks come back a step later, and nobody else has to go."""
    world = World(make_config(run_ahead=1, num_blocks=8, max_num_seqs=4, max_model_len=25), lag=True)
    for i in range(4):
        world.add(make_request(f"r{i}", [i] * 4, 16, seed=i))
    preempted = Counter[int]()
    while not preempted:
        world.step()
        preempted = Counter(seq.seed for seq in world.scheduler._resuming)
    assert preempted == {3: 1}
    world.run()


@pytest.mark.parametrize("run_ahead", [1, 2])
def test_abort_discards_tokens_in_flight(run_ahead: int) -> None:
    world = World(make_config(run_ahead=run_ahead), lag=True)
    world.add(make_request("a", PROMPT, 20))
    world.step()
    world.step()
    world.finish("a", FinishReason.ABORT)
    world.run()
    assert world.tokens("a") == tuple(_tokens(2))


def test_tokens_of_steps_in_flight_are_not_counted_as_output_and_not_committed() -> None:
    world = World(make_config(run_ahead=2, block_size=4), lag=True)
    world.add(make_request("a", PROMPT, 20))
    world.step()
    (seq,) = world.scheduler.running
    assert (seq.num_output_tokens, seq.num_in_flight, seq.num_tokens) == (1, 2, 6)
    assert len(world.scheduler.kv.cache) == 0, "position 3 was planned but its step has not completed"
    world.step()
    assert len(world.scheduler.kv.cache) == 1
    world.run()


def test_results_out_of_order_are_caught() -> None:
    world = World(make_config(run_ahead=1), lag=True)
    world.add(make_request("a", PROMPT, 20))
    world.engine._submit()
    world.engine._submit()
    world.executor.collect()
    with pytest.raises(AssertionError, match="order"):
        world.scheduler.update(world.executor.collect())


@pytest.mark.parametrize("budget", [4, 7, 64])
@pytest.mark.parametrize("caching", [False, True])
def test_run_ahead_lag_chunks_and_caching_change_no_output(budget: int, caching: bool) -> None:
    outputs = []
    for run_ahead in (0, 1, 2):
        for lag in (False, True):
            config = make_config(run_ahead=run_ahead, max_num_batched_tokens=budget, enable_prefix_caching=caching)
            world = World(config, lag=lag)
            for i in range(6):
                world.add(make_request(f"r{i}", [1, 2, 3, 4, 5, 6, 7, 8, i % 2], 6 + i, n=2, eos=(3, 4, 5)))
            world.run()
            outputs.append({key: tuple(track.tokens) for key, track in world.tracks.items()})
    assert all(output == outputs[0] for output in outputs)
