"""`sample` against what an engine draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import DTYPES, noise

from kvik import ConfigError, RequestError, ops
from kvik.core.plan import RowInit
from kvik.sampling.row import RowSampling
from kvik.sampling.sampler import Sampler
from kvik.sampling_params import SamplingParams

VOCAB = 1003
ASKED: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "top_k": 1, "top_p": 0.5},
    {},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"min_p": 0.1, "top_k": 50, "top_p": 0.9, "position": 17},
]


@pytest.mark.parametrize("asked", ASKED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_drawn_as_an_engine_draws_them(
    asked: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    logits = noise(9, VOCAB, dtype=dtype, device=device) * 3
    position, seed = asked.get("position", 0), 2**40 + 5
    params = SamplingParams(**{name: value for name, value in asked.items() if name != "position"})
    rows = [RowSampling.from_init(RowInit(i, (), 0, params, seed + i, (), ()), VOCAB) for i in range(9)]
    want = Sampler(VOCAB).sample(logits.cpu(), rows, [torch.zeros(position, dtype=torch.int64)] * 9)
    got = ops.sample(logits, seed=seed, **asked)
    assert got.dtype == torch.int64 and got.device == logits.device
    assert got.tolist() == [sample.token_id for sample in want]


def test_a_row_alone_and_other_positions(device: torch.device) -> None:
    logits = noise(1, VOCAB, dtype=torch.float32, device=device).expand(40, -1)
    together = ops.sample(logits, seed=3)
    assert torch.equal(ops.sample(logits[:1], seed=3 + 7), together[7:8])
    assert not torch.equal(ops.sample(logits, seed=3, position=1), together)


def test_what_cannot_be_drawn_is_minus_one(device: torch.device) -> None:
    logits = noise(4, VOCAB, dtype=torch.float32, device=device)
    logits[0], logits[1, 5], logits[2, 6] = -torch.inf, torch.nan, torch.inf
    for temperature in (0.0, 1.0):
        tokens = ops.sample(logits, temperature=temperature).tolist()
        assert tokens[:3] == [-1, -1, -1] and 0 <= tokens[3] < VOCAB
    assert ops.sample(logits[:0]).shape == (0,)


def test_wrong_arguments_are_named(device: torch.device) -> None:
    logits = noise(4, 16, dtype=torch.float32, device=device)
    with pytest.raises(RequestError, match="top_p"):
        ops.sample(logits, top_p=0)
    for call, text in (
        (lambda: ops.sample(logits[0]), r"logits must be \[rows, vocab_size\], got \[16\]"),
        (lambda: ops.sample(logits, position=-1), "position is the number of tokens before"),
        (lambda: ops.sample(logits.long()), "logits must be float32, bfloat16 or float16, got int64"),
    ):
        with pytest.raises(ConfigError, match=text):
            call()
