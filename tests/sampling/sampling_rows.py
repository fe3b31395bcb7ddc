"""Short ways to make rows, histories and HF-filtered logits for the sampling tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from kvik.core.plan import RowInit
from kvik.sampling import RowSampling
from kvik.sampling_params import SamplingParams

__all__ = ["hf_warped", "make_row", "tokens"]


def tokens(*ids: int) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64)


def make_row(
    vocab_size: int,
    *,
    seed: int = 0,
    num_prompt_tokens: int = 1,
    stop_token_ids: Sequence[int] = (),
    bad_words_ids: Sequence[Sequence[int]] = (),
    **params: Any,
) -> RowSampling:
    words = tuple(tuple(word) for word in bad_words_ids)
    init = RowInit(0, (0,), num_prompt_tokens, SamplingParams(**params), seed, tuple(stop_token_ids), words)
    return RowSampling.from_init(init, vocab_size)


def hf_warped(logits: Tensor, params: SamplingParams) -> Tensor:
    """`logits` [vocab] after the warpers of HF generate, in its order; removed entries are -inf."""
    ids, scores = torch.zeros(1, 1, dtype=torch.int64), logits.unsqueeze(0)
    scores = hf.TemperatureLogitsWarper(float(params.temperature))(ids, scores)
    if params.top_k:
        scores = hf.TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1.0:
        scores = hf.TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p:
        scores = hf.MinPLogitsWarper(params.min_p)(ids, scores)
    return scores[0]
