"""Reported log-probabilities against float64, their ties, and their independence of the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvik.sampling import prompt_logprobs
from kvik.sampling.logprobs import top_ids


def random_logits(num_rows: int, vocab_size: int) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(num_rows)) * 3


@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 5), (3, 1000), (40, 321)])
@pytest.mark.parametrize("k", [0, 1, 4, 128])
def test_values_ranks_and_tops(num_rows: int, vocab_size: int, k: int) -> None:
    logits = random_logits(num_rows, vocab_size)
    next_ids = torch.arange(num_rows) % vocab_size
    expected = logits.double().log_softmax(-1)
    found = prompt_logprobs(logits, next_ids, k)
    for i, item in enumerate(found):
        assert item.token_id == next_ids[i]
        assert item.logprob == pytest.approx(expected[i, next_ids[i]].item(), abs=1e-5)
        order = expected[i].argsort(descending=True)
        assert order[item.rank - 1] == next_ids[i]
        assert [token for token, _ in item.top] == order[:k].tolist()
        assert [value for _, value in item.top] == pytest.approx(expected[i][order[:k]].tolist(), abs=1e-5)
    assert len(found) == num_rows


def test_no_rows() -> None:
    assert prompt_logprobs(torch.empty(0, 10), torch.empty(0, dtype=torch.int64), 3) == []


def test_ties_share_a_rank_and_come_lowest_id_first() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, [900, 100, 500]] = 2.0
    (item,) = prompt_logprobs(logits, torch.tensor([900]), 5)
    assert item.rank == 1
    assert [token for token, _ in item.top] == [100, 500, 900, 0, 1]
    assert prompt_logprobs(logits, torch.tensor([7]), 0)[0].rank == 4


@pytest.mark.parametrize("k", [1, 3, 20, 150])
def test_shorter_tops_are_prefixes(k: int) -> None:
    values = (random_logits(1, 10_001)[0] * 2).round()
    assert torch.equal(top_ids(values, k), top_ids(values, 150)[:k])
    assert torch.equal(top_ids(values, k), values.sort(descending=True, stable=True).indices[:k])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [1003, 151_936])
def test_a_row_gives_the_same_bits_alone_and_in_any_batch(vocab_size: int, dtype: torch.dtype) -> None:
    num_rows = 18 if vocab_size < 10_000 else 5
    logits = random_logits(num_rows, vocab_size).to(dtype)
    next_ids = torch.arange(num_rows) * 37
    together = prompt_logprobs(logits, next_ids, 6)
    assert [prompt_logprobs(logits[i : i + 1], next_ids[i : i + 1], 6)[0] for i in range(num_rows)] == together
    assert prompt_logprobs(logits.flip(0), next_ids.flip(0), 6)[::-1] == together
