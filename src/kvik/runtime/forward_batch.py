"""Turns the chunks of a plan and the rows of the request table into the tensors of one step.

chunks        row 4: [17, 18)        row 0: [0, 3)            row 2: [8, 10), samples
tokens        17                     0 1 2                    8 9
slots         table[17 // b] * b + 17 % b ...
logit rows    (row 4, last token)                             (row 2, last token), then prompt positions
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from kvik.attention.base import ForwardBatch
from kvik.core.plan import Chunk
from kvik.runtime.request_table import RequestTable

__all__ = ["PromptRows", "StepBatch", "build_batch", "logit_rows"]


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Logit rows [start, stop) hold what predicts the prompt tokens at `positions + 1` of `row`."""

    row: int
    start: int
    stop: int
    first_position: int


@dataclass(frozen=True, slots=True, eq=False)
class StepBatch:
    """A ForwardBatch and what its logit rows are for: first one row per sampling chunk, then prompt positions."""

    forward: ForwardBatch
    sampling_rows: tuple[int, ...]
    prompt_rows: tuple[PromptRows, ...]


def build_batch(chunks: tuple[Chunk, ...], table: RequestTable, block_size: int, with_rope_lens: bool) -> StepBatch:
    """The tensors of a step. The chunks' new blocks are in the table already."""
    starts = [0, *accumulate(chunk.num_tokens for chunk in chunks)]
    lengths, seq_rows = [chunk.num_tokens for chunk in chunks], [chunk.row for chunk in chunks]
    ends = tuple(chunk.end for chunk in chunks)
    rows = np.repeat(seq_rows, lengths)  # [num_tokens]
    offsets = [end - stop for end, stop in zip(ends, starts[1:], strict=True)]
    positions = np.arange(starts[-1]) + np.repeat(offsets, lengths)  # [num_tokens]
    blocks = table.block_table[rows, positions // block_size].astype(np.int64)
    logit_indices, prompt_rows = logit_rows(chunks, starts, table.num_prompt)
    num_blocks = -(-max(ends) // block_size)
    rope_lens: Tensor | None = None
    if with_rope_lens:
        rope_lens = torch.from_numpy(np.maximum(np.array(table.num_prompt)[rows], positions + 1))
    forward = ForwardBatch(
        input_ids=torch.from_numpy(table.token_ids[rows, positions].astype(np.int64)),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(blocks * block_size + positions % block_size),
        query_starts=torch.from_numpy(np.array(starts, dtype=np.int32)),
        seq_lens=torch.from_numpy(np.array(ends, dtype=np.int32)),
        block_tables=torch.from_numpy(table.block_table[seq_rows, :num_blocks]),
        logit_indices=torch.from_numpy(np.array(logit_indices, dtype=np.int64)),
        query_starts_host=tuple(starts),
        seq_lens_host=ends,
        rope_lens=rope_lens,
    )
    return StepBatch(forward, tuple(chunk.row for chunk in chunks if chunk.sample), prompt_rows)


def logit_rows(
    chunks: Sequence[Chunk], starts: Sequence[int], num_prompt: Sequence[int] | np.ndarray, num_decodes: int = 0
) -> tuple[list[int], tuple[PromptRows, ...]]:
    """Token indices that need logits, and which of them are prompt positions.

    The first `num_decodes` tokens are decodes, `starts` [len(chunks) + 1] those of the chunks' tokens; `num_prompt` is
    by table row.
    """
    indices = [*range(num_decodes), *(starts[i + 1] - 1 for i, chunk in enumerate(chunks) if chunk.sample)]
    prompt_rows = []
    for i, chunk in enumerate(chunks):
        count = min(chunk.end, int(num_prompt[chunk.row]) - 1) - chunk.start if chunk.prompt_logprobs else 0
        if count > 0:
            prompt_rows.append(PromptRows(chunk.row, len(indices), len(indices) + count, chunk.start))
            indices.extend(range(starts[i], starts[i] + count))
    return indices, tuple(prompt_rows)
