"""Whatever users, clients and devices do, in any order and any configuration: outputs are right and nothing leaks.

`World` (core_harness) compares every output with an oracle and checks the scheduler's invariants after each operation.
A seeded driver does the bulk of the steps; a hypothesis state machine over the same operations shrinks what it finds.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
from core_harness import World, random_config, random_request
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvik.errors import RequestError
from kvik.outputs import FinishReason

VOCAB_SIZE = 12
NUM_SHARDS = 8
STEPS_PER_SHARD = 25_000  # 200,000 engine steps in all
ENDINGS = (FinishReason.ABORT, FinishReason.STOP, FinishReason.TIMEOUT)


def _operation(rng: random.Random, world: World, num_added: int) -> int:
    """One random operation; the number of requests added so far."""
    dice = rng.random()
    if dice < 0.30:
        world.add(random_request(rng, f"r{num_added}", world.config, VOCAB_SIZE))
        return num_added + 1
    if dice < 0.88:
        world.step()
    elif dice < 0.94 and world.live:
        track = rng.choice(world.live)
        world.finish(track.request.request_id, rng.choice(ENDINGS), rng.choice((None, track.index)))
    elif dice < 0.99 and world.scheduler.running:
        world.preempt(rng.choice(world.scheduler.running))
    elif dice > 0.993:
        world.interrupt(rng.choice(("submit", "collect")))
    return num_added


def _episode(seed: int) -> World:
    rng = random.Random(seed)
    world = World(random_config(rng), lag=rng.random() < 0.5, vocab_size=VOCAB_SIZE)
    num_added = rng.choice((0, 0, 4, 12))
    for i in range(num_added):
        world.add(random_request(rng, f"r{i}", world.config, VOCAB_SIZE))
    for _ in range(rng.randint(20, 100)):
        num_added = _operation(rng, world, num_added)
    world.run()
    return world


@pytest.mark.parametrize("shard", range(NUM_SHARDS))
def test_two_hundred_thousand_random_steps_match_the_oracle_and_leak_nothing(shard: int) -> None:
    num_steps, seen, seed = 0, Counter[str](), shard * 1_000_000
    while num_steps < STEPS_PER_SHARD:
        world = _episode(seed)
        num_steps += world.engine.stats.num_steps
        seen += world.seen
        seed += 1
    assert num_steps * NUM_SHARDS >= 200_000
    happened = (
        "finished by stop",
        "finished by length",
        "finished by abort",
        "ended by stop",
        "rejected",
        "cached tokens",
        "preempted from outside",
        "interrupted in submit",
        "interrupted in collect",
    )
    assert all(seen[name] >= 10 for name in happened), f"the driver became tame: {seen}"
    assert seen["preemptions"] > 1.2 * seen["preempted from outside"], (
        "the pools are too large to preempt by themselves"
    )


class EngineMachine(RuleBasedStateMachine):
    """The operations of the seeded driver, chosen and shrunk by hypothesis."""

    world: World
    num_added = 0

    @initialize(rng=st.randoms(use_true_random=False), lag=st.booleans())
    def start(self, rng: random.Random, lag: bool) -> None:
        self.world = World(random_config(rng), lag=lag, vocab_size=VOCAB_SIZE)

    @rule(rng=st.randoms(use_true_random=False))
    def add(self, rng: random.Random) -> None:
        self.world.add(random_request(rng, f"r{self.num_added}", self.world.config, VOCAB_SIZE))
        self.num_added += 1

    @rule(count=st.sampled_from((1, 1, 2, 5)))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.world.step()

    @precondition(lambda self: self.world.live)
    @rule(data=st.data(), reason=st.sampled_from(ENDINGS), whole=st.booleans())
    def finish(self, data: st.DataObject, reason: FinishReason, whole: bool) -> None:
        track = data.draw(st.sampled_from(self.world.live))
        self.world.finish(track.request.request_id, reason, None if whole else track.index)

    @precondition(lambda self: any(track.ended is None for track in self.world.live))
    @rule(data=st.data())
    def add_with_an_id_in_use(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from([track for track in self.world.live if track.ended is None])).request
        with pytest.raises(RequestError, match="in use"):
            self.world.engine.add(request)

    @precondition(lambda self: self.world.scheduler.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        self.world.preempt(data.draw(st.sampled_from(self.world.scheduler.running)))

    @rule(where=st.sampled_from(("submit", "collect")))
    def interrupt(self, where: str) -> None:
        self.world.interrupt(where)

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.run()


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=250,
    stateful_step_count=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
