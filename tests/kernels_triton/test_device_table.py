"""The request table on a GPU: what rows and blocks that join become, and that a step may bring any number of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from kvik.core.plan import RowInit, StepPlan
from kvik.kernels.triton.sampling_table import LISTS, MASK, PENALTIES
from kvik.runtime.device_table import DeviceTable
from kvik.sampling_params import SamplingParams

ROWS, LENGTH, BLOCK, VOCAB = 5, 70, 16, 90
ASKED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 4, "min_p": 0.25, "max_tokens": 9, "min_tokens": 3},
    {"repetition_penalty": 1.5, "presence_penalty": -0.5, "frequency_penalty": 0.25},
    {"logit_bias": {7: 1.5, 3: -2.0}, "allowed_token_ids": [3, 7, 64]},
]
WORDS: list[tuple[tuple[int, ...], ...]] = [(), ((5,), (6, 7, 8)), (), ()]


def table(device: torch.device) -> DeviceTable:
    return DeviceTable(ROWS, LENGTH, BLOCK, VOCAB, device)


def init(row: int, asked: int) -> RowInit:
    """A row of 1, 18, 35 or 52 tokens."""
    tokens = tuple((row + 3 * p) % VOCAB for p in range(1 + 17 * asked))
    seed = (1 << 64) - 5 - asked
    return RowInit(row, tokens, max(1, len(tokens) - 1), SamplingParams(**ASKED[asked]), seed, (9, 11), WORDS[asked])


def plan(inits: list[RowInit]) -> StepPlan:
    blocks = [(row.row, tuple(range(10 * row.row, 10 * row.row - -len(row.token_ids) // BLOCK))) for row in inits]
    return StepPlan(0, tuple(inits), tuple(blocks), (), ())


INITS = [init(3, 0), init(0, 1), init(4, 2), init(1, 3)]


def test_rows_hold_what_their_requests_ask(device: torch.device) -> None:
    made = table(device)
    made.apply(plan(INITS))
    values = {field.name: getattr(made.fields, field.name).cpu() for field in dataclasses.fields(made.fields)}
    for one in INITS:
        params, row = one.params, one.row
        assert values["token_ids"][row, : len(one.token_ids)].tolist() == list(one.token_ids)
        assert (values["num_tokens"][row], values["num_prompt"][row]) == (len(one.token_ids), one.num_prompt_tokens)
        assert (made.num_tokens[row], made.num_prompt[row]) == (len(one.token_ids), one.num_prompt_tokens)
        assert values["seed"][row] == one.seed - (1 << 64)
        assert values["temperature"][row] == pytest.approx(params.temperature)
        assert values["top_p"][row].item() == params.top_p
        assert (values["top_k"][row], values["min_tokens"][row]) == (params.top_k, params.min_tokens)
        assert values["log_min_p"][row] == (pytest.approx(math.log(params.min_p)) if params.min_p else -math.inf)
        assert values["repetition"][row] == params.repetition_penalty
        assert values["presence"][row] == params.presence_penalty
        assert values["frequency"][row] == params.frequency_penalty
    assert [values["edits"][one.row].item() for one in INITS] == [0, LISTS, PENALTIES, MASK | LISTS]
    assert values["bad_words"][0, :2, -3:].tolist() == [[6, 7, 8], [-1, -1, 5]]
    assert values["stop_ids"][0, :3].tolist() == [9, 11, -1]
    assert values["bias_ids"][1, :3].tolist() == [3, 7, -1]
    assert values["bias"][1, :2].tolist() == [-2.0, 1.5]
    words = values["allowed"][1].tolist()
    assert [v for v in range(VOCAB) if words[v // 32] >> v % 32 & 1] == [3, 7, 64]


def test_joining_together_is_joining_one_after_the_other(device: torch.device) -> None:
    together, apart = table(device), table(device)
    together.apply(plan(INITS))
    for one in INITS:
        apart.apply(plan([one]))
    assert torch.equal(together.block_table, apart.block_table)
    for field in dataclasses.fields(together.fields):
        assert torch.equal(getattr(together.fields, field.name), getattr(apart.fields, field.name)), field.name


def test_blocks_are_appended_and_a_row_that_joins_again_starts_over(device: torch.device) -> None:
    made = table(device)
    made.apply(plan([init(2, 2)]))
    made.apply(StepPlan(1, (), ((2, (50, 51)), (0, (60,))), (2,), ()))
    assert made.block_table[2].tolist() == [20, 21, 22, 50, 51]
    assert made.block_table[0].tolist() == [60, 0, 0, 0, 0]
    made.apply(plan([init(2, 1)]))
    assert made.block_table[2, :2].tolist() == [20, 21]
    assert made.fields.token_ids[2, :18].tolist() == list(init(2, 1).token_ids)
