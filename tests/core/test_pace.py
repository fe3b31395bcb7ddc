"""Running ahead, late: steps are planned when the device is about to be done, and the device never waits for one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from core_harness import FakeClock, GuardedExecutor, World, make_config, make_request

from kvik.core import engine as engine_module
from kvik.core.plan import Chunk, StepPlan, StepResult


class TimedExecutor(GuardedExecutor):
    """A device that takes its time for each step, one after the other, on a clock that `collect` waits on."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(4, lag=True)
        self._clock, self.idle, self._ends = clock, 0.0, [0.0]
        self.began: list[float] = []

    def seconds(self, plan: StepPlan) -> float:
        """10 ms, and 1 ms more for each token."""
        return 0.010 + 0.001 * plan.num_tokens

    def submit(self, plan: StepPlan) -> None:
        super().submit(plan)
        begin = max(self._clock(), self._ends[-1])
        self.idle += begin - self._ends[-1]
        self.began.append(begin)
        self._ends.append(begin + self.seconds(plan))

    def collect(self) -> StepResult:
        self._clock.now = max(self._clock(), self._ends[-self.num_in_flight])
        return super().collect()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(perf_counter=clock))
    return clock


def _serve(world: World, clock: FakeClock, arrivals: list[tuple[float, int]], *, late: bool) -> TimedExecutor:
    """What the server's loop does, with prompts of so many tokens that arrive at so many seconds."""
    arrivals = arrivals[:]

    def receive() -> None:
        while arrivals and arrivals[0][0] <= clock.now:
            _, length = arrivals.pop(0)
            world.add(make_request(f"r{len(arrivals)}", range(length), 40))

    while arrivals or world.engine.has_unfinished():
        receive()
        if late:
            until = clock.now + world.engine.slack()
            while arrivals and arrivals[0][0] <= until:
                clock.now = arrivals[0][0]
                receive()
            clock.now = max(clock.now, until)
        if world.engine.has_unfinished():
            world.step()
        else:
            clock.now = arrivals[0][0]
    assert isinstance(world.executor, TimedExecutor)
    return world.executor


def _world(clock: FakeClock, run_ahead: int = 1) -> World:
    return World(make_config(run_ahead=run_ahead, max_num_seqs=4), executor=TimedExecutor(clock))


ARRIVALS = [(0.0, 6), (0.085, 5), (0.202, 7)]


def test_what_comes_during_a_step_is_part_of_the_next(clock: FakeClock) -> None:
    executor = _serve(_world(clock), clock, ARRIVALS, late=True)
    for (arrival, _), step in zip(ARRIVALS, (plan for plan in executor.plans if plan.joined), strict=True):
        begin = executor.began[executor.plans.index(step)]
        assert sum(arrival < earlier < begin for earlier in executor.began) == 0, "no step began in between"


def test_without_waiting_it_is_part_of_the_one_after(clock: FakeClock) -> None:
    executor = _serve(_world(clock), clock, ARRIVALS, late=False)
    later = [plan for plan in executor.plans if plan.joined][1:]
    between = [
        sum(arrival < earlier < executor.began[executor.plans.index(plan)] for earlier in executor.began)
        for (arrival, _), plan in zip(ARRIVALS[1:], later, strict=True)
    ]
    assert between == [1, 1]


@pytest.mark.parametrize("run_ahead", [1, 2])
def test_the_device_never_waits_for_a_plan(clock: FakeClock, run_ahead: int) -> None:
    executor = _serve(_world(clock, run_ahead), clock, ARRIVALS, late=True)
    assert executor.idle == pytest.approx(0.0, abs=1e-9)


def test_the_time_of_steps_is_all_of_it(clock: FakeClock) -> None:
    world = _world(clock)
    _serve(world, clock, ARRIVALS[:1], late=True)
    stats = world.engine.stats
    assert stats.prefill_time + stats.decode_time == pytest.approx(clock.now)


def test_there_is_no_slack_without_running_ahead(clock: FakeClock) -> None:
    world = _world(clock, run_ahead=0)
    world.add(make_request("a", [1, 2], 6))
    while world.engine.has_unfinished():
        assert world.engine.slack() == 0.0
        world.step()


def test_a_guess_is_the_shorter_of_the_last_two_times_of_that_size(clock: FakeClock) -> None:
    from kvik.core.pace import Pace

    def decodes(count: int) -> StepPlan:
        return StepPlan(0, (), (), tuple(range(count)), ())

    pace = Pace()
    pace.add(decodes(100), 0.1, 0.1)
    assert pace.slack(decodes(100), 0.0) == 0.0, "one time may have been anything"
    pace.add(decodes(104), 0.06, 0.06)
    assert pace.slack(decodes(97), 0.0) == pytest.approx(0.75 * 0.06 - 0.002)
    assert pace.slack(decodes(97), 0.02) == pytest.approx(0.75 * 0.06 - 0.002 - 0.02)
    assert pace.slack(decodes(97), 0.05) == 0.0, "it may be done any time"
    assert pace.slack(decodes(90), 0.0) == 0.0, "another size"
    with_prompt = StepPlan(0, (), (), tuple(range(90)), (Chunk(90, 0, 10, sample=True),))
    assert pace.slack(with_prompt, 0.0) == 0.0, "as many tokens, but of a prompt"
    for _ in range(2):
        pace.add(StepPlan(0, (), (), (), (Chunk(0, 1200, 100, sample=False),)), 0.2, 0.1)
    assert pace.slack(StepPlan(0, (), (), (), (Chunk(0, 1100, 100, sample=False),)), 0.0) > 0
    assert pace.slack(StepPlan(0, (), (), (), (Chunk(0, 0, 100, sample=False),)), 0.0) == 0.0, "less before it"
    pace.add(decodes(100), 0.5, 0.01)
    pace.add(decodes(100), 0.6, 0.01)
    assert pace.slack(decodes(100), 0.0) == pytest.approx(0.75 * 0.5 - 0.002)


def test_a_guess_that_was_too_long_is_forgotten(clock: FakeClock) -> None:
    world = _world(clock)
    executor = world.executor
    assert isinstance(executor, TimedExecutor)
    took = [0.012, 0.200, 0.200, 0.200]  # the first is a prompt
    executor.seconds = lambda plan: took.pop(0) if took else 0.011  # type: ignore[method-assign]
    world.add(make_request("a", [1, 2], 20))
    waits = []
    while world.engine.has_unfinished():
        waits.append(world.engine.slack())
        clock.now += waits[-1]
        world.step()
    long = [wait for wait in waits if wait > 0.1]
    assert len(long) == 2, "once while steps were that long, and once for the first that was not"
    assert max(waits[waits.index(long[1]) + 4 :]) == pytest.approx(0.75 * 0.011 - 0.002)
