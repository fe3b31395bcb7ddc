"""What the runner hands to the model for one step, and the protocol of an attention backend.

`ForwardBatch` is the tensor form of a step plan: built by the model runner, read by everything below it. The tokens of
all sequences lie one after the other; a sequence contributes the last tokens of its context.

    tokens of the step      | seq 0: 1 |   seq 1: 5    | seq 2: 2 |
    query_starts            0          1               6          8
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kvik.kernels.api import KVLayer

__all__ = ["AttentionBackend", "ForwardBatch"]


@dataclass(frozen=True, slots=True, eq=False)
class ForwardBatch:
    """The tokens of one step. All keys and values of earlier positions are already in the cache."""

    input_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    slots: Tensor  # [num_tokens] int64, block_id * block_size + offset: where the token's key and value go
    query_starts: Tensor  # [num_seqs + 1] int32, the first token of each sequence
    seq_lens: Tensor  # [num_seqs] int32, context length including the tokens of this step
    block_tables: Tensor  # [num_seqs, max_blocks] int32; entries past a sequence's last block may hold any valid id
    logit_indices: Tensor | None  # [num_rows] int64, the tokens whose hidden state is wanted; None: all
    query_starts_host: tuple[int, ...]
    seq_lens_host: tuple[int, ...]
    rope_lens: Tensor | None = None  # [num_tokens] int64, only for a RoPE whose angles depend on the sequence's length

    @property
    def num_seqs(self) -> int:
        return len(self.seq_lens_host)


class AttentionBackend(Protocol):
    """Causal attention of the step's queries over the paged cache."""

    def forward(self, q: Tensor, kv: KVLayer, batch: ForwardBatch, *, scale: float, window: int | None) -> Tensor:
        """softmax(scale * q @ k.T) @ v, where k and v are the cached context of each query's sequence.

        q: [num_tokens, num_heads, head_dim]; query head h reads key/value head h // (num_heads // num_kv_heads).
        A query at position p sees the positions 0..p, or with a `window` only the last `window` of them.
        The step's own keys and values are in the cache before this is called.

        Returns [num_tokens, num_heads, head_dim] in q's dtype.
        """
