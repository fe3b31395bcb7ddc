"""sum_parts(p) = residual + (p[0] + p[1] + ... + bias): what a projection with a split K leaves, as a tensor.

Within a decoder block the kernel that reads the result adds it up (`rms_norm`, `qk_norm_rope_store`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvik.kernels.triton.dispatch import RowPlan
from kvik.kernels.triton.pdl import start_dependents, wait_for_inputs
from kvik.kernels.triton.tiles import add_parts

__all__ = ["sum_parts"]


@triton.jit
def _sum_parts_kernel(
    parts: tl.tensor, bias: tl.tensor, residual: tl.tensor, out: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Columns of one block of a row of parts [PARTS, num_rows, SIZE], residual and out [num_rows, SIZE]."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = columns < SIZE
    start_dependents(PDL)
    wait_for_inputs(PDL)
    places = tl.program_id(0).to(tl.int64) * SIZE + columns
    total = add_parts(parts + places, tl.num_programs(0).to(tl.int64) * SIZE, bias, columns, ok, PARTS, BIAS)
    total = total.to(out.dtype.element_ty)
    if RESIDUAL:
        total = total.to(tl.float32) + tl.load(residual + places, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + places, total.to(out.dtype.element_ty), mask=ok)


def sum_parts(
    parts: Tensor, bias: Tensor | None, residual: Tensor | None, plan: RowPlan, out: Tensor, *, pdl: bool = False
) -> Tensor:
    """The sum of parts [num_parts, num_rows, size] fp32 and bias [size], rounded; plus residual [num_rows, size].

    Into `out` [num_rows, size], which is returned.
    """
    num_rows, size = out.shape
    _sum_parts_kernel[num_rows, triton.cdiv(size, plan.block)](
        parts, bias, residual, out, SIZE=size, BLOCK=plan.block, PARTS=len(parts), BIAS=bias is not None,
        RESIDUAL=residual is not None, PDL=pdl, num_warps=plan.num_warps, launch_pdl=pdl,
    )  # fmt: skip
    return out
