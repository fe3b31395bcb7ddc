"""The sampler as the runner uses it: greedy ties, batches, errors that stay in their row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sampling_rows import make_row, tokens
from torch import Tensor

from kvik.sampling import RowSample, Sampler, prompt_logprobs

MIXED: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "logprobs": 2},
    {},
    {"temperature": 0.6, "logprobs": 0},
    {"top_k": 40},
    {"top_p": 0.9, "logprobs": 5},
    {"min_p": 0.05, "temperature": 1.8},
    {"top_k": 100, "top_p": 0.8, "min_p": 0.01},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"temperature": 0, "logit_bias": {3: 50.0}},
    {"allowed_token_ids": (5, 6, 7)},
    {"bad_words_ids": [(1,), (2, 3)], "min_tokens": 4, "stop_token_ids": (9,)},
    {"logits_processors": (lambda token_ids, values: values + len(token_ids),)},
]


def batch(vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, list[Any], list[Tensor]]:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(len(MIXED), vocab_size, generator=generator) * 3).to(dtype)
    rows = [make_row(vocab_size, seed=100 + i, num_prompt_tokens=2, **params) for i, params in enumerate(MIXED)]
    histories = [torch.randint(0, vocab_size, (2 + i,), generator=generator) for i in range(len(MIXED))]
    return logits, rows, histories


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(130, torch.float32), (4099, torch.float16), (4099, torch.float32), (151_936, torch.bfloat16)],
)
def test_a_row_gives_the_same_sample_alone_and_in_any_batch(vocab_size: int, dtype: torch.dtype) -> None:
    logits, rows, histories = batch(vocab_size, dtype)
    sampler, before = Sampler(vocab_size), logits.clone()
    together = sampler.sample(logits, rows, histories)
    assert all(sample.error is None and 0 <= sample.token_id < vocab_size for sample in together)
    assert [sampler.sample(logits[i : i + 1], [rows[i]], [histories[i]])[0] for i in range(len(rows))] == together
    assert sampler.sample(logits.flip(0), rows[::-1], histories[::-1])[::-1] == together
    assert torch.equal(logits, before)


def test_draws_depend_on_seed_and_position_but_not_on_history() -> None:
    sampler, logits = Sampler(500), torch.zeros(1, 500)

    def draw(seed: int, *history: int) -> int:
        return sampler.sample(logits, [make_row(500, seed=seed)], [tokens(*history)])[0].token_id

    assert draw(1, 5, 6, 7) == draw(1, 8, 9, 10)
    assert len({draw(1, *range(length)) for length in range(1, 30)}) > 20
    assert len({draw(seed, 1) for seed in range(30)}) > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [3, 1000, 151_936, 300_001])
def test_greedy_takes_the_lowest_of_equal_ids(vocab_size: int, dtype: torch.dtype) -> None:
    logits = torch.zeros(4, vocab_size, dtype=dtype)
    logits[1, vocab_size // 3 :] = 1
    logits[2, -2:] = 1
    logits[3, -1] = 1
    expected = [0, vocab_size // 3, vocab_size - 2, vocab_size - 1]
    for rows in ([make_row(vocab_size, temperature=0)] * 4, [make_row(vocab_size, temperature=0, min_tokens=1)] * 4):
        samples = Sampler(vocab_size).sample(logits, rows, [tokens(1)] * 4)
        assert [sample.token_id for sample in samples] == expected


def test_greedy_sees_processed_logits() -> None:
    logits = torch.arange(10.0).unsqueeze(0)
    for params, expected in [
        ({"bad_words_ids": [(9,)]}, 8),
        ({"allowed_token_ids": (2, 4)}, 4),
        ({"logit_bias": {0: 20.0}}, 0),
        ({"min_tokens": 1, "stop_token_ids": (9, 8)}, 7),
        ({"repetition_penalty": 3.0}, 8),
        ({"logits_processors": (lambda token_ids, values: -values,)}, 0),
    ]:
        row = make_row(10, temperature=0, **params)
        assert Sampler(10).sample(logits, [row], [tokens(9)])[0] == RowSample(expected)


def test_logprobs_are_of_the_raw_logits_and_cut_to_each_row() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    rows = [
        make_row(50, temperature=0, logprobs=3, allowed_token_ids=(7,)),
        make_row(50, temperature=0.5, logprobs=0),
        make_row(50),
    ]
    first, second, third = Sampler(50).sample(logits, rows, [tokens(1)] * 3)
    assert first.token_id == 7
    assert first.logprobs == prompt_logprobs(logits[:1], tokens(7), 3)[0]
    assert second.logprobs is not None
    assert second.logprobs.top == ()
    assert third.logprobs is None


def raising(token_ids: list[int], values: Tensor) -> Tensor:
    raise RuntimeError("boom")


def wrong_shape(token_ids: list[int], values: Tensor) -> Tensor:
    return values[:-1]


def sparse(token_ids: list[int], values: Tensor) -> Tensor:
    return values.to_sparse()


def masks_all(token_ids: list[int], values: Tensor) -> Tensor:
    return torch.full_like(values, -torch.inf)


@pytest.mark.parametrize(
    ("value", "params", "message"),
    [
        (None, {"logits_processors": (raising,)}, "'raising' raised RuntimeError"),
        (None, {"logits_processors": (wrong_shape,)}, "'wrong_shape' returned"),
        (None, {"logits_processors": (sparse,)}, "'sparse' returned"),
        (None, {"logits_processors": (masks_all,)}, "every token is masked"),
        (None, {"allowed_token_ids": (3,), "bad_words_ids": [(3,)]}, "every token is masked"),
        (None, {"allowed_token_ids": (9000,)}, "every token is masked"),
        (float("nan"), {}, "NaN"),
        (float("nan"), {"temperature": 0}, "NaN"),
        (float("nan"), {"top_k": 3, "top_p": 0.9}, "NaN"),
        (float("inf"), {}, "+inf"),
        (float("nan"), {"temperature": 0, "allowed_token_ids": (1, 2), "logprobs": 1}, "no log-probabilities"),
    ],
)
def test_a_failing_row_fails_alone(value: float | None, params: dict[str, Any], message: str) -> None:
    vocab_size = 200
    logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(4))
    healthy = [make_row(vocab_size, seed=1, logprobs=2), make_row(vocab_size, temperature=0, logprobs=1)]
    alone = Sampler(vocab_size).sample(logits[[0, 2]], healthy, [tokens(1), tokens(2)])
    if value is not None:
        logits[1, 50] = value
    rows = [healthy[0], make_row(vocab_size, **params), healthy[1]]
    samples = Sampler(vocab_size).sample(logits, rows, [tokens(1), tokens(1), tokens(2)])
    assert [samples[0], samples[2]] == alone
    assert samples[1].token_id == -1
    assert samples[1].logprobs is None
    assert message in str(samples[1].error)


def test_all_masked_logits_fail_in_the_greedy_fast_path() -> None:
    logits = torch.zeros(2, 30)
    logits[0] = -torch.inf
    samples = Sampler(30).sample(logits, [make_row(30, temperature=0)] * 2, [tokens(1)] * 2)
    assert samples[0].token_id == -1
    assert "masked" in str(samples[0].error)
    assert samples[1] == RowSample(0)


def test_empty_batch() -> None:
    assert Sampler(30).sample(torch.empty(0, 30), [], []) == []


def test_rows_are_immutable() -> None:
    with pytest.raises(AttributeError):
        make_row(30).seed = 5  # type: ignore[misc]
