"""StepPlan and StepResult: frozen, made of plain values, and able to cross a process border as JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from core_harness import World, as_json, make_config, make_request

from kvik.core.plan import Chunk, RowInit, RowResult, StepPlan, StepResult
from kvik.outputs import TokenLogprobs

OPTIONS: dict[str, Any] = {
    "temperature": 0.7,
    "top_k": 5,
    "logit_bias": {3: 1.5},
    "stop": ["x"],
    "stop_token_ids": [9],
    "logprobs": 2,
    "seed": 4,
    "allowed_token_ids": [1, 2],
    "bad_words": ["y"],
}


def _plans() -> list[StepPlan]:
    world = World(make_config(max_num_batched_tokens=6, run_ahead=1), lag=True)
    for i in range(3):
        world.add(make_request(f"r{i}", range(8), 4, n=2, **OPTIONS))
    world.run()
    return world.executor.plans


def test_every_plan_is_json_and_says_all_that_the_plan_says() -> None:
    for plan in _plans():
        data = json.loads(as_json(plan))
        assert data["step_id"] == plan.step_id
        assert tuple(Chunk(**chunk) for chunk in data["chunks"]) == plan.chunks
        assert tuple(data["decodes"]) == plan.decodes
        assert tuple((row, tuple(block_ids)) for row, block_ids in data["new_blocks"]) == plan.new_blocks
        for saved, init in zip(data["joined"], plan.joined, strict=True):
            assert tuple(saved["token_ids"]) == init.token_ids
            assert saved["params"]["logit_bias"] == [[3, 1.5]]


def test_every_result_is_json() -> None:
    logprobs = (TokenLogprobs(3, -0.5, 1, ((3, -0.5), (4, -1.5))),)
    result = StepResult(7, (RowResult(0, (3,), logprobs, logprobs),), (5, -1), (RowResult(1, error="no"),))
    data = json.loads(as_json(result))
    assert data["rows"][0]["logprobs"] == [[3, -0.5, 1, [[3, -0.5], [4, -1.5]]]]
    assert data["decoded"] == [5, -1]
    assert data["extras"][0]["error"] == "no"


def test_a_result_is_made_of_one_for_each_row_and_names_the_decodes_that_gave_more_than_a_token() -> None:
    plan = StepPlan(3, (), (), (4, 0, 2), (Chunk(1, 0, 5, sample=True), Chunk(3, 0, 2, sample=False)))
    more = RowResult(0, (8,), (TokenLogprobs(8, -0.5, 1),))
    failed = RowResult(2, error="no")
    chunks = (RowResult(1, (9,)), RowResult(3))
    result = StepResult.of(plan, [RowResult(4, (7,)), more, failed, *chunks])
    assert result == StepResult(3, chunks, (7, -1, -1), (more, failed))


def test_plans_share_their_decodes_for_as_long_as_these_stay_the_same() -> None:
    world = World(make_config(run_ahead=1, max_model_len=64), lag=True)
    for i in range(3):
        world.add(make_request(f"r{i}", range(5), 9 if i else 30))
    world.run()
    plans = world.executor.plans
    assert [len(plan.decodes) for plan in plans] == [0, *[3] * 8, *[1] * 21]
    assert len({id(plan.decodes) for plan in plans[1:]}) == 2
    assert sum(len(plan.new_blocks) for plan in plans) < len(plans)


def test_equal_histories_give_equal_plans() -> None:
    assert [as_json(plan) for plan in _plans()] == [as_json(plan) for plan in _plans()]


def test_plans_do_not_change_after_they_were_made() -> None:
    """A plan that a device still reads must not share lists with the scheduler."""
    world = World(make_config(max_num_batched_tokens=6, run_ahead=2), lag=True)
    for i in range(3):
        world.add(make_request(f"r{i}", range(8), 9, n=2))
    saved: list[str] = []
    while world.engine.has_unfinished():
        world.step()
        saved += [as_json(plan) for plan in world.executor.plans[len(saved) :]]
    assert saved == [as_json(plan) for plan in world.executor.plans]


@pytest.mark.parametrize("record", [RowInit, Chunk, StepPlan, RowResult, StepResult])
def test_records_are_frozen_and_hold_no_other_attributes(record: type) -> None:
    plan = _plans()[0]
    instances = {
        RowInit: plan.joined[0],
        Chunk: plan.chunks[0],
        StepPlan: plan,
        RowResult: RowResult(0),
        StepResult: StepResult(0, ()),
    }
    instance = instances[record]
    for f in dataclasses.fields(record):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(instance, f.name, None)
    assert not hasattr(instance, "__dict__")


def test_a_chunk_is_a_decode_only_if_it_computes_one_token_and_samples() -> None:
    assert Chunk(0, 5, 1, sample=True).is_decode
    assert not Chunk(0, 5, 1, sample=False).is_decode
    assert not Chunk(0, 5, 2, sample=True).is_decode
    assert Chunk(0, 5, 2, sample=True).end == 7


def test_a_row_joins_once_per_start_and_is_in_a_step_at_most_once() -> None:
    for plan in _plans():
        rows = [*plan.decodes, *(chunk.row for chunk in plan.chunks)]
        joined = [init.row for init in plan.joined]
        assert len(set(rows)) == len(rows) and set(joined) <= set(rows) and len(set(joined)) == len(joined)
