"""n > 1: the completions of a request share the KV of their prompt, and each ends on its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from core_harness import ScriptedExecutor, World, make_config, make_request

from kvik.core.plan import Chunk, RowResult, StepPlan
from kvik.errors import RequestError
from kvik.outputs import FinishReason


def test_completions_use_consecutive_seeds_and_differ() -> None:
    world = World(make_config())
    world.add(make_request("a", range(5), 6, seed=7, n=3))
    world.run()
    seeds = [init.seed for plan in world.executor.plans for init in plan.joined]
    assert seeds == [7, 8, 9]
    assert len({world.tokens("a", i) for i in range(3)}) == 3


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 13])
def test_followers_share_the_full_blocks_of_the_prompt_and_compute_only_the_rest(length: int) -> None:
    world = World(make_config())
    world.add(make_request("a", range(length), 6, n=3))
    world.step()
    world.step()
    num_shared = (length - 1) // 4
    first, second, third = world.scheduler.running
    assert first.block_ids[:num_shared] == second.block_ids[:num_shared] == third.block_ids[:num_shared]
    private = [set(seq.block_ids[num_shared:]) for seq in (first, second, third)]
    assert not private[0] & private[1] and not private[1] & private[2] and not private[0] & private[2]
    assert all(world.scheduler.kv.pool.ref_count(block_id) == 3 for block_id in first.block_ids[:num_shared])
    world.run()
    assert [world.terminal("a", i).num_cached_tokens for i in range(3)] == [0, num_shared * 4, num_shared * 4]


def test_followers_wait_for_the_whole_prompt_of_a_chunked_leader() -> None:
    world = World(make_config(max_num_batched_tokens=5))
    world.add(make_request("a", range(18), 6, n=2))
    for _ in range(4):
        assert world.scheduler.num_running <= 1
        world.step()
    assert len(world.tokens("a")) == 1
    world.step()
    assert world.scheduler.num_running == 2
    world.run()


def test_without_prefix_caching_all_completions_start_at_once() -> None:
    world = World(make_config(enable_prefix_caching=False))
    world.add(make_request("a", range(5), 6, n=3))
    world.step()
    assert world.scheduler.num_running == 3
    world.run()


def test_more_completions_than_rows_all_finish() -> None:
    world = World(make_config(max_num_seqs=2))
    world.add(make_request("a", range(5), 6, n=9))
    assert world.scheduler.num_waiting == 9
    world.run()
    assert len({world.tokens("a", i) for i in range(9)}) == 9


def test_followers_keep_the_place_of_their_arrival() -> None:
    world = World(make_config(max_num_seqs=1))
    world.add(make_request("a", [1], 2, n=3, seed=0))
    world.add(make_request("b", [2], 2, seed=10))
    world.run()
    assert [init.seed for plan in world.executor.plans for init in plan.joined][:1] == [0]
    starts = [init.seed for plan in world.executor.plans for init in plan.joined]
    assert starts.index(1) < starts.index(10) and starts.index(2) < starts.index(10)


def _abort_leader(world: World) -> None:
    world.finish("a", FinishReason.ABORT, index=0)


def _preempt_leader(world: World) -> None:
    if world.scheduler.running:
        world.preempt(world.scheduler.running[0])


def _preempt_then_abort(world: World) -> None:
    _preempt_leader(world)
    _abort_leader(world)


def _abort_a_follower(world: World) -> None:
    world.finish("a", FinishReason.ABORT, index=1)


@pytest.mark.parametrize("disturb", [_abort_leader, _preempt_leader, _preempt_then_abort, _abort_a_follower])
@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("run_ahead", [0, 1])
def test_followers_finish_whatever_happens_to_the_leader_and_whenever(
    disturb: Callable[[World], None], steps: int, run_ahead: int
) -> None:
    world = World(make_config(max_num_batched_tokens=5, run_ahead=run_ahead), lag=True)
    world.add(make_request("a", range(14), 4, n=3))
    for _ in range(steps):
        world.step()
    disturb(world)
    world.run()
    assert len(world.tokens("a", 2)) == 4


@pytest.mark.parametrize("failing_chunk", [0, 1, 2])
def test_followers_finish_when_the_row_of_the_leader_fails(failing_chunk: int) -> None:
    calls = iter(range(100))

    def fail(plan: StepPlan, chunk: Chunk, row: RowResult) -> RowResult:
        return RowResult(row.row, error="no") if next(calls) == failing_chunk else row

    world = World(make_config(max_num_batched_tokens=5), executor=ScriptedExecutor(4, fail))
    world.engine.add(make_request("a", range(14), 4, n=3))
    reasons = {}
    for _ in range(30):
        outputs = world.engine.step()
        reasons |= {o.index: o.finish_reason for o in outputs if o.finish_reason is not None}
    assert reasons == {0: FinishReason.ERROR, 1: FinishReason.LENGTH, 2: FinishReason.LENGTH}
    assert not world.engine.has_unfinished()


def test_aborting_a_request_ends_every_completion_of_it_once() -> None:
    world = World(make_config())
    world.add(make_request("a", range(5), 6, n=4))
    world.step()
    world.finish("a", FinishReason.ABORT)
    outputs = world.step()
    assert sorted(output.index for output in outputs) == [0, 1, 2, 3]
    assert {output.finish_reason for output in outputs} == {FinishReason.ABORT}
    world.check_end()


def test_a_rejected_request_leaves_no_followers() -> None:
    world = World(make_config())
    with pytest.raises(RequestError):
        world.engine.add(make_request("a", [1] * 100, n=4))
    world.check_end()


def test_prompt_logprobs_make_only_the_leader_compute_the_prompt_in_full() -> None:
    world = World(make_config())
    world.add(make_request("warm", range(9), 1))
    world.run()
    world.add(make_request("a", range(9), 2, n=2, prompt_logprobs=0))
    world.run()
    assert [world.terminal("a", i).num_cached_tokens for i in range(2)] == [0, 8]
