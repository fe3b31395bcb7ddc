"""silu_mul([gate | up]) = silu(gate) * up, silu(x) = x / (1 + exp(-x)) (SwiGLU, https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvik.kernels.triton.dispatch import RowPlan
from kvik.kernels.triton.pdl import start_dependents, wait_for_inputs
from kvik.kernels.triton.tiles import silu

__all__ = ["silu_mul"]


@triton.jit
def _silu_mul_kernel(
    gate_up: tl.tensor, out: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
) -> None:
    """Columns of one block of out [num_tokens, SIZE] for one token of gate_up [num_tokens, 2 * SIZE]."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = columns < SIZE
    token = tl.program_id(0).to(tl.int64)
    start_dependents(PDL)
    wait_for_inputs(PDL)
    gate = tl.load(gate_up + token * 2 * SIZE + columns, mask=ok, other=0.0)
    up = tl.load(gate_up + token * 2 * SIZE + SIZE + columns, mask=ok, other=0.0)
    result = (silu(gate).to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
    tl.store(out + token * SIZE + columns, result, mask=ok)


def silu_mul(gate_up: Tensor, plan: RowPlan, out: Tensor, *, pdl: bool = False) -> Tensor:
    """silu(gate) * up of gate_up [num_tokens, 2 * size], not empty, into `out` [num_tokens, size]."""
    size = out.shape[1]
    _silu_mul_kernel[(len(out), triton.cdiv(size, plan.block))](
        gate_up, out, SIZE=size, BLOCK=plan.block, PDL=pdl, num_warps=plan.num_warps, launch_pdl=pdl
    )
    return out
