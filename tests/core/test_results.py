"""What the scheduler makes of step results: stops, log-probabilities of prompts, rows that fail, ends from outside."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from core_harness import Interrupted, ScriptedExecutor, World, make_config, make_request, oracle

from kvik.core.plan import Chunk, RowResult, StepPlan, StepResult
from kvik.core.request import Request, Sequence
from kvik.distributed.mock import mock_token
from kvik.outputs import FinishReason, SequenceOutput, TokenLogprobs

PROMPT = (1, 2, 3)


def _tokens(count: int) -> list[int]:
    tokens = list(PROMPT)
    for _ in range(count):
        tokens.append(mock_token(tokens, 0, 50))
    return tokens[len(PROMPT) :]


def _run_one(request: Request) -> World:
    world = World(make_config())
    world.add(request)
    world.run()
    return world


# Stops


def test_eos_and_user_stop_ids_both_end_a_sequence_and_are_the_last_output_token() -> None:
    tokens = _tokens(6)
    for options in ({"eos": (tokens[2],)}, {"stop_token_ids": (tokens[2],)}):
        world = _run_one(make_request("a", PROMPT, 6, **options))
        assert world.tokens("a") == tuple(tokens[:3])
        output = world.terminal("a")
        assert (output.finish_reason, output.stop_token_id) == (FinishReason.STOP, tokens[2])
        assert output.new_token_ids == (tokens[2],)


def test_ignore_eos_ignores_the_models_ids_but_not_the_users() -> None:
    tokens = _tokens(6)
    world = _run_one(make_request("a", PROMPT, 6, eos=(tokens[1],), stop_token_ids=(tokens[3],), ignore_eos=True))
    assert world.tokens("a") == tuple(tokens[:4])


def test_min_tokens_come_before_any_stop_and_the_next_token_may_stop() -> None:
    """A stop id among the first `min_tokens` is kept as text; the executor is told not to sample one."""
    tokens = _tokens(6)
    for min_tokens, length in ((0, 3), (2, 3), (3, 6), (6, 6)):
        world = _run_one(make_request("a", PROMPT, 6, stop_token_ids=(tokens[2],), min_tokens=min_tokens))
        assert len(world.tokens("a")) == length


def test_the_executor_is_told_all_stop_ids_in_a_fixed_order() -> None:
    world = _run_one(make_request("a", PROMPT, 2, eos=(49, 7), stop_token_ids=(48, 7, 3)))
    assert world.executor.plans[0].joined[0].stop_token_ids == (3, 7, 48, 49)


def test_a_length_stop_has_no_stop_token() -> None:
    output = _run_one(make_request("a", PROMPT, 2)).terminal("a")
    assert (output.finish_reason, output.stop_token_id) == (FinishReason.LENGTH, None)


def test_an_end_from_outside_delivers_one_terminal_output_without_tokens_and_with_its_reason() -> None:
    for reason in FinishReason:
        world = World(make_config())
        world.engine.add(make_request("a", PROMPT, 20))
        world.engine.step()
        world.engine.finish("a", reason)
        world.engine.finish("a", FinishReason.ABORT)
        (output,) = world.engine.step()
        assert (output.finish_reason, output.new_token_ids, output.stop_token_id) == (reason, (), None)
        assert not world.engine.has_unfinished()


def test_a_waiting_request_can_be_ended_before_it_ever_ran() -> None:
    world = World(make_config(max_num_seqs=1))
    world.add(make_request("a", PROMPT, 20))
    world.add(make_request("b", PROMPT, 20))
    world.step()
    world.finish("b", FinishReason.TIMEOUT)
    world.run()
    output = world.terminal("b")
    assert output.metrics.queue_time is None and output.metrics.time_to_first_token is None


def test_ending_an_unknown_request_or_completion_is_ignored() -> None:
    world = World(make_config())
    world.add(make_request("a", PROMPT, 2))
    world.finish("b", FinishReason.ABORT)
    world.finish("a", FinishReason.ABORT, index=5)
    world.run()
    assert world.terminal("a").finish_reason is FinishReason.LENGTH


def test_nothing_of_a_finished_request_stays_in_memory() -> None:
    world = World(make_config(run_ahead=1, num_blocks=20), lag=True)
    for i in range(12):
        world.engine.add(make_request(f"r{i}", range(i + 1), 9, n=1 + i % 3, eos=(3, 4)))
        world.engine.step()
        world.engine.finish(f"r{i - 1}", FinishReason.ABORT)
    while world.engine.has_unfinished():
        world.engine.step()
    gc.collect()
    engine_only = [world.scheduler, world.engine]
    reachable, todo = set(), list(engine_only)
    while todo:
        item = todo.pop()
        if id(item) not in reachable and not isinstance(item, (type, ScriptedExecutor)) and item is not world.executor:
            reachable.add(id(item))
            assert not isinstance(item, (Sequence, Request, SequenceOutput, StepPlan, StepResult)), type(item)
            todo.extend(ref for ref in gc.get_referents(item) if _is_state(ref))


def _is_state(item: object) -> bool:
    """Whether an object is data of the engine rather than code."""
    return isinstance(item, (list, dict, tuple, set)) or type(item).__module__.startswith(("kvik.", "collections"))


# Requests that do not stream


@pytest.mark.parametrize("run_ahead", [0, 1, 2])
@pytest.mark.parametrize("preempt_after", [None, 1, 2, 5])
def test_a_request_that_does_not_stream_gives_everything_with_its_end(
    run_ahead: int, preempt_after: int | None
) -> None:
    def logprobs(plan: StepPlan, chunk: Chunk, row: RowResult) -> RowResult:
        mine = tuple(TokenLogprobs(t, -0.5, 1) for t in row.token_ids)
        prompt = tuple(TokenLogprobs(p + 1, -1.0, 1) for p in range(chunk.start, min(chunk.end, len(PROMPT) - 1)))
        return RowResult(row.row, row.token_ids, mine, prompt if chunk.prompt_logprobs else ())

    world = World(make_config(run_ahead=run_ahead), executor=ScriptedExecutor(4, logprobs, lag=True))
    world.add(make_request("a", PROMPT, 8, stream=False, logprobs=0, prompt_logprobs=0))
    outputs = []
    for step in range(20):
        if step == preempt_after:
            world.preempt(world.scheduler.running[0])
        outputs += world.step()
    (output,) = outputs
    assert output.new_token_ids == tuple(_tokens(8)) == tuple(entry.token_id for entry in output.logprobs)
    assert [entry.token_id for entry in output.prompt_logprobs] == list(range(1, len(PROMPT)))
    assert output.metrics is not None and output.metrics.time_to_first_token is not None


def test_a_request_that_does_not_stream_and_is_ended_gives_what_it_had() -> None:
    world = World(make_config(run_ahead=1), lag=True)
    world.add(make_request("a", PROMPT, 20, stream=False))
    for _ in range(3):
        assert world.step() == []
    world.finish("a", FinishReason.ABORT)
    (output,) = world.step()
    assert (output.finish_reason, output.new_token_ids) == (FinishReason.ABORT, tuple(_tokens(3)))
    assert output.stop_token_id is None


def test_tokens_in_which_a_stop_string_is_looked_for_come_as_they_are_sampled() -> None:
    world = World(make_config())
    world.add(make_request("a", PROMPT, 4, stream=False, stop=["x"]))
    assert [len(world.step()) for _ in range(4)] == [1, 1, 1, 1]


# Log-probabilities of the prompt


def _with_prompt_logprobs(plan: StepPlan, chunk: Chunk, row: RowResult) -> RowResult:
    """Position p of a chunk predicts prompt token p + 1: its entry carries that number."""
    if not chunk.prompt_logprobs:
        return row
    entries = tuple(TokenLogprobs(p + 1, -1.0, 1) for p in range(chunk.start, min(chunk.end, NUM_PROMPT - 1)))
    return RowResult(row.row, row.token_ids, prompt_logprobs=entries)


NUM_PROMPT = 10


def _prompt_world(**changes: int) -> World:
    return World(make_config(**changes), executor=ScriptedExecutor(4, _with_prompt_logprobs, lag=True))


def _delivered(outputs: list[SequenceOutput]) -> list[int]:
    return [entry.token_id for output in outputs for entry in output.prompt_logprobs]


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 9, 10, 64])
@pytest.mark.parametrize("run_ahead", [0, 1, 2])
@pytest.mark.parametrize("preempt_after", [None, 1, 2, 3, 5, 12])
def test_every_prompt_token_but_the_first_gets_one_logprob_across_chunks_and_preemption(
    budget: int, run_ahead: int, preempt_after: int | None
) -> None:
    world = _prompt_world(max_num_batched_tokens=budget, max_num_seqs=1, run_ahead=run_ahead)
    world.add(make_request("a", range(NUM_PROMPT), 4, prompt_logprobs=0))
    outputs = []
    for step in range(100):
        if step == preempt_after and world.scheduler.running:
            world.preempt(world.scheduler.running[0])
        outputs += world.step()
    assert _delivered(outputs) == list(range(1, NUM_PROMPT))
    assert len(outputs[0].prompt_logprobs) == NUM_PROMPT - 1, "they come with the first token"
    world.check_end()


def test_prompt_logprobs_do_not_use_cached_blocks_and_others_still_do() -> None:
    world = _prompt_world()
    world.add(make_request("warm", range(NUM_PROMPT), 1))
    world.run()
    world.add(make_request("asks", range(NUM_PROMPT), 1, prompt_logprobs=0))
    world.add(make_request("not", range(NUM_PROMPT), 1))
    outputs = world.step()
    assert _delivered(outputs) == list(range(1, NUM_PROMPT))
    assert [world.terminal(name).num_cached_tokens for name in ("asks", "not")] == [0, 8]


def test_a_prompt_of_one_token_has_no_logprobs_to_ask_for() -> None:
    world = _prompt_world()
    world.add(make_request("a", [1], 3, prompt_logprobs=0))
    world.run()
    assert not any(chunk.prompt_logprobs for plan in world.executor.plans for chunk in plan.chunks)


def test_decode_steps_and_other_requests_never_ask_for_prompt_logprobs() -> None:
    world = _prompt_world(max_num_batched_tokens=4)
    world.add(make_request("a", range(NUM_PROMPT), 4, prompt_logprobs=0))
    world.add(make_request("b", range(NUM_PROMPT), 4))
    world.run()
    asked = [
        (chunk.row, chunk.start) for plan in world.executor.plans for chunk in plan.chunks if chunk.prompt_logprobs
    ]
    assert len({row for row, _ in asked}) == 1
    assert [start for _, start in asked] == [0, 4, 8]


def test_logprobs_of_surplus_tokens_are_dropped_with_them() -> None:
    def two_logprobs(plan: StepPlan, chunk: Chunk, row: RowResult) -> RowResult:
        return RowResult(row.row, row.token_ids, tuple(TokenLogprobs(t, -0.5, 1) for t in row.token_ids))

    world = World(make_config(run_ahead=2), executor=ScriptedExecutor(4, two_logprobs, lag=True))
    world.add(make_request("a", PROMPT, 20, stop_token_ids=(_tokens(3)[-1],)))
    outputs = []
    while world.engine.has_unfinished():
        outputs += world.step()
    assert [entry.token_id for output in outputs for entry in output.logprobs] == _tokens(3)


# Rows that fail


@pytest.mark.parametrize("run_ahead", [0, 1, 2])
@pytest.mark.parametrize("failing_step", [0, 1, 4])
def test_an_error_of_one_row_ends_only_its_sequence(run_ahead: int, failing_step: int) -> None:
    def fail(plan: StepPlan, chunk: Chunk, row: RowResult) -> RowResult:
        return RowResult(row.row, error="processor raised") if (plan.step_id, chunk.row) == (failing_step, 1) else row

    world = World(make_config(run_ahead=run_ahead), executor=ScriptedExecutor(4, fail, lag=True))
    requests = [make_request(f"r{i}", [i] * 5, 8, seed=i) for i in range(3)]
    for request in requests:
        world.engine.add(request)
    outputs = []
    for _ in range(20):
        outputs += world.engine.step()
        world.scheduler.check_invariants()
    ends = {o.request_id: (o.finish_reason, o.error) for o in outputs if o.finish_reason is not None}
    assert ends["r1"] == (FinishReason.ERROR, "processor raised")
    assert ends["r0"] == ends["r2"] == (FinishReason.LENGTH, None)
    for request in (requests[0], requests[2]):
        got = tuple(t for o in outputs if o.request_id == request.request_id for t in o.new_token_ids)
        assert got == oracle(request, 0, 64, 50)[0]
    failed = tuple(t for o in outputs if o.request_id == "r1" for t in o.new_token_ids)
    assert failed == oracle(requests[1], 0, 64, 50)[0][:failing_step]
    assert not world.engine.has_unfinished() and world.scheduler.kv.num_used == 0


def test_several_tokens_of_one_step_are_cut_at_the_first_that_stops() -> None:
    """Results may carry more than one token (speculation): what follows a stop is dropped."""

    def extra(plan: StepPlan, chunk: Chunk, row: RowResult) -> RowResult:
        return RowResult(row.row, (*row.token_ids, 60, 61))

    world = World(make_config(), executor=ScriptedExecutor(4, extra))
    world.engine.add(make_request("stop", PROMPT, 20, stop_token_ids=(60,)))
    world.engine.add(make_request("length", PROMPT, 2))
    outputs = world.engine.step()
    assert {o.request_id: (len(o.new_token_ids), o.finish_reason) for o in outputs} == {
        "stop": (2, FinishReason.STOP),
        "length": (2, FinishReason.LENGTH),
    }


def test_a_result_without_the_token_that_the_plan_asked_for_is_caught_at_once() -> None:
    """Otherwise the sequence could never advance again, and whoever waits for it would wait for ever."""
    world = World(make_config(), executor=ScriptedExecutor(4, lambda plan, chunk, row: RowResult(row.row)))
    world.engine.add(make_request("a", PROMPT, 4))
    with pytest.raises(AssertionError):
        world.engine.step()


def test_a_result_with_too_few_rows_is_caught() -> None:
    world = World(make_config())
    for i in range(2):
        world.engine.add(make_request(f"r{i}", PROMPT, 4))
    plan = world.scheduler.schedule()
    assert plan is not None
    with pytest.raises(ValueError, match="shorter"):
        world.scheduler.update(StepResult(plan.step_id, (RowResult(0, (1,)),)))


# Reset


@pytest.mark.parametrize("where", ["submit", "collect"])
@pytest.mark.parametrize("run_ahead", [0, 1, 2])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_after_an_interrupted_step_reset_aborts_everything_and_the_engine_works_on(
    where: str, run_ahead: int, steps: int
) -> None:
    world = World(make_config(run_ahead=run_ahead, max_num_batched_tokens=7, num_blocks=20), lag=True)
    for i in range(5):
        world.add(make_request(f"r{i}", [i] * 9, 8, n=2))
    for _ in range(steps):
        world.step()
    world.interrupt(where)
    assert world.seen[f"interrupted in {where}"] == 1
    world.run()
    assert {track.terminal.finish_reason for track in world.tracks.values() if track.terminal} >= {FinishReason.ABORT}
    world.add(make_request("next", [0] * 9, 8))
    world.run()


def test_reset_of_an_idle_engine_changes_nothing() -> None:
    world = World(make_config())
    world.reset()
    assert world.engine.step() == []
    world.add(make_request("a", PROMPT, 3))
    world.run()


def test_after_a_reset_blocks_of_the_interrupted_step_are_not_found_and_older_ones_are_right_if_they_are() -> None:
    world = World(make_config(run_ahead=1), lag=True)
    world.add(make_request("a", range(9), 2))
    world.run()
    world.add(make_request("b", range(100, 109), 8))
    world.interrupt("collect")
    world.run()
    for name, prompt, cached in (("a again", range(9), (0, 8)), ("b again", range(100, 109), (0,))):
        world.add(make_request(name, prompt, 2))
        world.run()
        assert world.terminal(name).num_cached_tokens in cached


def _busy_world() -> World:
    """About to preempt, admit, commit and finish in one step."""
    world = World(make_config(num_blocks=6, max_num_seqs=3, max_model_len=24, max_num_batched_tokens=8))
    for i in range(3):
        world.engine.add(make_request(f"r{i}", [i] * 4, (3, 14, 14)[i], seed=i, n=1 + (i == 1)))
    for _ in range(2):
        world.engine.step()
    return world


def _interrupt_at(line: int, run: Callable[[], Any]) -> bool:
    """Run with an exception raised before the `line`th line of kvik.core; False if it ended before that."""
    count = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        if "/kvik/core/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            count += 1
            if count == line:
                raise Interrupted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except Interrupted:
        return True
    finally:
        sys.settrace(before)
    return False


def test_reset_frees_what_an_unfinished_plan_had_granted() -> None:
    """Interrupted after every row was granted and before the plan was handed over: the rows must come back."""
    world = World(make_config(max_num_seqs=2))
    for i in range(2):
        world.engine.add(make_request(f"r{i}", PROMPT, 4))
    advance, calls = world.scheduler._advance, []

    def interrupted(*args: Any) -> Chunk:
        calls.append(advance(*args))
        if len(calls) == 2:
            raise Interrupted
        return calls[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.scheduler, "_advance", interrupted)
        with pytest.raises(Interrupted):
            world.engine.step()
    world.engine.reset()
    assert {output.finish_reason for output in world.engine.step()} == {FinishReason.ABORT}
    world.add(make_request("next", PROMPT, 4))
    world.run()


def test_reset_repairs_a_step_that_was_interrupted_at_any_line() -> None:
    """Ctrl-C arrives between any two lines: afterwards no row, block or request is lost, and the next one runs."""
    broken, line = [], 0
    request = make_request("next", [7] * 9, 4)
    while True:
        line += 1
        world = _busy_world()
        engine, scheduler = world.engine, world.scheduler
        if not _interrupt_at(line, lambda engine=engine: [engine.step() for _ in range(6)]):
            break
        try:
            engine.reset()
            engine.step()
            scheduler.check_invariants()
            assert not engine.has_unfinished() and scheduler.kv.num_used == 0 and len(scheduler._free_rows) == 3
            engine.add(request)
            tokens = [token for _ in range(10) for output in engine.step() for token in output.new_token_ids]
            assert tuple(tokens) == oracle(request, 0, 24, 50)[0]
        except (AssertionError, IndexError, KeyError, ValueError) as error:
            broken.append((line, type(error).__name__, str(error).splitlines()[:1]))
    assert line > 300, "the steps are too short to mean anything"
    assert not broken, f"{len(broken)} of {line} interruptions leave a broken engine: {broken[:5]}"
