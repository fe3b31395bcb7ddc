"""Logits processors: pure functions from one row of float32 logits to another, applied before temperature.

Each works on a single row [vocab], so no row can see or slow a neighbour. Order, after Hugging Face `generate`:
repetition penalty, presence and frequency penalties, logit bias, allowed ids, bad words, min_tokens, user callables;
last what the sequence's grammar allows, so that nothing can lead out of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvik.errors import RequestError
from kvik.sampling.row import RowSampling
from kvik.sampling_params import LogitsProcessor

__all__ = [
    "add_bias", "call_user", "completing_ids", "keep_bits", "keep_only", "mask", "output_penalties", "process",
    "repetition_penalty",
]  # fmt: skip


def repetition_penalty(logits: Tensor, token_ids: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of every id in `token_ids` (prompt and output) by `penalty`, once.

    Source: Keskar et al., "CTRL", arXiv 1909.05858, in the sign-aware form of Hugging Face transformers.
    """
    ids = token_ids[token_ids < logits.numel()]
    seen = logits[ids]
    return logits.scatter(0, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def output_penalties(logits: Tensor, output_ids: Tensor, presence: float, frequency: float) -> Tensor:
    """logit[j] - frequency * count[j] - presence * (count[j] > 0), counted over the output (OpenAI API reference)."""
    ids, counts = torch.unique(output_ids[output_ids < logits.numel()], return_counts=True)
    return logits.scatter(0, ids, logits[ids] - counts * frequency - presence)


def add_bias(logits: Tensor, token_ids: Tensor, bias: Tensor) -> Tensor:
    """Add `bias` [n] to the logits of `token_ids` [n]."""
    return logits.index_add(0, token_ids, bias)


def keep_only(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Mask every id but `token_ids`."""
    return torch.full_like(logits, -torch.inf).scatter(0, token_ids, logits[token_ids])


def keep_bits(logits: Tensor, words: np.ndarray) -> Tensor:
    """Mask every id v whose bit, v % 32 of word v // 32, is not set in `words` (int32)."""
    bits = np.unpackbits(words.view(np.uint8), count=logits.numel(), bitorder="little")
    return logits.masked_fill(torch.from_numpy(bits == 0).to(logits.device), -torch.inf)


def mask(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Set the logits of `token_ids` to -inf."""
    return logits.index_fill(0, token_ids, -torch.inf)


def completing_ids(bad_words: Sequence[tuple[int, ...]], token_ids: Tensor) -> list[int]:
    """Last ids of the bad words whose other ids are the tail of `token_ids`: drawing one would complete the word."""
    longest = max(len(word) for word in bad_words) - 1
    tail = tuple(token_ids[-longest:].tolist())
    return [
        word[-1] for word in bad_words if len(word) <= len(tail) + 1 and tail[len(tail) + 1 - len(word) :] == word[:-1]
    ]


def call_user(processor: LogitsProcessor, token_ids: list[int], logits: Tensor) -> Tensor:
    """What a user's callable makes of `logits`. Raises RequestError, naming it, where it fails or returns nonsense."""
    name = getattr(processor, "__qualname__", type(processor).__name__)
    try:
        result: Any = processor(token_ids, logits)
    except Exception as error:  # foreign code may raise anything, and only its own request may fail
        raise RequestError(f"logits processor {name!r} raised {error!r}", "logits_processors") from error
    if not isinstance(result, Tensor):
        raise RequestError(
            f"logits processor {name!r} returned {type(result).__name__}, not a Tensor", "logits_processors"
        )
    wanted, got = ((t.dtype, list(t.shape), str(t.device), t.layout) for t in (logits, result))
    if got != wanted:
        raise RequestError(f"logits processor {name!r} returned {got}, wanted {wanted}", "logits_processors")
    return result.detach()


def process(logits: Tensor, row: RowSampling, token_ids: Tensor) -> Tensor:
    """Everything that `row` does to its logits [vocab] before temperature; `token_ids` are prompt and output so far."""
    token_ids = token_ids.long()
    logits = _mask(_penalise(logits, row, token_ids), row, token_ids)
    if row.params.logits_processors:
        history, logits = token_ids.tolist(), logits.clone()  # callables may write to what they get
        for processor in row.params.logits_processors:
            logits = call_user(processor, list(history), logits)
    if row.matcher is not None:
        row.matcher.advance(token_ids[row.num_prompt_tokens + row.matcher.num_tokens :].tolist())
        logits = keep_bits(logits, row.matcher.mask())
    return logits


def _penalise(logits: Tensor, row: RowSampling, token_ids: Tensor) -> Tensor:
    params = row.params
    if params.repetition_penalty != 1.0:
        logits = repetition_penalty(logits, token_ids, params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and token_ids.numel() > row.num_prompt_tokens:
        output_ids = token_ids[row.num_prompt_tokens :]
        logits = output_penalties(logits, output_ids, params.presence_penalty, params.frequency_penalty)
    if row.bias_ids is not None and row.bias is not None:
        logits = add_bias(logits, row.bias_ids, row.bias)
    return logits


def _mask(logits: Tensor, row: RowSampling, token_ids: Tensor) -> Tensor:
    if row.allowed_ids is not None:
        logits = keep_only(logits, row.allowed_ids)
    if row.banned_ids is not None:
        logits = mask(logits, row.banned_ids)
    if row.bad_words and (banned := completing_ids(row.bad_words, token_ids)):
        logits = mask(logits, torch.tensor(banned, device=logits.device))
    if row.stop_ids is not None and token_ids.numel() - row.num_prompt_tokens < row.params.min_tokens:
        logits = mask(logits, row.stop_ids)
    return logits
