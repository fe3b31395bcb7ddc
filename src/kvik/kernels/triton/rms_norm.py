"""rms_norm(x) = x / sqrt(mean(x^2) + eps) * weight, alone or of a sum that is kept (https://arxiv.org/abs/1910.07467).

The sum may be of the parts that a projection with a split K leaves, and a residual.

One program per row, the row in registers: the order of additions depends on the row's size only.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvik.kernels.triton.dispatch import RowPlan
from kvik.kernels.triton.pdl import start_dependents, wait_for_inputs
from kvik.kernels.triton.tiles import add_parts, normalized

__all__ = ["add_rms_norm", "rms_norm", "sum_rms_norm"]


@triton.jit
def _rms_norm_kernel(
    x: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    eps: float,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Row i of x, residual, out and total [num_rows, SIZE]; residual and total are used with ADD. With PARTS, x is
    [PARTS, num_rows, SIZE], to which bias [SIZE] is added with BIAS, and total is used, too."""
    columns = tl.arange(0, BLOCK)
    ok = columns < SIZE
    gain = tl.load(weight + columns, mask=ok, other=0.0)
    start_dependents(PDL)
    wait_for_inputs(PDL)
    places = tl.program_id(0).to(tl.int64) * SIZE + columns
    if PARTS > 0:
        row = add_parts(x + places, tl.num_programs(0).to(tl.int64) * SIZE, bias, columns, ok, PARTS, BIAS)
        row = row.to(out.dtype.element_ty)
    else:
        row = tl.load(x + places, mask=ok, other=0.0)
    if ADD:
        row = (row.to(tl.float32) + tl.load(residual + places, mask=ok, other=0.0).to(tl.float32)).to(row.dtype)
    if ADD or PARTS > 0:
        tl.store(total + places, row, mask=ok)
    wide = row.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, axis=0) / SIZE + eps)
    tl.store(out + places, normalized(row, rstd, gain), mask=ok)


def _launch(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor,
    total: Tensor | None, plan: RowPlan, pdl: bool, parts: int = 0,
) -> None:  # fmt: skip
    size = out.shape[-1]
    _rms_norm_kernel[(out.numel() // size,)](
        x,
        bias,
        residual,
        weight,
        out,
        total,
        eps,
        SIZE=size,
        BLOCK=triton.next_power_of_2(size),
        PARTS=parts,
        BIAS=bias is not None,
        ADD=residual is not None,
        PDL=pdl,
        num_warps=plan.num_warps,
        launch_pdl=pdl,
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, plan: RowPlan, out: Tensor, *, pdl: bool = False) -> Tensor:
    """The norm of each row of x [..., size] into `out`, which is returned. All tensors are contiguous, x not empty."""
    _launch(x, None, None, weight, eps, out, None, plan, pdl)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, plan: RowPlan, out: Tensor, total: Tensor,
    *, pdl: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(rms_norm(x + residual) in `out`, x + residual in `total`), the sum rounded first. `total` may be `residual`."""
    _launch(x, None, residual, weight, eps, out, total, plan, pdl)
    return out, total


def sum_rms_norm(
    parts: Tensor, bias: Tensor | None, residual: Tensor | None, weight: Tensor, eps: float, plan: RowPlan,
    out: Tensor, total: Tensor, *, pdl: bool = False,
) -> None:  # fmt: skip
    """As `add_rms_norm`, of the sum of parts [num_parts, num_rows, size] fp32, bias [size] and residual.

    Rounded before the residual is added, and after. `total` may be `residual`.
    """
    _launch(parts, bias, residual, weight, eps, out, total, plan, pdl, len(parts))
