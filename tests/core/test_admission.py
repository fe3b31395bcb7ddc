"""Admission and chunked prefill: who may run, what is refused, and that nobody waits behind a long prompt."""

from __future__ import annotations

import re

import pytest
from core_harness import World, make_config, make_request

from kvik.core.plan import StepPlan
from kvik.errors import RequestError
from kvik.outputs import FinishReason


def _joined(plan: StepPlan) -> list[int]:
    """Seeds of the sequences that join in a plan; tests give each request a seed of its own."""
    return [init.seed for init in plan.joined]


def _schedule(world: World) -> StepPlan:
    world.engine._submit()
    world.scheduler.check_invariants()
    return world.executor.plans[-1]


# Who may run


def test_at_most_max_num_seqs_sequences_run_and_the_next_starts_when_one_ends() -> None:
    world = World(make_config(max_num_seqs=2))
    for i in range(3):
        world.add(make_request(f"r{i}", [i], 2 + i, seed=i))
    world.step()
    assert (world.scheduler.num_running, world.scheduler.num_waiting) == (2, 1)
    assert _joined(world.executor.plans[0]) == [0, 1]
    world.step()
    world.step()
    assert _joined(world.executor.plans[-1]) == [2]
    world.run()


def test_a_sequence_is_admitted_only_if_every_running_one_can_still_get_a_block() -> None:
    world = World(make_config(num_blocks=6, block_size=4, max_model_len=20))
    world.add(make_request("a", [1] * 4, 4, seed=0))
    world.add(make_request("b", [2] * 12, 4, seed=1))  # 3 new blocks, 5 free, 1 for a: fits
    world.add(make_request("c", [3] * 4, 4, seed=2))  # 1 new block, 2 free, 2 for a and b: does not
    assert _joined(_schedule(world)) == [0, 1]
    world.engine._collect()
    assert _joined(_schedule(world)) == []


def test_one_free_block_more_admits_the_sequence_that_the_headroom_held_back() -> None:
    world = World(make_config(num_blocks=7, block_size=4, max_model_len=20))
    for i, length in enumerate((4, 12, 4)):
        world.add(make_request(f"r{i}", [i] * length, 4, seed=i))
    assert _joined(_schedule(world)) == [0, 1, 2]


def test_a_small_request_never_overtakes_one_that_does_not_fit_yet() -> None:
    world = World(make_config(num_blocks=6, max_model_len=24))
    world.add(make_request("running", [1] * 8, 8, seed=0))
    world.step()
    world.add(make_request("large", [2] * 20, 3, seed=1))
    world.add(make_request("small", [3], 1, seed=2))
    order = []
    while world.engine.has_unfinished():
        world.step()
    order = [seed for plan in world.executor.plans for seed in _joined(plan)]
    assert order == [0, 1, 2]


def test_prompts_fill_the_token_budget_and_no_step_exceeds_it() -> None:
    world = World(make_config(max_num_batched_tokens=10))
    for i in range(3):
        world.add(make_request(f"r{i}", [i] * 7, 4, seed=i))
    world.run()
    plans = world.executor.plans
    assert [plan.num_tokens for plan in plans[:2]] == [10, 10]
    assert _joined(plans[0]) == [0, 1]
    assert all(plan.num_tokens <= 10 for plan in plans)


@pytest.mark.parametrize("length", [3, 4, 5, 8, 9])
@pytest.mark.parametrize("run_ahead", [0, 1, 2])
def test_the_smallest_pool_that_could_hold_a_request_is_enough(length: int, run_ahead: int) -> None:
    max_tokens = 6
    num_blocks = -(-(length + max_tokens - 1) // 4)  # the last token is never computed
    config = make_config(num_blocks=num_blocks, run_ahead=run_ahead)
    world = World(config)
    for i in range(4):
        world.add(make_request(f"r{i}", [i] * length, max_tokens, n=2))
    world.run()
    assert all(len(track.tokens) == max_tokens for track in world.tracks.values())


def test_without_a_max_tokens_a_request_fills_the_context_to_the_last_token() -> None:
    world = World(make_config(max_model_len=17, num_blocks=4))
    world.add(make_request("a", [1] * 5, None))
    world.run()
    assert len(world.tokens("a")) == 12
    assert world.terminal("a").finish_reason is FinishReason.LENGTH


# What is refused


def test_a_request_that_needs_one_block_too_many_is_refused_with_both_numbers() -> None:
    world = World(make_config(num_blocks=3))
    assert world.add(make_request("fits", [1] * 5, 8))
    with pytest.raises(RequestError, match=r"\b4 KV blocks.*\b3\b") as caught:
        world.engine.add(make_request("too large", [1] * 6, 8))
    assert caught.value.param == "max_tokens"


def test_a_request_longer_than_the_context_is_refused_with_both_numbers_and_the_largest_max_tokens() -> None:
    world = World(make_config(max_model_len=32))
    assert world.add(make_request("fits", [1] * 20, 12))
    with pytest.raises(RequestError) as caught:
        world.engine.add(make_request("long", [1] * 20, 13))
    assert {"20", "13", "33", "32", "12"} <= set(re.findall(r"\d+", str(caught.value)))
    assert caught.value.param == "max_tokens"


@pytest.mark.parametrize("length", [32, 33, 1000])
@pytest.mark.parametrize("max_tokens", [1, None])
def test_a_prompt_that_leaves_no_room_for_a_token_is_refused_with_both_numbers(
    length: int, max_tokens: int | None
) -> None:
    world = World(make_config(max_model_len=32))
    with pytest.raises(RequestError, match=rf"\b{length} tokens.*\b32\b") as caught:
        world.engine.add(make_request("long", [1] * length, max_tokens))
    assert caught.value.param == "prompt"


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="no tokens") as caught:
        World(make_config()).engine.add(make_request("empty", []))
    assert caught.value.param == "prompt"


