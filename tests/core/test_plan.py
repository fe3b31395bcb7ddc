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
        assert [Chunk(**{**chunk, "new_block_ids": tuple(chunk["new_block_ids"])}) for chunk in data["chunks"]] == list(
            plan.chunks
        )
        for saved, init in zip(data["joined"], plan.joined, strict=True):
            assert tuple(saved["token_ids"]) == init.token_ids
            assert saved["params"]["logit_bias"] == [[3, 1.5]]


def test_every_result_is_json() -> None:
    logprobs = (TokenLogprobs(3, -0.5, 1, ((3, -0.5), (4, -1.5))),)
    result = StepResult(7, (RowResult(0, (3,), logprobs, logprobs), RowResult(1, error="no")))
    rows = json.loads(as_json(result))["rows"]
    assert rows[0]["logprobs"] == [[3, -0.5, 1, [[3, -0.5], [4, -1.5]]]]
    assert rows[1]["error"] == "no"


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
        rows = [chunk.row for chunk in plan.chunks]
        joined = [init.row for init in plan.joined]
        assert len(set(rows)) == len(rows) and set(joined) <= set(rows) and len(set(joined)) == len(joined)
