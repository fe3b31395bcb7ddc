"""Policies: the order in which sequences start, and the exact number of later arrivals that may come first."""

from __future__ import annotations

import random

import pytest
from core_harness import POLICY_NAMES, World, make_config, make_request

from kvik.core.policy import POLICIES, PRIORITY_STEP, SJF_TOKENS_PER_PLACE, SequenceQueue
from kvik.core.request import Request, Sequence


def _sequence(order: int, *, priority: int = 0, total: int = 8) -> Sequence:
    request = make_request(f"r{order}", [1], priority=priority)
    return Sequence(
        request=request, index=0, order=order, seed=0, max_total_tokens=total, stop_token_ids=frozenset(), token_ids=[1]
    )


def _start_order(world: World) -> list[int]:
    """Seeds of the sequences in the order in which they took a row."""
    return [init.seed for plan in world.executor.plans for init in plan.joined]


def _run_one_by_one(policy: str, requests: list[Request]) -> list[int]:
    """All requests wait before the first step, then run one at a time: the order in which they start."""
    world = World(make_config(policy=policy, max_num_seqs=1, max_model_len=256))
    for request in requests:
        world.add(request)
    world.run()
    return _start_order(world)


def test_fcfs_starts_in_order_of_arrival_whatever_the_priorities_and_lengths() -> None:
    requests = [make_request(f"r{i}", [i] * (9 - i), 9 - i, seed=i, priority=-i) for i in range(8)]
    assert _run_one_by_one("fcfs", requests) == list(range(8))


def test_priority_starts_the_smallest_number_first_and_equals_in_order_of_arrival() -> None:
    priorities = [1, 0, 1, -1, 0, -1]
    requests = [make_request(f"r{i}", [1], 1, seed=i, priority=p) for i, p in enumerate(priorities)]
    assert _run_one_by_one("priority", requests) == [3, 5, 1, 4, 0, 2]


def test_sjf_starts_the_shortest_job_first_and_equals_in_order_of_arrival() -> None:
    totals = [160, 2, 80, 2, 160]
    requests = [make_request(f"r{i}", [1], total - 1, seed=i) for i, total in enumerate(totals)]
    assert _run_one_by_one("sjf", requests) == [1, 3, 2, 0, 4]


@pytest.mark.parametrize(("policy", "first"), [("fcfs", "long"), ("priority", "urgent"), ("sjf", "urgent")])
def test_a_prompt_under_way_is_overtaken_by_what_comes_before_it(policy: str, first: str) -> None:
    world = World(make_config(policy=policy, max_num_batched_tokens=16, max_model_len=256, num_blocks=64))
    world.add(make_request("long", list(range(1, 40)) * 5, 1, priority=2))
    world.step()
    world.add(make_request("urgent", [1, 2], 1, priority=-2))
    ended: list[str] = []
    while len(ended) < 2:
        ended += [output.request_id for output in world.step() if output.finish_reason is not None]
    assert ended[0] == first
    world.check_end()


def test_one_step_of_priority_lets_exactly_step_minus_one_later_arrivals_come_first() -> None:
    requests = [make_request("first", [1], 1, seed=0, priority=1)]
    requests += [make_request(f"r{i}", [1], 1, seed=i) for i in range(1, PRIORITY_STEP + 20)]
    assert _run_one_by_one("priority", requests).index(0) == PRIORITY_STEP - 1


def test_under_sjf_exactly_one_later_arrival_per_sixteen_tokens_of_difference_less_one_comes_first() -> None:
    total = 200
    requests = [make_request("long", [1], total - 1, seed=0)]
    requests += [make_request(f"r{i}", [1], 1, seed=i) for i in range(1, 40)]
    assert _run_one_by_one("sjf", requests).index(0) == total // SJF_TOKENS_PER_PLACE - 1


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_no_sequence_is_overtaken_by_more_later_arrivals_than_its_key_allows(policy: str, seed: int) -> None:
    rng = random.Random(seed)
    totals = [rng.choice((2, 20, 60, 100)) for _ in range(40)]
    priorities = [rng.choice((0, 1)) for _ in range(40)]
    requests = [make_request(f"r{i}", [1], totals[i] - 1, seed=i, priority=priorities[i]) for i in range(40)]
    started = _run_one_by_one(policy, requests)
    for seq in range(40):
        overtakers = [other for other in started[: started.index(seq)] if other > seq]
        allowed = {
            "fcfs": 0,
            "priority": PRIORITY_STEP * priorities[seq],
            "sjf": totals[seq] // SJF_TOKENS_PER_PLACE,
        }[policy]
        assert len(overtakers) <= allowed


@pytest.mark.parametrize(("policy", "bound"), [("sjf", 240 // SJF_TOKENS_PER_PLACE), ("priority", PRIORITY_STEP)])
def test_a_stream_of_better_arrivals_that_never_ends_starves_nobody(policy: str, bound: int) -> None:
    world = World(make_config(policy=policy, max_num_seqs=1, max_model_len=256))
    world.add(make_request("patient", [1], 239, seed=0, priority=1))
    for i in range(1, bound + 2):
        for copy in range(2):  # arrivals come twice as fast as they are served
            world.add(make_request(f"r{i}.{copy}", [1], 1, seed=1))
        world.engine.step()
        if 0 in _start_order(world):
            break
    assert 0 in _start_order(world), f"still waiting after {bound} others"


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_queue_yields_sequences_by_key_then_arrival_and_removes_any_of_them(policy: str) -> None:
    rng = random.Random(7)
    sequences = [_sequence(i, priority=rng.randint(-1, 1), total=rng.randint(2, 400)) for i in range(50)]
    queue = SequenceQueue(policy)
    for seq in rng.sample(sequences, len(sequences)):
        queue.add(seq)
    expected = sorted(sequences, key=lambda seq: (POLICIES[policy](seq), seq.order))
    assert list(queue) == expected
    for seq in rng.sample(sequences, len(sequences)):
        assert (queue.first, queue.last, len(queue)) == (expected[0], expected[-1], len(expected))
        queue.remove(seq)
        expected.remove(seq)
        assert list(queue) == expected


def test_removing_a_sequence_that_is_not_queued_is_caught() -> None:
    queue = SequenceQueue("fcfs")
    queue.add(_sequence(0))
    queue.add(_sequence(2))
    with pytest.raises(AssertionError, match="not in this queue"):
        queue.remove(_sequence(1))
