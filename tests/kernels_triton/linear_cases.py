"""What the tests of the Triton projections share: inputs, a table of one plan, and how close results have to be."""

from __future__ import annotations

import torch
from torch import Tensor

from kvik.kernels.api import LinearWeight
from kvik.kernels.triton.dispatch import Plan, RowPlan, Rule, Table

__all__ = ["DTYPES", "check", "noise", "one_plan", "projection"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def noise(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype).to(device)


def projection(n: int, k: int, bias: bool, dtype: torch.dtype, device: torch.device) -> LinearWeight:
    weight = noise(n, k, dtype=dtype, device=device)
    return LinearWeight(weight, noise(n, dtype=dtype, device=device, seed=1) if bias else None)


def one_plan(plan: Plan, row: RowPlan | None = None) -> Table:
    """A table that takes `plan` for everything."""
    return Table(
        rules=(Rule(plan=plan),), deterministic=(Rule(plan=plan),), rows=(Rule(plan=row or RowPlan(block=16)),)
    )


def check(got: Tensor, want: Tensor, *, rounds_alike: bool = True) -> None:
    """Equal up to the order of additions: 16-bit results are the same numbers but for a few, if they round alike.

    A rounding left out changes a third of them; another order of additions, a few in a row whose norm it moved.
    """
    assert got.shape == want.shape and got.dtype == want.dtype and got.device == want.device
    scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    torch.testing.assert_close(got, want, rtol=0, atol=_TOLERANCE[want.dtype] * scale)
    if want.dtype != torch.float32 and rounds_alike:
        assert (got != want).float().mean() <= 0.1 + 1 / want.numel()