def test_a_refused_request_leaves_no_trace_and_its_id_is_free() -> None:
    world = World(make_config())
    with pytest.raises(RequestError):
        world.engine.add(make_request("a", [1] * 100))
    assert not world.engine.has_unfinished()
    world.check_end()
    assert world.add(make_request("a", [1]))
    world.run()


@pytest.mark.parametrize("priority", ["high", None, float("nan")], ids=str)
def test_a_priority_without_an_order_never_damages_the_queue(priority: object) -> None:
    """Whoever lets it in: either it is refused and leaves no trace, or it runs like any other."""
    world = World(make_config(policy="priority", max_num_seqs=1))
    try:
        world.engine.add(make_request("odd", [1], 2, priority=priority))  # type: ignore[arg-type]
    except (RequestError, TypeError):
        assert not world.engine.has_unfinished()
    for i in range(3):
        world.engine.add(make_request(f"r{i}", [1], 2))
    for _ in range(20):
        world.engine.step()
        world.scheduler.check_invariants()
    assert not world.engine.has_unfinished()


def test_an_id_is_refused_while_any_completion_of_its_request_is_unfinished() -> None:
    world = World(make_config())
    world.add(make_request("a", [1], 8, n=2))
    world.step()
    world.finish("a", FinishReason.ABORT, index=0)
    world.step()
    with pytest.raises(RequestError, match="'a' is in use"):
        world.engine.add(make_request("a", [2]))
    world.run()
    world.engine.add(make_request("a", [2], 1))
    assert [output.finish_reason for output in world.engine.step()] == [FinishReason.LENGTH]


def test_a_request_never_receives_the_end_of_an_earlier_one_with_the_same_id() -> None:
    """Ended from outside, then added again before its terminal output was delivered."""
    engine = World(make_config()).engine
    engine.add(make_request("a", [1], 8))
    engine.step()
    engine.finish("a", FinishReason.STOP)
    try:
        engine.add(make_request("a", [2], 8))
    except RequestError:
        return
    assert all(output.finish_reason is None for output in engine.step())


# Chunked prefill


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("budget", [4, 7, 20])
def test_a_long_prompt_never_delays_a_running_sequence(budget: int, run_ahead: int) -> None:
    """Each of the running sequences gets a token in every step while a prompt of 50 is computed beside them."""
    world = World(make_config(max_num_batched_tokens=budget, run_ahead=run_ahead))
    for i in range(3):
        world.add(make_request(f"decode {i}", [i], 60))
    for _ in range(3):
        world.step()
    world.add(make_request("long", [7] * 50, 4))
    while not world.tokens("long"):
        outputs = world.step()
        advanced = {output.request_id for output in outputs if output.new_token_ids}
        assert {f"decode {i}" for i in range(3)} <= advanced
    world.run()


@pytest.mark.parametrize("budget", [1, 7, 16, 64])
@pytest.mark.parametrize("length", [1, 6, 7, 8, 15, 16, 17, 49])
def test_chunks_cover_a_prompt_once_in_order_and_only_the_last_samples(budget: int, length: int) -> None:
    world = World(make_config(max_num_batched_tokens=budget, max_num_seqs=1))
    world.add(make_request("a", range(length), 1))
    world.run()
    chunks = [chunk for plan in world.executor.plans for chunk in plan.chunks]
    assert [chunk.start for chunk in chunks] == list(range(0, length, budget))
    assert [chunk.end for chunk in chunks] == [*range(budget, length, budget), length]
    assert [chunk.sample for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_decodes_come_first_in_a_plan_and_prompts_share_what_is_left_in_line() -> None:
    world = World(make_config(max_num_batched_tokens=10))
    world.add(make_request("decode", [1], 20))
    world.step()
    world.add(make_request("first", [2] * 20, 4))
    world.add(make_request("second", [3] * 6, 4))
    sizes = []
    for _ in range(5):
        world.step()
        plan = world.executor.plans[-1]
        sizes.append((len(plan.decodes), [chunk.num_tokens for chunk in plan.chunks]))
    assert sizes == [(1, [9]), (1, [9]), (1, [2, 6]), (3, []), (3, [])]
    world.run()


def test_a_prompt_gets_all_its_blocks_when_it_starts() -> None:
    world = World(make_config(max_num_batched_tokens=4))
    world.add(make_request("a", range(18), 2))
    world.run()
    granted = [[len(block_ids) for _, block_ids in plan.new_blocks] for plan in world.executor.plans]
    assert granted[0] == [5] and not any(granted[1:])
