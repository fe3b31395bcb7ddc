"""Logits processors against the processor classes of transformers and against their formulas."""

from __future__ import annotations

import pytest
import torch
from sampling_rows import make_row, tokens
from torch import Tensor
from transformers.generation import logits_process as hf

from kvik.errors import RequestError
from kvik.sampling.processors import (
    add_bias,
    call_user,
    completing_ids,
    keep_only,
    mask,
    output_penalties,
    process,
    repetition_penalty,
)

VOCAB = 101


@pytest.fixture(params=range(4))
def logits(request: pytest.FixtureRequest) -> Tensor:
    values = torch.randn(VOCAB, generator=torch.Generator().manual_seed(request.param)) * 3
    values[5:9] = values[5]  # ties
    values[11] = 0.0
    return values


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.2, 10.0])
def test_repetition_penalty_equals_hf(logits: Tensor, penalty: float) -> None:
    history = tokens(3, 5, 5, 11, 99, 3, 0)
    expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(history.unsqueeze(0), logits.unsqueeze(0))[0]
    assert torch.equal(repetition_penalty(logits, history, penalty), expected)


def test_repetition_penalty_ignores_ids_beyond_the_vocabulary(logits: Tensor) -> None:
    assert torch.equal(
        repetition_penalty(logits, tokens(3, VOCAB, 10**6), 2.0), repetition_penalty(logits, tokens(3), 2.0)
    )


def test_output_penalties_formula(logits: Tensor) -> None:
    penalised = output_penalties(logits, tokens(7, 7, 7, 2, VOCAB + 3), presence=0.5, frequency=-0.25)
    expected = logits.clone()
    expected[7] += 3 * 0.25 - 0.5
    expected[2] += 0.25 - 0.5
    torch.testing.assert_close(penalised, expected)
    untouched = torch.ones(VOCAB, dtype=torch.bool)
    untouched[[2, 7]] = False
    assert torch.equal(penalised[untouched], logits[untouched])


def test_bias_equals_hf(logits: Tensor) -> None:
    bias = {(3,): 5.0, (100,): -100.0}
    expected = hf.SequenceBiasLogitsProcessor(bias)(tokens(1).unsqueeze(0), logits.unsqueeze(0))[0]
    assert torch.equal(add_bias(logits, tokens(3, 100), torch.tensor([5.0, -100.0])), expected)


def test_keep_only_and_mask_are_complements(logits: Tensor) -> None:
    ids = tokens(0, 50, 100)
    others = torch.tensor([i for i in range(VOCAB) if i not in (0, 50, 100)])
    assert torch.equal(keep_only(logits, ids), mask(logits, others))
    assert torch.isinf(keep_only(logits, ids)).sum() == VOCAB - 3


@pytest.mark.parametrize("history", [(1,), (4, 5), (4, 5, 6), (6, 4, 5), (9, 9, 4), (5, 4, 5, 6, 7)])
def test_bad_words_equal_hf(logits: Tensor, history: tuple[int, ...]) -> None:
    words = [[8], [5, 9], [4, 5, 6], [6, 7, 20], [5, 6], [4, 5, 30], [7, 7, 7, 7, 7, 7, 7, 1]]
    expected = hf.NoBadWordsLogitsProcessor(words)(tokens(*history).unsqueeze(0), logits.unsqueeze(0))[0]
    row = make_row(VOCAB, bad_words_ids=words)
    assert torch.equal(process(logits, row, tokens(*history)), expected)


def test_completing_ids_matches_the_tail_only() -> None:
    words = [(1, 2), (3, 1, 4), (9, 1, 5)]
    assert completing_ids(words, tokens(3, 1)) == [2, 4]
    assert completing_ids(words, tokens(1, 3)) == []
    assert completing_ids(words, tokens(1)) == [2]


@pytest.mark.parametrize(("num_output", "masked"), [(0, True), (1, True), (2, False), (3, False)])
def test_min_tokens_masks_stop_ids(logits: Tensor, num_output: int, masked: bool) -> None:
    row = make_row(VOCAB, num_prompt_tokens=3, min_tokens=2, stop_token_ids=(4, 9, VOCAB + 1))
    history = torch.zeros(3 + num_output, dtype=torch.int64)
    expected = hf.MinNewTokensLengthLogitsProcessor(3, 2, [4, 9], "cpu")(history.unsqueeze(0), logits.unsqueeze(0))[0]
    processed = process(logits, row, history)
    assert torch.equal(processed, expected)
    assert bool(torch.isinf(processed[[4, 9]]).all()) is masked


def test_presence_counts_output_only_and_repetition_counts_all(logits: Tensor) -> None:
    row = make_row(VOCAB, num_prompt_tokens=2, presence_penalty=1.0, repetition_penalty=2.0)
    processed = process(logits, row, tokens(1, 2, 3))
    expected = repetition_penalty(logits, tokens(1, 2, 3), 2.0)
    expected[3] -= 1.0
    assert torch.equal(processed, expected)
    assert torch.equal(process(logits, row, tokens(1, 2)), repetition_penalty(logits, tokens(1, 2), 2.0))


def test_order_of_everything(logits: Tensor) -> None:
    seen: list[list[int]] = []

    def double(token_ids: list[int], values: Tensor) -> Tensor:
        seen.append(token_ids)
        return values.mul_(2)

    row = make_row(
        VOCAB,
        repetition_penalty=1.5,
        frequency_penalty=0.5,
        logit_bias={1: 3.0, 2: -4.0, VOCAB + 7: 1.0},
        allowed_token_ids=(1, 2, 3, 4, VOCAB + 1),
        bad_words_ids=[(4,), (VOCAB, 1)],
        stop_token_ids=(3,),
        min_tokens=5,
        logits_processors=(double,),
    )
    before = logits.clone()
    processed = process(logits, row, tokens(1, 1))
    first = logits[1] / 1.5 if logits[1] > 0 else logits[1] * 1.5
    torch.testing.assert_close(processed[1], (first - 0.5 + 3.0) * 2)
    torch.testing.assert_close(processed[2], (logits[2] - 4.0) * 2)
    assert torch.isfinite(processed).nonzero().flatten().tolist() == [1, 2]
    assert seen == [[1, 1]]
    assert torch.equal(logits, before)


def test_inputs_are_never_written_to(logits: Tensor) -> None:
    before = logits.clone()
    row = make_row(VOCAB, logits_processors=(lambda token_ids, values: values.fill_(0),))
    process(logits, row, tokens(1))
    repetition_penalty(logits, tokens(1), 2.0)
    output_penalties(logits, tokens(1), 1.0, 1.0)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.zeros(VOCAB - 1), "[100]"),
        (torch.zeros(VOCAB, dtype=torch.float64), "float64"),
        (torch.zeros(1, VOCAB), "[1, 101]"),
        (None, "NoneType, not a Tensor"),
    ],
)
def test_user_callable_with_wrong_result(result: object, message: str) -> None:
    def broken(token_ids: list[int], values: Tensor) -> object:
        return result

    with pytest.raises(RequestError, match="broken") as caught:
        call_user(broken, [1], torch.zeros(VOCAB))
    assert message in str(caught.value)
    assert caught.value.param == "logits_processors"


class Raiser:
    def __call__(self, token_ids: list[int], values: Tensor) -> Tensor:
        raise KeyError("no such state")


def test_user_callable_that_raises() -> None:
    with pytest.raises(RequestError, match=r"'Raiser' raised KeyError.*no such state"):
        call_user(Raiser(), [1], torch.zeros(VOCAB))
