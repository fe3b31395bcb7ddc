"""Rounding to nearest in plain torch: the same values and scales, bit for bit, as the native packers make on load.

Used where the native kernels are absent, and the oracle that they are tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvik.quantization.formats import GROUPS

__all__ = ["dequantize", "quantize", "quantize_groups", "quantize_rows"]

_RANGES = (-8.0, -8.6, -9.2, -7.5, 7.0)
"""What the extreme value of an int4 group may become; the first with the least squared error is taken."""
_LARGEST_HALF = 65504.0


def quantize(weight: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """`weight` [out, in] -> (q int8 [out, in], scales fp32 [out, groups])."""
    return quantize_rows(weight) if fmt == "int8" else quantize_groups(weight, GROUPS[fmt])


def dequantize(q: Tensor, scales: Tensor, fmt: str) -> Tensor:
    """q * scale in fp32, [out, in]. `scales` [out, groups] or for int8 [out]."""
    wide = scales.float().view(len(q), -1)
    if fmt != "int8":
        wide = wide.repeat_interleave(GROUPS[fmt], 1)[:, : q.shape[1]]
    return q.float() * wide


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 with one scale a row: round(w / scale), scale = max |w| / 127."""
    wide = weight.float()
    most = wide.abs().amax(1, keepdim=True)
    scales = torch.where(most > 0, most / 127.0, 1.0)
    return (wide / scales).round().clamp(-127, 127).to(torch.int8), scales


def quantize_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """int4 in groups of `group` inputs: of five scales, each rounded to fp16, the one with the least squared error."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % group)).view(rows, -1, group)
    extreme = _first_extreme(padded)  # [out, groups, 1]
    best = torch.full_like(extreme, torch.inf)
    best_scale, best_q = torch.zeros_like(extreme), torch.zeros_like(padded, dtype=torch.int8)
    for limit in _RANGES:
        scale = (extreme / limit).clamp(-_LARGEST_HALF, _LARGEST_HALF).half().float()
        value = (padded * (1.0 / scale)).round().clamp(-8, 7)
        error = _sum_in_order((padded - value * scale).square_())
        better = (scale != 0) & (error < best)
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_q = torch.where(better, value.nan_to_num_().to(torch.int8), best_q)
    return best_q.view(rows, -1)[:, :columns].contiguous(), best_scale.squeeze(2)


def _first_extreme(x: Tensor) -> Tensor:
    """The first element of the last dimension whose magnitude is the largest."""
    size = x.abs()
    places = torch.arange(x.shape[-1], device=x.device).expand_as(x)
    first = torch.where(size == size.amax(-1, keepdim=True), places, x.shape[-1]).amin(-1, keepdim=True)
    return x.gather(-1, first)


def _sum_in_order(x: Tensor) -> Tensor:
    """The sum over the last dimension from left to right in fp32, as the kernels add."""
    total = torch.zeros_like(x[..., :1])
    for i in range(x.shape[-1]):
        total += x[..., i : i + 1]
    return total
