"""embedding(ids, weight)[t] = weight[ids[t]]: rows of a table, copied."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvik.kernels.triton.dispatch import RowPlan
from kvik.kernels.triton.pdl import start_dependents, wait_for_inputs

__all__ = ["embedding"]


@triton.jit
def _embedding_kernel(
    ids: tl.tensor, weight: tl.tensor, out: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
) -> None:
    """Columns of one block of out [num_tokens, SIZE] for one token."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start_dependents(PDL)
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + token).to(tl.int64)
    values = tl.load(weight + row * SIZE + columns, mask=columns < SIZE)
    tl.store(out + token * SIZE + columns, values, mask=columns < SIZE)


def embedding(ids: Tensor, weight: Tensor, plan: RowPlan, out: Tensor, *, pdl: bool = False) -> Tensor:
    """Rows of `weight` [vocab_size, size] at `ids` [num_tokens], not empty, into `out` [num_tokens, size]."""
    size = weight.shape[1]
    _embedding_kernel[(len(ids), triton.cdiv(size, plan.block))](
        ids, weight, out, SIZE=size, BLOCK=plan.block, PDL=pdl, num_warps=plan.num_warps, launch_pdl=pdl
    )
    return out
