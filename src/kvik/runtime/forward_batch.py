"""Turns the chunks of a plan and the rows of the request table into the tensors of one step.

chunks        row 4: [17, 18)        row 0: [0, 3)            row 2: [8, 10), samples
tokens        17                     0 1 2                    8 9
slots         table[17 // b] * b + 17 % b ...
logit rows    (row 4, last token)                             (row 2, last token), then prompt positions
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    device = table.token_ids.device
    starts = [0]
    for chunk in chunks:
        starts.append(starts[-1] + chunk.num_tokens)
    lengths = torch.tensor([chunk.num_tokens for chunk in chunks])
    row_of = torch.tensor([chunk.row for chunk in chunks])
    rows = row_of.repeat_interleave(lengths)  # [num_tokens]
    offsets = torch.tensor([chunk.start - start for chunk, start in zip(chunks, starts, strict=False)])
    positions = torch.arange(starts[-1]) + offsets.repeat_interleave(lengths)  # [num_tokens]
    blocks = table.block_table[rows, positions // block_size].long()
    logit_indices, prompt_rows = logit_rows(chunks, starts, table.num_prompt)
    num_blocks = max(-(-chunk.end // block_size) for chunk in chunks)
    rope_lens: Tensor | None = None
    if with_rope_lens:
        num_prompt = torch.tensor([table.num_prompt[chunk.row] for chunk in chunks]).repeat_interleave(lengths)
        rope_lens = torch.maximum(num_prompt, positions + 1)
    forward = ForwardBatch(
        input_ids=table.token_ids[rows, positions].long(),
        positions=positions.to(device),
        slots=blocks * block_size + positions % block_size,
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        seq_lens=torch.tensor([chunk.end for chunk in chunks], dtype=torch.int32, device=device),
        block_tables=table.block_table[row_of, :num_blocks],
        logit_indices=torch.tensor(logit_indices, dtype=torch.int64, device=device),
        query_starts_host=tuple(starts),
        seq_lens_host=tuple(chunk.end for chunk in chunks),
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
