"""Preemption by recompute: the latest goes first and comes back first, and nobody can tell from the output."""

from __future__ import annotations

import random

import pytest
from core_harness import POLICY_NAMES, World, make_config, make_request

from kvik.core.plan import RowInit
from kvik.outputs import FinishReason


def _tight(**changes: object) -> World:
    """Two sequences of 4 + 16 tokens fit at first but not to their ends."""
    return World(make_config(**{"num_blocks": 6, "max_num_seqs": 3, "max_model_len": 24, **changes}))


def _joins(world: World, seed: int) -> list[RowInit]:
    return [init for plan in world.executor.plans for init in plan.joined if init.seed == seed]


def _running(world: World) -> list[int]:
    return [seq.seed for seq in world.scheduler.running]


def test_the_latest_arrival_is_preempted_and_the_first_never() -> None:
    world = _tight()
    for i in range(3):
        world.add(make_request(f"r{i}", [i] * 4, 16, seed=i))
    world.run()
    preempted = [world.terminal(f"r{i}").metrics.num_preemptions for i in range(3)]
    assert preempted[0] == 0
    assert sum(preempted[1:]) > 0
    finished = [track for track in world.tracks.values() if len(track.tokens) == 16]
    assert len(finished) == 3


def test_a_preempted_sequence_resumes_before_any_new_one_starts() -> None:
    world = World(make_config(max_num_seqs=2))
    for i in range(3):
        world.add(make_request(f"r{i}", [i] * 4, 16, seed=i))
    world.step()
    assert _running(world) == [0, 1]
    world.preempt(world.scheduler.running[1])
    world.step()
    assert _running(world) == [0, 1]
    world.preempt(world.scheduler.running[0])
    world.preempt(world.scheduler.running[0])
    world.step()
    assert _running(world) == [0, 1]
    world.run()
    assert [init.seed for plan in world.executor.plans for init in plan.joined] == [0, 1, 1, 0, 1, 2]


def test_nothing_new_starts_while_a_preempted_sequence_does_not_fit() -> None:
    world = _tight()
    world.add(make_request("a", [0] * 4, 20, seed=0))
    world.add(make_request("b", [1] * 4, 16, seed=1))
    while not world.scheduler._resuming:
        world.step()
    world.add(make_request("small", [2], 1, seed=2))
    while len(_joins(world, 1)) == 1:
        assert not _joins(world, 2)
        world.step()
    world.run()


def test_a_resumed_sequence_starts_over_from_prompt_and_confirmed_output() -> None:
    world = World(make_config())
    world.add(make_request("a", [1, 2, 3], 16, seed=5))
    for _ in range(4):
        world.step()
    confirmed = world.tokens("a")
    world.preempt(world.scheduler.running[0])
    world.step()
    first, resumed = _joins(world, 5)
    assert first.token_ids == (1, 2, 3)
    assert resumed.token_ids == (1, 2, 3, *confirmed)
    assert first.num_prompt_tokens == resumed.num_prompt_tokens == 3
    world.run()


def test_a_resumed_sequence_finds_its_own_blocks_again() -> None:
    world = World(make_config())
    world.add(make_request("a", range(9), 16, seed=5))
    for _ in range(4):
        world.step()
    world.preempt(world.scheduler.running[0])
    world.step()
    chunk = world.executor.plans[-1].chunks[0]
    assert (chunk.start, chunk.end) == (12, 13)
    world.run()
    assert world.terminal("a").num_cached_tokens == 0, "its own recomputed tokens are not a cache hit of the prompt"


@pytest.mark.parametrize("run_ahead", [1, 2])
def test_preemption_discards_what_is_in_flight_and_samples_it_again(run_ahead: int) -> None:
    world = World(make_config(run_ahead=run_ahead), lag=True)
    world.add(make_request("a", [1, 2, 3], 12))
    world.step()
    world.step()
    assert world.scheduler.running[0].num_in_flight == run_ahead
    before = world.tokens("a")
    world.preempt(world.scheduler.running[0])
    for _ in range(run_ahead):
        assert world.step() == []
    assert world.tokens("a") == before
    world.run()
    assert len(world.tokens("a")) == 12


@pytest.mark.parametrize("step", range(1, 9))
def test_a_prompt_may_be_preempted_between_any_two_of_its_chunks(step: int) -> None:
    world = World(make_config(max_num_batched_tokens=4, max_num_seqs=2, run_ahead=1), lag=True)
    world.add(make_request("a", range(30), 4, prompt_logprobs=0))
    for _ in range(step):
        world.step()
    world.preempt(world.scheduler.running[0])
    world.run()
    assert world.terminal("a").metrics.num_preemptions == 1


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("run_ahead", [0, 1, 2])
def test_a_pool_for_one_serves_many_without_livelock_and_without_a_trace_in_the_output(
    policy: str, run_ahead: int
) -> None:
    rng = random.Random(run_ahead)
    config = make_config(num_blocks=6, max_num_seqs=4, max_model_len=25, policy=policy, run_ahead=run_ahead)
    world = World(config, lag=True)
    for i in range(30):
        world.add(make_request(f"r{i}", [i] * rng.randint(1, 9), rng.randint(1, 16), priority=rng.randint(-1, 1)))
    world.run()  # outputs are compared with the oracle
    assert world.seen["preemptions"] > 5


def test_the_first_in_line_advances_in_every_step_however_scarce_blocks_are() -> None:
    world = _tight()
    for i in range(3):
        world.add(make_request(f"r{i}", [i] * 4, 16, seed=i))
    for count in range(1, 17):
        world.step()
        assert len(world.tokens("r0")) == count
    world.run()


def test_only_as_many_sequences_are_preempted_as_blocks_are_missing() -> None:
    """Four sequences of two blocks each fill the pool and all need a third: the last feeds two, the third gives up."""
    world = World(make_config(num_blocks=8, max_num_seqs=4, max_model_len=24, enable_prefix_caching=False))
    for i in range(4):
        world.add(make_request(f"r{i}", [i] * 3, 12, seed=i))
    while not world.scheduler._resuming:
        assert _running(world) in ([], [0, 1, 2, 3])
        world.step()
    assert _running(world) == [0, 1]
    assert [seq.seed for seq in world.scheduler._resuming] == [2, 3]
    world.run()


def test_a_preempted_sequence_can_be_aborted_and_frees_nothing_twice() -> None:
    world = World(make_config(run_ahead=1), lag=True)
    world.add(make_request("a", range(6), 8))
    world.step()
    world.preempt(world.scheduler.running[0])
    world.finish("a", FinishReason.ABORT)
    world.run()
    assert world.terminal("a").finish_reason is FinishReason.ABORT


def test_preempting_a_sequence_that_does_not_run_is_caught() -> None:
    world = World(make_config())
    world.add(make_request("a", [1], 8))
    world.step()
    seq = world.scheduler.running[0]
    world.preempt(seq)
    with pytest.raises((AssertionError, IndexError)):
        world.scheduler.preempt(seq)
