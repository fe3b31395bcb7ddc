"""Log-probabilities of tokens under the raw logits: of drawn tokens and of prompt tokens.

Every value is computed from its own row in an order that the number of rows cannot change. (`torch.logsumexp` sums
differently for one row and for many on a CPU; `log_softmax` over the last dimension does not. On a GPU its order
follows the row's address modulo 16 bytes, so that rows are padded to the same one.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvik.outputs import TokenLogprobs
from kvik.sampling.filters import top_k_bound

__all__ = ["prompt_logprobs", "top_ids"]

ROWS_AT_ONCE = 16  # bounds the float32 copies to 2 * 16 * vocab values
_ALIGNED = 4  # float32 values in 16 bytes


def top_ids(values: Tensor, k: int) -> Tensor:
    """Ids of the k largest of `values` [vocab], best first, lower id first among equals: int64 [min(k, vocab)]."""
    ids = (values >= top_k_bound(values, k)).nonzero().squeeze(-1) if k else values.new_empty(0, dtype=torch.int64)
    return ids[values[ids].sort(descending=True, stable=True).indices[:k]]


def prompt_logprobs(logits: Tensor, next_ids: Tensor, k: int) -> list[TokenLogprobs]:
    """Natural log-probabilities of `next_ids` [n] under `logits` [n, vocab], each with rank and the k best tokens.

    The rank is one more than the number of tokens that are strictly more likely, so tokens that tie share it.
    """
    found, next_ids = list[TokenLogprobs](), next_ids.long()
    for start in range(0, len(next_ids), ROWS_AT_ONCE):
        block = slice(start, start + ROWS_AT_ONCE)
        found += _block_logprobs(logits[block].float(), next_ids[block], k)
    return found


def _block_logprobs(logits: Tensor, token_ids: Tensor, k: int) -> list[TokenLogprobs]:
    missing = -logits.shape[1] % _ALIGNED
    aligned = F.pad(logits, (0, missing), value=float("-inf")) if missing else logits
    logprobs = aligned.log_softmax(-1)  # [rows, vocab + missing]
    column = token_ids.unsqueeze(-1)  # [rows, 1]
    chosen = logprobs.gather(1, column).squeeze(-1).tolist()
    ranks = ((logits > logits.gather(1, column)).sum(-1) + 1).tolist()
    tops: list[tuple[tuple[int, float], ...]] = []
    for row_logits, row_logprobs in zip(logits, logprobs, strict=True):
        best = top_ids(row_logits, k)
        tops.append(tuple(zip(best.tolist(), row_logprobs[best].tolist(), strict=True)))
    return [TokenLogprobs(*fields) for fields in zip(token_ids.tolist(), chosen, ranks, tops, strict=True)]
