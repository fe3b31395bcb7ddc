"""What the tests of the operators share: inputs, and how near a result has to be to one in float64."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DTYPES", "assert_close", "noise", "norm64"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of the largest element, at least 1


def noise(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype).to(device)


def assert_close(got: Tensor, want: Tensor) -> None:
    """`want` is in float64, on the device of `got`."""
    assert got.shape == want.shape
    scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=_TOLERANCE[got.dtype] * scale)


def norm64(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
