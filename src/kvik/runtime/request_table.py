"""One row per live sequence: its token ids, block table and sampling state. The only place that plans are applied to.

    row     token_ids [max_model_len]        block_table [max_blocks]     num_tokens, num_prompt, sampling
     0      p p p p p p o o o . . . .        7 2 9 . .                    9, 6, RowSampling
     1      . . . . . . . . . . . . .        . . . . .                    free: whatever was there before

Sampled tokens are appended here, so the next step needs no token ids from the scheduler. It is numpy's, which looks up
a few numbers in a tenth of torch's time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvik.core.plan import RowInit
from kvik.sampling.row import RowSampling

__all__ = ["RequestTable"]


class RequestTable:
    """Rows of `max_num_seqs` sequences of up to `max_model_len` tokens."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        max_blocks = -(-max_model_len // block_size)
        self.token_ids = np.zeros((max_num_seqs, max_model_len), dtype=np.int32)
        self.block_table = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self.num_tokens = [0] * max_num_seqs
        self.num_prompt = [0] * max_num_seqs
        self.num_blocks = [0] * max_num_seqs
        self.sampling: list[RowSampling | None] = [None] * max_num_seqs

    def join(self, init: RowInit, sampling: RowSampling) -> None:
        """Start a row over."""
        self.num_tokens[init.row] = len(init.token_ids)
        self.num_prompt[init.row] = init.num_prompt_tokens
        self.num_blocks[init.row] = 0
        self.sampling[init.row] = sampling
        self.token_ids[init.row, : len(init.token_ids)] = init.token_ids

    def add_blocks(self, row: int, block_ids: tuple[int, ...]) -> None:
        """Append blocks to a row's block table."""
        start = self.num_blocks[row]
        self.num_blocks[row] = end = start + len(block_ids)
        self.block_table[row, start:end] = block_ids

    def append(self, row: int, token_id: int) -> None:
        """Append a sampled token. The last one of a sequence that reached its limit has no place, and needs none."""
        index = self.num_tokens[row]
        if index < self.token_ids.shape[1]:
            self.token_ids[row, index] = token_id
        self.num_tokens[row] = index + 1

    def tokens(self, row: int) -> Tensor:
        """Token ids of a row so far, int32 [num_tokens]: a view, until the row changes."""
        return torch.from_numpy(self.token_ids[row, : self.num_tokens[row]])
